"""The warp-specialised kernels in Triton's interpreter against the float64 oracle: the same source, run without its warps."""

from __future__ import annotations

from types import SimpleNamespace

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
    """The three kernels on tensors and a layout; the fixture it stands on says where the interpreter is used."""
    from s2attn.backends.triton import launch, specialised, walk

    def forward(q, k, v, layout: Layout, scale: float, stack: int):
        dim, block, shared = max(q.shape[-1], v.shape[-1]), layout.block, q.shape[2] // max(layout.heads, k.shape[2])
        form = specialised.choose_form("forward", dim, block, shared)
        assert form.stack == stack
        rows = walk.walk_rows(layout, form.factor(block))
        masks = specialised.tall_masks(rows, layout.q_spans, layout.k_spans, layout.tiles, form)
        return specialised.specialised_forward(q, k, v, rows, masks, form, scale)

    def backward(q, k, v, out, lse, dout, dlse, layout: Layout, scale: float):
        dim, block, shared = max(q.shape[-1], v.shape[-1]), layout.block, q.shape[2] // max(layout.heads, k.shape[2])
        delta = specialised.by_block(launch.delta(out, dout, lse, dlse), layout.q_spans, block, 0.0)
        lse = specialised.by_block(lse, layout.q_spans, block, float("inf"))
        form = specialised.choose_form("dq", dim, block, shared)
        rows = walk.walk_rows(layout, form.factor(block))
        masks = specialised.tall_masks(rows, layout.q_spans, layout.k_spans, layout.tiles, form)
        dq = specialised.specialised_dq(q, k, v, dout, lse, delta, rows, masks, form, scale)
        if k.shape[2] % layout.heads:
            return (dq,)
        form = specialised.choose_form("dkv", dim, block, shared)
        columns = walk.walk_columns(layout, form.factor(block), q.shape[2], k.shape[2])
        masks = specialised.tall_masks(columns, layout.k_spans, layout.q_spans, layout.tiles.transpose(1, 2), form)
        return (dq, *specialised.specialised_dkv(q, k, v, dout, lse, delta, columns, masks, form, scale))

    return SimpleNamespace(forward=forward, backward=backward)


def tensors(n, m, heads, kv_heads, dim, dim_v, dtype, batch=2):
    torch.manual_seed(0)
    return [torch.randn(batch, s, h, d).to(dtype) for s, h, d in ((n, heads, dim), (m, kv_heads, dim), (m, kv_heads, dim_v))]


def compare(run, q, k, v, layout, mask, scale, stack):
    """Forward, then backward with gradients of out and lse, against autograd through the oracle."""
    out, lse = run.forward(q, k, v, layout, scale, stack)
    dout, seen = torch.randn_like(out), mask.any(dim=-1).expand(lse.shape)
    dlse = torch.where(seen, torch.randn_like(lse), torch.zeros_like(lse))
    got = [out, lse, *run.backward(q, k, v, out, lse, dout, dlse, layout, scale)]
    sets = []
    for function in (eager, oracle):
        x = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        o, full = function(*x, mask, scale)
        safe = torch.where(torch.isfinite(full), full, torch.zeros_like(full))
        sets.append([o, full, *torch.autograd.grad((o, safe), x, (dout.to(o.dtype), dlse.to(full.dtype)))])
    for name, value, plain, exact in zip(("out", "lse", "dq", "dk", "dv"), got, *sets, strict=False):
        assert_close(name, value, plain, exact.double(), terms=1.0 if name in ("out", "lse") else 4.0)
    return got


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_agrees_with_the_oracle(name, dtype, run, poisoned_empty):
    pattern, n, m, heads, kv_heads, dim, dim_v, block, causal, stack = CASES[name]
    q, k, v = tensors(n, m, heads, kv_heads, dim, dim_v, dtype)
    layout = build_layout(pattern, heads, kv_heads, n, m, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, m, causal=causal)
    got = compare(run, q, k, v, layout, mask, dim**-0.5, stack)
    assert len(got) == (3 if layout.heads > kv_heads else 5)


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
    once = compare(run, q, k, v, layout, mask, 0.125, heads)
    # Even a value that is no number, which a weight of 0 would not hide, stays in its own sequence.
    first = slice(0, 100)
    v[:, 100:] = float("nan")
    again = run.forward(q, k, v, layout, 0.125, heads)
    assert torch.equal(again[0][:, first], once[0][:, first]) and torch.equal(again[1][..., first], once[1][..., first])


def test_form_and_objections(triton_backend):
    from s2attn.backends.triton.specialised import choose_form, specialised_objections

    assert [choose_form("forward", 128, block, 1).factor(block) for block in (64, 128, 256)] == [2, 1, 1]
    assert [choose_form("forward", 128, block, 2).per_block(block) for block in (64, 128, 256)] == [1, 1, 2]
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
    apart = build_layout(Random(1, heads="query"), 2, 1, 80)
    assert specialised_objections(q, k, v, apart) == ["the same lists for all query heads of a group, not 2 lists for 1 KV heads"]
