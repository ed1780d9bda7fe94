"""The op against the float64 oracle, and against FlexAttention, over patterns, lengths, groups and packings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s2attn
from s2attn import Blocks, Dense, HeadRange, Local, PerHead, Power, Sink, Stride, Window, build_layout
from s2attn.testing import assert_close, dense_mask, eager, oracle
from s2attn.testing.strategies import CallShape, call_shapes, patterns

S2 = Local(2, 16) | Stride(3, block=16)


def tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, dim=16, dim_v=None, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    sizes = ((seqlen_q, heads, dim), (seqlen_k, kv_heads, dim), (seqlen_k, kv_heads, dim_v or dim))
    return [torch.randn(batch, *size, generator=rng, dtype=torch.float32).to(dtype).requires_grad_() for size in sizes]


def compare(result, q, k, v, mask, scale=None):
    """Out, lse and all gradients, with cotangents for both results, against eager and exact code."""
    out, lse = result
    rng = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=rng).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=rng).to(lse.dtype)
    dlse = torch.where(mask.any(dim=-1).expand(lse.shape), dlse, torch.zeros_like(dlse))
    got = [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))]
    sets = []
    for function in (eager, oracle):
        o, x = function(q, k, v, mask, scale)
        safe = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
        sets.append([o, x, *torch.autograd.grad((o, safe), (q, k, v), (dout.to(o.dtype), dlse.to(x.dtype)))])
    for name, value, plain, exact in zip(("out", "lse", "dq", "dk", "dv"), got, *sets, strict=True):
        # dP and delta are sums of up to 24 products, about 4 in size, and cancel where a row sees one key.
        assert_close(name, value, plain, exact.double(), terms=1.0 if name in ("out", "lse") else 4.0)


@settings(max_examples=40)
@given(patterns(), call_shapes(200), st.sampled_from([16, 40]), st.sampled_from([16, 24]), st.sampled_from(["torch", "reference"]))
def test_random_calls(pattern, shape: CallShape, dim, dim_v, backend):
    q, k, v = tensors(2, shape.seqlen_q, shape.seqlen_k, shape.num_heads, shape.num_kv_heads, dim, dim_v)
    mask = dense_mask(pattern, shape.num_heads, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k, causal=shape.causal, layer=shape.layer)
    result = s2attn.attention(q, k, v, pattern, causal=shape.causal, layer=shape.layer, block=shape.block, return_lse=True, backend=backend)
    compare(result, q, k, v, mask)


@settings(max_examples=15)
@given(patterns(), call_shapes(120), st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), min_size=1, max_size=4))
def test_packed_sequences_do_not_see_each_other(pattern, shape: CallShape, lengths):
    total_q, total_k = sum(q for q, _ in lengths), sum(k for _, k in lengths)
    cu_q = torch.tensor([0, *torch.tensor([q for q, _ in lengths]).cumsum(0).tolist()], dtype=torch.int32)
    cu_k = torch.tensor([0, *torch.tensor([k for _, k in lengths]).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (t[0].detach().requires_grad_() for t in tensors(1, total_q, total_k, shape.num_heads, shape.num_kv_heads))
    mask = torch.zeros(shape.num_heads, total_q, total_k, dtype=torch.bool)
    for i, (n, m) in enumerate(lengths):
        if n and m:
            mask[:, cu_q[i] : cu_q[i + 1], cu_k[i] : cu_k[i + 1]] = dense_mask(
                pattern, shape.num_heads, shape.num_kv_heads, n, m, causal=shape.causal
            )
    out, lse = s2attn.attention(q, k, v, pattern, causal=shape.causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    if total_q and total_k:
        _compare_packed(out, lse, q, k, v, mask)
    else:
        assert not out.any() and bool((lse == -torch.inf).all())


def _compare_packed(out, lse, q, k, v, mask):
    exact, exact_lse = oracle(q[None], k[None], v[None], mask)
    plain, plain_lse = eager(q[None], k[None], v[None], mask)
    assert_close("out", out, plain[0], exact[0])
    assert_close("lse", lse, plain_lse[0], exact_lse[0])
    rng = torch.Generator().manual_seed(2)
    dout = torch.randn(out.shape, generator=rng)
    got = torch.autograd.grad(out, (q, k, v), dout)
    sets = [torch.autograd.grad(o, (q, k, v), dout[None].to(o.dtype)) for o in (plain, exact)]
    for name, value, eager_value, exact_value in zip(("dq", "dk", "dv"), got, *sets, strict=True):
        assert_close(name, value, eager_value, exact_value.double(), terms=4.0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "pattern", [S2, Sink(5) | Window(40), Power(block=16), Dense(), PerHead({0: Dense()}, default=Window(9))], ids=repr
)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_flex_attention(pattern, causal):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = tensors(1, 200, 200, 4, 2, 16)
    mask = dense_mask(pattern, 4, 2, 200, 200, causal=causal)
    block_mask = create_block_mask(lambda b, h, i, j: mask[h, i, j], 1, 4, 200, 200, device="cpu", BLOCK_SIZE=64)
    q_h, k_h, v_h = (t.detach().transpose(1, 2) for t in (q, k, v))
    flex = flex_attention(q_h, k_h, v_h, block_mask=block_mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(s2attn.attention(q, k, v, pattern, causal=causal), flex, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    q, k, v = tensors(2, 150, 150, 4, 2, 32, dtype=dtype)
    out, lse = s2attn.attention(q, k, v, S2, return_lse=True)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mask = dense_mask(S2, 4, 2, 150, 150)
    exact, exact_lse = oracle(q, k, v, mask)
    plain, plain_lse = eager(q, k, v, mask)
    assert_close("out", out, plain, exact)
    assert_close("lse", lse, plain_lse, exact_lse)


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0, 1])
def test_scale(scale):
    q, k, v = tensors(1, 100, 100, 2, 2)
    compare(s2attn.attention(q, k, v, S2, scale=scale, return_lse=True), q, k, v, dense_mask(S2, 2, 2, 100, 100), scale)


def test_gradcheck_in_float64():
    q, k, v = tensors(1, 20, 33, 4, 2, 4, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: s2attn.attention(*x, Local(1, 16) | Sink(3), return_lse=True), (q, k, v))


def test_any_strides():
    q, k, v = tensors(2, 90, 90, 4, 2)
    straight = s2attn.attention(q, k, v, S2)
    turned = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    wide = [torch.randn(*t.shape[:-1], 2 * t.shape[-1]) for t in (q, k, v)]
    for big, t in zip(wide, (q, k, v), strict=True):
        big[..., ::2] = t.detach()
    for other in (turned, [big[..., ::2] for big in wide], [q.detach(), k.detach().expand(2, -1, -1, -1), v.detach()]):
        torch.testing.assert_close(s2attn.attention(*other, S2), straight, atol=1e-6, rtol=1e-5)


def test_permuting_heads_permutes_results():
    masks = torch.rand(4, 6, 6) < 0.5
    masks[:, torch.arange(6), torch.arange(6)] = True
    q, k, v = tensors(1, 96, 96, 4, 4)
    order = torch.tensor([2, 0, 3, 1])
    out = s2attn.attention(q, k, v, Blocks(masks, 16))
    again = s2attn.attention(q[:, :, order], k[:, :, order], v[:, :, order], Blocks(masks[order], 16))
    torch.testing.assert_close(again, out[:, :, order], atol=1e-6, rtol=1e-6)


def test_a_chunk_of_queries_is_a_slice_of_the_whole():
    pattern = S2 | Power(block=16)
    q, k, v = tensors(1, 300, 300, 4, 2)
    whole = s2attn.attention(q, k, v, pattern)
    for lo, hi in ((0, 1), (0, 77), (33, 150), (299, 300), (150, 300)):
        part = s2attn.attention(q[:, lo:hi], k[:, :hi], v[:, :hi], pattern)
        torch.testing.assert_close(part, whole[:, lo:hi], atol=2e-6, rtol=1e-5)


def test_tensor_parallel_slices():
    pattern = S2 | PerHead({3: Window(70)}, default=Window(3))
    q, k, v = tensors(1, 128, 128, 8, 4)
    whole = s2attn.attention(q, k, v, pattern, layer=1)
    for rank in range(2):
        heads = HeadRange(4 * rank, 4 * rank + 4, 8, 4)
        part = s2attn.attention(
            q[:, :, 4 * rank : 4 * rank + 4],
            k[:, :, 2 * rank : 2 * rank + 2],
            v[:, :, 2 * rank : 2 * rank + 2],
            pattern,
            layer=1,
            heads=heads,
        )
        torch.testing.assert_close(part, whole[:, :, 4 * rank : 4 * rank + 4], atol=1e-6, rtol=1e-5)


def test_an_explicit_layout_gives_the_same():
    q, k, v = tensors(2, 130, 130, 4, 2)
    for block in (16, 32, 64, 128, 256):
        layout = build_layout(S2, 4, 2, 130, block=block)
        torch.testing.assert_close(s2attn.attention(q, k, v, layout), s2attn.attention(q, k, v, S2), atol=2e-6, rtol=1e-5)


def test_the_same_bits_every_time_and_in_every_batch():
    q, k, v = tensors(3, 200, 200, 4, 2)
    dout = torch.randn(3, 200, 4, 16)

    def run(rows):
        x = [t.detach()[rows].requires_grad_() for t in (q, k, v)]
        out, lse = s2attn.attention(*x, S2, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, x, dout[rows])]

    everything, again = run(slice(0, 3)), run(slice(0, 3))
    assert all(torch.equal(a, b) for a, b in zip(everything, again, strict=True))


def test_nothing_to_do():
    for batch, n, m in ((0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)):
        q, k, v = tensors(batch, n, m, 4, 2)
        out, lse = s2attn.attention(q, k, v, S2, return_lse=True)
        assert out.shape == (batch, n, 4, 16) and not out.any() and bool((lse == -torch.inf).all())
        out.sum().backward()
        assert not q.grad.any() and not k.grad.any()


def test_autocast_follows_torch():
    q, k, v = tensors(1, 64, 64, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = s2attn.attention(q, k, v, S2)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
