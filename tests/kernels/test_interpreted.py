"""Every kernel in Triton's interpreter against the float64 oracle, on poisoned outputs, at scale 1 / sqrt(d)."""

from __future__ import annotations

import pytest
import torch

from s2attn import Dense, Local, Pattern, Power, Random, Sink, Stride, Window, build_layout
from s2attn.backends import Scoring
from tests.support import dense_mask
from tests.support.problems import check_backend, make_problem

# The interpreter turns arrays of one element into scalars, which NumPy announces to refuse one day.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

CASES = {
    "block 64, groups": (Local(2) | Stride(3), 130, 130, 4, 2, 32, 32, 64, True),
    "block 16, four per tile": (Local(2, 16) | Stride(3, block=16), 100, 100, 4, 2, 32, 32, 16, True),
    "block 32, per query head": (Local(2, 32) | Stride(3, block=32, heads="query"), 70, 130, 4, 2, 48, 32, 32, True),
    "block 128, own width of v": (Power(block=128) | Sink(5), 200, 200, 2, 1, 32, 80, 128, True),
    "block 256": (Window(50), 270, 270, 1, 1, 16, 16, 256, True),
    "rows that see nothing": (Stride(4, offset=1, block=16), 60, 70, 2, 2, 16, 16, 16, True),
    "more queries than keys": (Dense(), 90, 40, 2, 1, 16, 16, 32, True),
    "not causal": (Window(30) | Random(1, block=16), 70, 90, 2, 2, 32, 32, 16, False),
}


def tensors(n, m, heads, kv_heads, dim, dim_v, dtype, batch=2):
    torch.manual_seed(0)
    return [torch.randn(batch, s, h, d).to(dtype) for s, h, d in ((n, heads, dim), (m, kv_heads, dim), (m, kv_heads, dim_v))]


def pattern_problem(name, **more):
    pattern, n, m, heads, kv_heads, dim, dim_v, block, causal = CASES[name]
    torch.manual_seed(0)
    layout = build_layout(pattern, heads, kv_heads, n, m, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, m, causal=causal)
    return make_problem(layout, mask, heads=heads, kv_heads=kv_heads, batch=2, width=dim, v_width=dim_v, **more)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward_and_backward(name, dtype, triton_backend, poisoned_empty):
    check_backend(triton_backend, pattern_problem(name), dtype)


@pytest.mark.parametrize("name", ["block 64, groups", "block 32, per query head", "rows that see nothing"])
@pytest.mark.parametrize(("softcap", "sinks"), [(1.5, False), (None, True), (30.0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_soft_cap_and_sinks(name, softcap, sinks, dtype, triton_backend, poisoned_empty):
    check_backend(triton_backend, pattern_problem(name, softcap=softcap, sinks=torch.randn(CASES[name][3]) if sinks else None), dtype)


def test_packed_sequences(triton_backend, poisoned_empty):
    pattern: Pattern = Local(1, 16) | Stride(2, block=16)
    lengths = [40, 0, 75]
    cu = torch.tensor([0, 40, 40, 115])
    layout = build_layout(pattern, 2, 1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    mask = torch.zeros(2, 115, 115, dtype=torch.bool)
    for lo, n in zip(cu.tolist(), lengths, strict=False):
        mask[:, lo : lo + n, lo : lo + n] = dense_mask(pattern, 2, 1, n, n) if n else False
    check_backend(triton_backend, make_problem(layout, mask, heads=2, kv_heads=1, width=16))


def test_any_strides_and_the_same_bits(triton_backend):
    q, k, v = tensors(80, 80, 2, 1, 16, 16, torch.float32)
    layout = build_layout(Window(30), 2, 1, 80)
    out, lse = triton_backend.forward(q, k, v, layout, Scoring(0.25))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    wide = [torch.stack([t, t * 9], dim=-1).flatten(-2)[..., ::2] for t in (q, k, v)]
    for other in ((q, k, v), turned, wide):
        again = triton_backend.forward(*other, layout, Scoring(0.25))
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    dout = torch.randn_like(out)
    once = triton_backend.backward(dout, None, q, k, v, out, lse, layout, Scoring(0.25))
    twice = triton_backend.backward(dout.transpose(1, 2).contiguous().transpose(1, 2), None, *turned, out, lse, layout, Scoring(0.25))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_sinks_and_lse_of_any_strides(triton_backend):
    q, k, v = tensors(40, 40, 4, 2, 16, 16, torch.float32)
    layout, sinks = build_layout(Window(30), 4, 2, 40), torch.randn(8)[::2]
    plain, wide = Scoring(0.25, sinks=sinks.contiguous()), Scoring(0.25, sinks=sinks)
    out, lse = triton_backend.forward(q, k, v, layout, plain)
    again = triton_backend.forward(q, k, v, layout, wide)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    padded = torch.nn.functional.pad(lse, (0, 9))[..., :40]
    dout = torch.randn_like(out)
    once = triton_backend.backward(dout, None, q, k, v, out, lse, layout, plain)
    twice = triton_backend.backward(dout, None, q, k, v, out, padded, layout, wide)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_objections(triton_backend):
    def why(*x):
        return " ".join(triton_backend.objections(*x))

    wide = [torch.zeros(1, 4, 1, 264)] * 3
    assert "head widths up to 256, not 264" in why(*wide)
    many = [torch.zeros(1, 1, 1, 16).expand(70000, -1, -1, -1)] * 3
    assert "up to 65535 batch entries and heads, not 70000" in why(*many)
    assert "dtype torch.float64 is not one of" in why(*(t.double() for t in tensors(4, 4, 1, 1, 16, 16, torch.float32)))
    assert "interpreter multiplies bfloat16 wrongly" in why(*tensors(4, 4, 1, 1, 16, 16, torch.bfloat16))
