"""The warp-specialised forward kernel in Triton's interpreter against the float64 oracle: the same source, run without its warps."""

from __future__ import annotations

import pytest
import torch

from s2attn import Dense, Layout, Local, Pattern, Random, Sink, Stride, Window, build_layout
from s2attn.testing import assert_close, dense_mask, eager, oracle

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

# pattern, T, S, H, G, D, DV, block, causal, stack
CASES: dict[str, tuple[Pattern, int, int, int, int, int, int, int, bool, int]] = {
    "block 64, two heads stacked": (Local(2) | Stride(3), 300, 300, 4, 2, 64, 64, 64, True, 2),
    "block 64, two rows merged": (Local(2) | Stride(3), 330, 330, 2, 2, 64, 64, 64, True, 1),
    "block 64, lists per query head": (Local(1) | Random(1, heads="query"), 200, 260, 2, 1, 64, 64, 64, True, 1),
    "block 128, own width of v": (Window(150) | Sink(5), 280, 280, 2, 1, 64, 128, 128, True, 1),
    "block 256": (Window(90), 270, 270, 1, 1, 64, 64, 256, True, 1),
    "rows that see nothing": (Stride(4, offset=1), 200, 330, 4, 1, 64, 64, 64, True, 2),
    "more queries than keys": (Dense(), 150, 70, 2, 1, 64, 64, 64, True, 2),
    "not causal, full only": (Dense(), 128, 192, 2, 1, 64, 64, 64, False, 2),
    "not causal": (Window(30) | Random(1), 130, 190, 2, 2, 64, 64, 64, False, 1),
}


@pytest.fixture
def run(triton_backend):
    """The kernel on tensors and a layout; the fixture it stands on says where the interpreter is used."""
    from s2attn.backends.triton.specialised import choose_form, specialised_forward, specialised_objections, tall_masks
    from s2attn.backends.triton.walk import walk_rows

    def forward(q, k, v, layout: Layout, scale: float, stack: int):
        shared = q.shape[2] // max(layout.heads, k.shape[2])
        form = choose_form(max(q.shape[-1], v.shape[-1]), layout.block, shared)
        assert form.stack == stack
        assert specialised_objections(q, k, v, layout) == []
        walk = walk_rows(layout, form.factor(layout.block))
        return specialised_forward(q, k, v, walk, tall_masks(layout, walk, form), form, layout.block, scale)

    return forward


def tensors(n, m, heads, kv_heads, dim, dim_v, dtype, batch=2):
    torch.manual_seed(0)
    return [torch.randn(batch, s, h, d).to(dtype) for s, h, d in ((n, heads, dim), (m, kv_heads, dim), (m, kv_heads, dim_v))]


def compare(got, q, k, v, mask, scale):
    for name, value, plain, exact in zip(("out", "lse"), got, eager(q, k, v, mask, scale), oracle(q, k, v, mask, scale), strict=True):
        assert_close(name, value, plain, exact.double())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_agrees_with_the_oracle(name, dtype, run, poisoned_empty):
    pattern, n, m, heads, kv_heads, dim, dim_v, block, causal, stack = CASES[name]
    q, k, v = tensors(n, m, heads, kv_heads, dim, dim_v, dtype)
    layout = build_layout(pattern, heads, kv_heads, n, m, block=block, causal=causal)
    got = run(q, k, v, layout, dim**-0.5, stack)
    compare(got, q, k, v, dense_mask(pattern, heads, kv_heads, n, m, causal=causal), dim**-0.5)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_packed_sequence_reads_nothing_of_the_next(heads, run, poisoned_empty):
    pattern = Local(2) | Stride(2)
    lengths = [0, 100, 0, 75, 64, 190]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = tensors(int(cu[-1]), int(cu[-1]), heads, 1, 64, 64, torch.float32, batch=1)
    layout = build_layout(pattern, heads, 1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    mask = torch.zeros(heads, int(cu[-1]), int(cu[-1]), dtype=torch.bool)
    for lo, n in zip(cu.tolist(), lengths, strict=False):
        mask[:, lo : lo + n, lo : lo + n] = dense_mask(pattern, heads, 1, n, n) if n else False
    once = run(q, k, v, layout, 0.125, heads)
    compare(once, q, k, v, mask, 0.125)
    # Even a value that is no number, which a weight of 0 would not hide, stays in its own sequence.
    first = slice(0, 100)
    v[:, 100:] = float("nan")
    again = run(q, k, v, layout, 0.125, heads)
    assert torch.equal(again[0][:, first], once[0][:, first]) and torch.equal(again[1][..., first], once[1][..., first])


def test_form_and_objections(triton_backend):
    from s2attn.backends.triton.specialised import choose_form, specialised_objections

    assert [choose_form(128, block, 1).factor(block) for block in (64, 128, 256)] == [2, 1, 1]
    assert [choose_form(128, block, 2).per_block(block) for block in (64, 128, 256)] == [1, 1, 2]
    layout = build_layout(Dense(), 2, 1, 80)
    q, k, v = tensors(80, 80, 2, 1, 64, 64, torch.float16)
    assert specialised_objections(q, k, v, layout) == []
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert specialised_objections(*turned, layout) == []
    assert specialised_objections(q[..., :48], k[..., :48], v, layout) == ["head width 48 is not 64 or 128"]
    spread = torch.stack([v, v], dim=-1).flatten(-2)[..., ::2]
    assert specialised_objections(q, k, spread, layout) == ["v whose rows are contiguous and start at multiples of 16 bytes"]
    small = build_layout(Dense(), 2, 1, 80, block=32)
    assert specialised_objections(q, k, v, small) == ["blocks of 64 tokens or more, not 32"]
