"""Autocast casts before dtypes are checked, as in torch's own attention: rotary embeddings leave q and k in float32."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import s2attn
from s2attn import Dense, Local, SparseAttention, Stride, Window, XAttention
from s2attn.ops import antidiagonal, bound_mass, last_queries, mean_pool
from s2attn.ops.store import store_kv
from s2attn.selectors import hyper_attention

S2 = Local(1) | Stride(2)
under_autocast = partial(torch.autocast, "cpu", torch.bfloat16)


def mixed(tokens: int = 130, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q and k in float32, v in bfloat16, with gradients."""
    q, k, v = (torch.randn(2, tokens, h, 16) for h in (heads, kv_heads, kv_heads))
    return q.requires_grad_(), k.requires_grad_(), v.bfloat16().requires_grad_()


def calls():
    layer = SparseAttention(S2, num_heads=4, num_kv_heads=2)
    layout = s2attn.build_layout(S2, num_heads=4, num_kv_heads=2, seqlen_q=130)
    hyper = partial(hyper_attention, block=32, samples=16, min_seqlen=64)
    return {
        "attention": lambda q, k, v: s2attn.attention(q, k, v, S2),
        "layout": lambda q, k, v: s2attn.attention(q, k, v, layout),
        "selector": lambda q, k, v: s2attn.attention(q, k, v, XAttention(stride=8, block=32)),
        "module": layer,
        "hyper": hyper,
        "hyper, weighted": partial(hyper, sampling="value_norm"),
    }


@pytest.mark.parametrize("name", calls())
def test_mixed_dtypes_are_cast_forward_and_backward(name):
    call, (q, k, v) = calls()[name], mixed()
    with under_autocast():
        out = call(q, k, v)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    if not name.startswith("hyper"):  # its buckets come from the tensors as they were given
        expected = call(*half)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        expected.float().square().sum().backward()
        for given, alone in zip((q, k, v), half, strict=True):
            torch.testing.assert_close(given.grad, alone.grad.to(given.dtype), rtol=0, atol=0)
    for x in (q, k, v):
        assert x.grad.dtype == x.dtype and bool(x.grad.isfinite().all()) and bool(x.grad.any())


def test_packed_tensors_are_cast():
    (q, k, v), cu = mixed(), torch.tensor([0, 30, 130])
    with under_autocast():
        out = s2attn.attention(q[0], k[0], v[0], S2, cu_seqlens_q=cu, cu_seqlens_k=cu)
    half = (x[0].bfloat16() for x in (q, k, v))
    assert torch.equal(out, s2attn.attention(*half, S2, cu_seqlens_q=cu, cu_seqlens_k=cu))


@pytest.mark.parametrize("name", calls())
def test_mixed_dtypes_are_refused_without_autocast(name):
    with pytest.raises(TypeError, match=r"v must have the dtype of q, torch\.float32; got torch\.bfloat16"):
        calls()[name](*mixed())


def test_float64_is_left_alone():
    q, k, v = (x.detach().double() for x in mixed())
    with under_autocast():
        assert s2attn.attention(q, k, v, S2).dtype == torch.float64
        with pytest.raises(TypeError, match=r"k must have the dtype of q, torch\.float64"):
            s2attn.attention(q, k.float(), v, S2)


def test_integers_are_refused_as_without_autocast():
    q, k, v = mixed()
    with under_autocast(), pytest.raises(TypeError, match="v must have a floating point dtype"):
        s2attn.attention(q, k, v.int(), S2)


SCORES = {
    "antidiagonal": partial(antidiagonal, stride=8, block=16),
    "means": partial(mean_pool, block=16),
    "bounds": partial(bound_mass, block=16),
    "lines": lambda q, k: last_queries(q, k, n=8).vertical,
    "layout": lambda q, k: XAttention(stride=8, block=32).layout(q, k).rows.idx,
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_the_cast_tensors(name):
    q, k, _ = (x.detach() for x in mixed())
    with pytest.raises(TypeError, match="k must have the dtype of q"):
        SCORES[name](q, k.bfloat16())
    with under_autocast():
        score = SCORES[name](q, k.bfloat16())
    assert torch.equal(score, SCORES[name](q.bfloat16(), k.bfloat16()))


def pages(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    k_pages, v_pages = torch.randn(2, 5, 32, 2, 16).to(dtype)
    where = {"block_table": torch.tensor([[3, 1], [0, 4]]), "seq_lens": torch.tensor([50, 33])}
    return k_pages, v_pages, where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_decode_casts_queries_to_the_pages(dtype, given):
    k_pages, v_pages, where = pages(dtype)
    q = torch.randn(2, 1, 4, 16).to(given)
    expected = s2attn.decode(q.to(dtype), k_pages, v_pages, Window(40), **where)
    with under_autocast():
        out = s2attn.decode(q, k_pages, v_pages, Window(40), **where)
        shared = s2attn.decode_cascade(q, k_pages, v_pages, Window(40), **where)
    assert torch.equal(out, expected)
    torch.testing.assert_close(shared, expected)


def test_decode_refuses_other_dtypes_without_autocast():
    k_pages, v_pages, where = pages(torch.bfloat16)
    with pytest.raises(TypeError, match="k_pages must have the dtype of q"):
        s2attn.decode(torch.randn(2, 1, 4, 16), k_pages, v_pages, Window(40), **where)


def test_stored_keys_are_cast_to_the_pages():
    k_pages, v_pages = torch.zeros(2, 2, 16, 1, 8).bfloat16()
    k, v, slots = torch.randn(3, 1, 8), torch.randn(3, 1, 8).bfloat16(), torch.tensor([1, 17, 2])
    with pytest.raises(TypeError, match="k must have the dtype of its pages"):
        store_kv(k, v, k_pages, v_pages, slots)
    with under_autocast():
        store_kv(k, v, k_pages, v_pages, slots)
    assert torch.equal(k_pages.flatten(0, 1)[slots], k.bfloat16())
    assert torch.equal(v_pages.flatten(0, 1)[slots], v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_through_a_cache_casts_to_its_pages(dtype):
    shape = {"num_kv_heads": 2, "num_heads": 4, "head_dim": 16, "dtype": dtype}
    cache = s2attn.SparseCache(Dense(), num_pages=16, max_tokens=64, **shape)
    layer, (q, k, v) = SparseAttention(Dense(), num_heads=4, num_kv_heads=2), mixed(tokens=20)
    sequence = cache.open()
    with torch.no_grad(), under_autocast(), cache.step([sequence], torch.zeros(1, 20, dtype=torch.int64)):
        out = layer(q[:1], k[:1], v[:1])
    half = [x[:1].detach().bfloat16() for x in (q, k, v)]
    expected = s2attn.attention(*(x.float() for x in half), Dense())
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_graphs_cast_too():
    q, k, v = mixed()
    call = torch.compile(lambda q, k, v: s2attn.attention(q, k, v, S2), backend="aot_eager", fullgraph=True)
    with under_autocast():
        out, expected = call(q, k, v), s2attn.attention(q, k, v, S2)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and v.grad.dtype == torch.bfloat16
