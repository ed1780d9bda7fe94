"""What the original S2 kernels get wrong (as far as it can go wrong without a GPU): one test for each, at scale 1 / sqrt(d)."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

import s2attn
from s2attn import Blocks, Dense, Layout, Local, PerHead, Power, Random, SparseAttention, Stride, Window, build_layout, merge
from tests.support import assert_close, dense_mask, eager, oracle

S2 = Local(2, 16) | Stride(4, block=16)


def tensors(n, m=None, heads=4, kv_heads=2, dim=32, dim_v=None, batch=1):
    torch.manual_seed(0)
    m = n if m is None else m
    sizes = ((n, heads, dim), (m, kv_heads, dim), (m, kv_heads, dim_v or dim))
    return [torch.randn(batch, *size, requires_grad=True) for size in sizes]


def check(got, x, mask):
    """Out and gradients against the oracle."""
    dout = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    values = [got, *torch.autograd.grad(got, x, dout)]
    sets = []
    for function in (eager, oracle):
        out = function(*x, mask)[0]
        sets.append([out, *torch.autograd.grad(out, x, dout.to(out.dtype))])
    for name, value, plain, exact in zip(("out", "dq", "dk", "dv"), values, *sets, strict=True):
        assert_close(name, value, plain, exact.double(), terms=1.0 if name == "out" else 4.0)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_training_with_grouped_heads_reads_the_right_kv_head(kv_heads):
    x = tensors(100, heads=8, kv_heads=kv_heads)
    check(s2attn.attention(*x, S2), x, dense_mask(S2, 8, kv_heads, 100, 100))


@pytest.mark.parametrize("pattern", [Power(block=16), Random(2, block=16), Local(1, 16) | Stride(3, block=16) & Window(120)], ids=repr)
def test_merged_query_blocks_are_exact_for_patterns_that_come_back(pattern):
    x = tensors(400)
    check(s2attn.attention(*x, pattern), x, dense_mask(pattern, 4, 2, 400, 400))


def test_a_causal_pattern_with_future_blocks_does_not_leak():
    everything = Blocks(torch.ones(8, 8, dtype=torch.bool), block=16)
    q, k, v = tensors(128)
    out = s2attn.attention(q, k, v, everything)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[:, 64:], v2[:, 64:] = 9.0, -9.0
    assert torch.equal(s2attn.attention(q, k2, v2, everything)[:, :64], out[:, :64])
    assert bool(build_layout(everything, 4, 2, 128).validate().causal)
    with pytest.raises(ValueError, match="causal must be left out or False"):
        s2attn.attention(q, k, v, Layout.from_dense(torch.ones(128, 128, dtype=torch.bool)), causal=True)


@pytest.mark.parametrize("dim", [16, 48, 80, 96, 112, 160, 192, 256])
def test_head_widths(dim):
    x = tensors(70, dim=dim, dim_v=dim // 2 if dim == 96 else None)
    check(s2attn.attention(*x, S2), x, dense_mask(S2, 4, 2, 70, 70))
    flat = [t[0].detach().requires_grad_() for t in x]
    cu = torch.tensor([0, 31, 70])
    mask = torch.zeros(4, 70, 70, dtype=torch.bool)
    for lo, hi in ((0, 31), (31, 70)):
        mask[:, lo:hi, lo:hi] = dense_mask(S2, 4, 2, hi - lo, hi - lo)
    out = s2attn.attention(*flat, S2, cu_seqlens_q=cu, cu_seqlens_k=cu)
    exact = oracle(*(t[None] for t in flat), mask)[0][0]
    assert_close("out", out, eager(*(t[None] for t in flat), mask)[0][0], exact)
    for got, want in zip(torch.autograd.grad(out.sum(), flat), torch.autograd.grad(exact.sum(), flat), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_gradient_of_lse():
    x = tensors(90)
    lse = s2attn.attention(*x, S2, return_lse=True)[1]
    weight = torch.randn(lse.shape)
    exact = oracle(*x, dense_mask(S2, 4, 2, 90, 90))[1]
    got = torch.autograd.grad((lse * weight).sum(), x)
    want = torch.autograd.grad((exact * weight).sum(), x, allow_unused=True)
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-4)
    assert not got[2].any(), "lse does not depend on v"


@pytest.mark.parametrize("dim_v", [16, 48])
def test_merging_partial_results_of_any_width(dim_v):
    x = tensors(90, dim_v=dim_v)
    near, far = s2attn.ByRange([(0, 30, Dense())]), s2attn.ByRange([(30, None, Dense())])
    out, lse = merge([s2attn.attention(*x, part, return_lse=True) for part in (near, far)])
    whole = s2attn.attention(*x, Dense(), return_lse=True)
    torch.testing.assert_close((out, lse), whole, atol=1e-5, rtol=1e-5)


def test_lse_without_gradients():
    with torch.no_grad():
        out, lse = s2attn.attention(*tensors(50), S2, return_lse=True)
    assert out.shape == (1, 50, 4, 32) and lse.shape == (1, 4, 50)


@pytest.mark.parametrize(("past", "chunk"), [(1, 5), (17, 40), (63, 65), (100, 1), (37, 91)])
def test_query_chunks_with_any_past(past, chunk):
    x = tensors(chunk, past + chunk)
    out = s2attn.attention(*x, S2)
    check(out, x, dense_mask(S2, 4, 2, past + chunk, past + chunk)[:, past:])


@pytest.mark.parametrize("n", [1, 15, 63, 65, 130])
def test_lengths_need_not_be_multiples_of_anything_when_not_causal(n):
    x = tensors(n)
    check(s2attn.attention(*x, S2, causal=False), x, dense_mask(S2, 4, 2, n, n, causal=False))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_row_that_sees_nothing_gives_zero_and_its_gradients_are_zero(backend):
    pattern = Stride(4, offset=1, block=16)  # the first 48 tokens see no block at all
    q, k, v = tensors(100, heads=2)
    out, lse = s2attn.attention(q, k, v, pattern, return_lse=True, backend=backend)
    assert not out[:, :48].any() and bool((lse[:, :, :48] == -torch.inf).all())
    assert bool(torch.isfinite(lse[:, :, 48:]).all())
    other = s2attn.attention(q, k, v, Window(3), return_lse=True, backend=backend)
    merged = merge([(out, lse), other])[0]
    torch.testing.assert_close(merged[:, :48], other[0][:, :48])
    dq, dk, dv = torch.autograd.grad(merged.sum() + lse[:, :, 48:].sum(), (q, k, v))
    assert all(bool(torch.isfinite(g).all()) for g in (dq, dk, dv))
    (alone,) = torch.autograd.grad(s2attn.attention(q, k, v, pattern, backend=backend).sum(), q)
    assert not alone[:, :48].any()


def test_layers_do_not_share_state():
    x = [t.detach() for t in tensors(160)]
    one, two = SparseAttention(S2, 4, 2, layer=0), SparseAttention(S2, 4, 2, layer=1, scale=0.5)
    first = one(*x)
    two(*x)
    assert torch.equal(one(*x), first)


def test_a_stripe_per_kv_head_covers_what_the_heads_can_cover():
    # 32 query heads, 8 KV heads, stride 16: one layer cannot cover all, two layers must.
    covered = set()
    for layer, expected in ((0, 8), (1, 16)):
        mask = dense_mask(Stride(16, block=16), 32, 8, 1, 1024, layer=layer)
        covered |= set((mask.any(dim=0)[0].nonzero().flatten() // 16 % 16).tolist())
        assert len(covered) == expected


def test_offsets_beyond_32_bits():
    far = 2**30  # three tokens lie 2**31 elements apart; untouched pages cost no memory
    storage = torch.empty(2 * far + 64, dtype=torch.float16)
    k = storage.as_strided((1, 3, 1, 16), (0, far, 16, 1))
    v = storage.as_strided((1, 3, 1, 16), (0, far, 16, 1), 32)
    k.copy_(torch.randn(1, 3, 1, 16))
    v.copy_(torch.randn(1, 3, 1, 16))
    q = torch.randn(1, 3, 1, 16).half()
    torch.testing.assert_close(s2attn.attention(q, k, v, Dense()), s2attn.attention(q, k.contiguous(), v.contiguous(), Dense()))


def test_one_dense_head_does_not_widen_the_others():
    one_dense = PerHead({0: Dense()}, default=Local(4))
    layout = build_layout(one_dense, 32, 32, 131072)
    dense_blocks = 2048 * 2049 // 2
    assert layout.rows.idx.numel() < dense_blocks + 4 * 2048 + 1, "31 equal heads share one list"
    assert layout.nbytes < 4 * (dense_blocks + 5 * 2048) + 32 * 2049 * 24


def test_building_needs_memory_for_the_lists_and_no_more():
    tracemalloc.start()
    layout = build_layout(Local(64, 16) | Stride(32, block=16), 8, 8, 131072, block=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * layout.nbytes + (32 << 20)


def test_packed_sequences_train():
    x = [t[0].detach().requires_grad_() for t in tensors(100)]
    cu = torch.tensor([0, 33, 33, 100], dtype=torch.int32)
    alone = []
    for lo, hi in ((0, 33), (33, 100)):
        alone.append(s2attn.attention(*(t[None, lo:hi] for t in x), S2)[0])
    together = s2attn.attention(*x, S2, cu_seqlens_q=cu, cu_seqlens_k=cu)
    dout = torch.randn(together.shape)
    want = torch.autograd.grad(torch.cat(alone), x, dout)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(together, x, dout), want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
