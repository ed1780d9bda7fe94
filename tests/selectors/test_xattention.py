"""XAttention: the sets of an independent implementation, exact attention on them, and what public code gets wrong."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

import s2attn
from s2attn import HeadRange, XAttention
from s2attn.selectors import Call
from s2attn.testing import assert_close, eager, oracle


def tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, dim=16, dtype=torch.float32):
    """Keys of blocks of 16 tokens share a direction, so that some blocks weigh much more than others."""
    theme = torch.randn(batch, -(-seqlen_k // 16), kv_heads, dim).repeat_interleave(16, 1)[:, :seqlen_k]
    k = 2 * theme + 0.5 * torch.randn(batch, seqlen_k, kv_heads, dim)
    q = 2 * torch.randn(batch, -(-seqlen_q // 16), heads, dim).repeat_interleave(16, 1)[:, :seqlen_q]
    return [x.to(dtype).requires_grad_() for x in (q, k, torch.randn(batch, seqlen_k, kv_heads, dim))]


def chosen_by_hand(q, k, stride, block, threshold, causal=True):
    """bool (B, H, T, S) of tokens: the published procedure for aligned lengths, one row of blocks after another, in float64."""
    (batch, t, heads, dim), s, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    mask = torch.zeros(batch, heads, t, s, dtype=torch.bool)
    shift, per = (s - t) // stride, block // stride
    for b in range(batch):
        for h in range(heads):
            turned = q[b, :, h].double().view(t // stride, stride, dim).flip(1).reshape(t // stride, -1)
            logits = turned @ k[b, :, h // group].double().reshape(s // stride, -1).T / (math.sqrt(dim) * stride)
            if causal:
                logits = logits.masked_fill(torch.ones_like(logits).triu(shift + 1).bool(), -torch.inf)
            blocks = torch.softmax(logits, -1).view(t // block, per, s // block, per).sum((1, 3))
            for r, row in enumerate(blocks.tolist()):
                own = r + (s - t) // block
                kept = {0, own}
                held = sum(row[j] for j in kept)
                for j in sorted(set(range(len(row))) - kept, key=lambda j, row=row: -row[j]):
                    if held >= threshold * sum(row) or not row[j]:
                        break
                    kept.add(j)
                    held += row[j]
                for j in kept:
                    mask[b, h, r * block : (r + 1) * block, j * block : (j + 1) * block] = True
    return mask.tril(s - t) if causal else mask


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize(("lengths", "causal"), [((192, 192), True), ((64, 192), True), ((192, 192), False), ((64, 128), False)])
def test_sets_and_results_equal_those_of_an_independent_implementation(stride, lengths, causal):
    q, k, v = tensors(2, *lengths, 4, 2)
    selector = XAttention(stride, 0.8, block=32)
    mask = chosen_by_hand(q.detach(), k.detach(), stride, 32, 0.8, causal)
    assert not torch.equal(mask[0], mask[1])  # a choice for every sample, not the union over the batch
    dense = selector.layout(q, k, causal=causal).validate().to_dense()
    t, s = lengths
    for b in range(2):
        assert torch.equal(dense[:, b * t : (b + 1) * t, b * s : (b + 1) * s], mask[b])
    out, lse = s2attn.attention(q, k, v, selector, causal=causal, return_lse=True)
    compare(out, lse, q, k, v, mask)


def compare(out, lse, q, k, v, mask):
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))]
    sets = []
    for function in (eager, oracle):
        o, x = function(q, k, v, mask)
        sets.append([o, x, *torch.autograd.grad((o, x), (q, k, v), (dout.to(o.dtype), dlse.to(x.dtype)))])
    for name, value, plain, exact in zip(("out", "lse", "dq", "dk", "dv"), got, *sets, strict=True):
        assert_close(name, value, plain, exact.double(), terms=1.0 if name in ("out", "lse") else 8.0)


@pytest.mark.parametrize("seqlen", [(77, 77), (33, 90), (1, 65), (300, 300)])
@pytest.mark.parametrize("share", ["none", "union", "mean", "majority"])
def test_any_length_and_sharing(seqlen, share):
    q, k, v = tensors(3, *seqlen, 4, 2)
    selector = XAttention(8, 0.7, block=32, share=share)
    masks = []
    for b in range(3):
        layout = selector.layout(q[b : b + 1], k[b : b + 1])
        assert not layout.packed and layout.heads == (4 if share == "none" else 2)
        masks.append(layout.validate().to_dense().repeat_interleave(4 // layout.heads, 0))
    out, lse = s2attn.attention(q, k, v, selector, return_lse=True)
    compare(out, lse, q, k, v, torch.stack(masks))


def test_packed_sequences_choose_on_their_own():
    lengths = [(40, 40), (0, 7), (130, 130), (5, 90)]
    parts = [tensors(1, t, s, 4, 2) for t, s in lengths]
    q, k, v = (torch.cat([part[i][0].detach() for part in parts]) for i in range(3))
    cu_q, cu_k = (torch.tensor([0, *torch.tensor([pair[i] for pair in lengths]).cumsum(0).tolist()]) for i in range(2))
    selector = XAttention(4, 0.6, block=16)
    out, lse = s2attn.attention(q, k, v, selector, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    alone = [s2attn.attention(*part, selector, return_lse=True) for part in parts]
    torch.testing.assert_close(out, torch.cat([o[0] for o, _ in alone]), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, torch.cat([x[0] for _, x in alone], dim=-1), atol=2e-6, rtol=1e-5)


def test_the_first_column_is_kept_not_the_first_row():
    q, k, _ = tensors(1, 256, 256, 2, 2)
    blocks = XAttention(8, 0.01, block=32).choose(q.detach(), k.detach(), Call())
    assert bool(blocks[..., 0].all())
    assert bool(torch.diagonal(blocks, dim1=2, dim2=3).all())
    bare = XAttention(8, 0.01, block=32, forced=()).choose(q.detach(), k.detach(), Call())
    assert bare.sum(-1).unique().tolist() == [1]


def test_the_diagonal_of_an_unaligned_chunk_is_both_blocks_that_it_lies_in():
    q, k, _ = tensors(1, 32, 75, 1, 1)
    blocks = XAttention(8, 0.01, block=32, forced=("diagonal",)).choose(q.detach(), k.detach(), Call())
    assert blocks[0, 0].tolist() == [[False, True, True]]


def test_chunks_choose_what_the_whole_chooses():
    q, k, _ = tensors(1, 256, 256, 2, 1)
    selector = XAttention(8, 0.8, block=32)
    whole = selector.layout(q, k).to_dense()
    for at in range(0, 256, 64):
        part = selector.layout(q[:, at : at + 64], k[:, : at + 64]).to_dense()
        assert torch.equal(part, whole[:, at : at + 64, : at + 64])


def test_repeated_keys_choose_the_same():
    q, k, _ = tensors(2, 160, 160, 4, 2)
    selector = XAttention(4, 0.8, block=16)
    assert torch.equal(selector.layout(q, k).to_dense(), selector.layout(q, k.repeat_interleave(2, 2)).to_dense())


def test_full_threshold_of_plain_noise_is_dense_attention():
    q, k, v = (torch.randn(2, 130, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    out = s2attn.attention(q, k, v, XAttention(8, 1.0, block=32))
    torch.testing.assert_close(out, s2attn.attention(q, k, v, s2attn.Dense()), atol=2e-6, rtol=1e-5)


def test_a_table_of_threshold_by_layer_and_head():
    q, k, v = tensors(1, 256, 256, 2, 1)
    table = [[0.3, 0.9], [0.9, 0.3]]
    selector = XAttention(8, table, block=32)
    rows = {c: XAttention(8, c, block=32).layout(q, k).to_dense() for c in (0.3, 0.9)}
    for layer in range(2):
        dense = selector.layout(q, k, layer=layer).to_dense()
        assert all(torch.equal(dense[h], rows[table[layer][h]][h]) for h in range(2))
    assert not torch.equal(s2attn.attention(q, k, v, selector, layer=0), s2attn.attention(q, k, v, selector, layer=1))
    assert hash(selector) == hash(XAttention(8, ((0.3, 0.9), (0.9, 0.3)), block=32))


def test_scale_and_softcap_reach_the_choice():
    q, k, v = tensors(1, 256, 256, 2, 1)
    selector = XAttention(8, 0.8, block=32)
    count = {
        name: int(selector.layout(q, k, **s).pairs.sum())
        for name, s in {"sharp": {"scale": 4.0}, "plain": {}, "flat": {"scale": 0.01}}.items()
    }
    assert count["sharp"] < count["plain"] < count["flat"]
    assert int(selector.layout(q, k, softcap=0.01).pairs.sum()) == pytest.approx(count["flat"], rel=0.1)
    out = s2attn.attention(q, k, v, selector, scale=4.0, softcap=3.0)
    layout = selector.layout(q, k, scale=4.0, softcap=3.0)
    assert torch.equal(out, s2attn.attention(q, k, v, layout, scale=4.0, softcap=3.0))


def test_sinks_join_the_denominator():
    q, k, v = tensors(2, 96, 96, 4, 2)
    sinks, selector = torch.randn(4), XAttention(8, 0.6, block=32)
    out = s2attn.attention(q, k, v, selector, sinks=sinks)
    alone = [s2attn.attention(q[b, None], k[b, None], v[b, None], selector.layout(q[b, None], k[b, None]), sinks=sinks) for b in range(2)]
    torch.testing.assert_close(out, torch.cat(alone), atol=2e-6, rtol=1e-5)


def test_gradients_in_float64():
    q, k, v = tensors(2, 9, 21, 2, 1, 3, torch.float64)
    selector = XAttention(4, 0.6, block=16)
    assert torch.autograd.gradcheck(lambda *x: s2attn.attention(*x, selector, return_lse=True), (q, k, v))


def test_a_nan_in_a_key_is_not_hidden_by_leaving_it_out():
    q, k, v = (x.detach() for x in tensors(1, 128, 128, 1, 1))
    k[0, 40] = torch.nan
    out = s2attn.attention(q, k, v, XAttention(8, 0.1, block=16))
    assert bool(out[0, 40:].isnan().all()) and bool(out[0, :32].isfinite().all())


def test_the_layout_lives_as_long_as_a_backward_may_come():
    q, k, v = tensors(1, 64, 64, 2, 1)
    kept = []

    class Watched(XAttention):
        def layout(self, *args, **settings):
            layout = super().layout(*args, **settings)
            kept.append(weakref.ref(layout))
            return layout

    out = s2attn.attention(q, k, v, Watched(8, block=32))
    gc.collect()
    assert kept[0]() is not None
    del out
    gc.collect()
    assert kept[0]() is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, where a graph breaks
def test_compiled_calls_break_their_graph_and_give_the_same():
    q, k, v = tensors(2, 96, 96, 4, 2)
    selector = XAttention(8, 0.6, block=32)
    compiled = torch.compile(lambda q, k, v: 2 * s2attn.attention(q + 0, k, v, selector), backend="eager")
    torch.testing.assert_close(compiled(q, k, v), 2 * s2attn.attention(q, k, v, selector))
    got = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(2 * s2attn.attention(q, k, v, selector).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_chooses_from_what_attention_sees():
    q, k, v = (x.detach() for x in tensors(1, 256, 256, 2, 1))
    selector = XAttention(8, 0.7, block=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = s2attn.attention(q, k, v, selector)
    assert torch.equal(out, s2attn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), selector))


def test_calls_without_anything_to_choose():
    selector = XAttention(8, block=32)
    for batch, t, s in ((2, 0, 5), (2, 5, 0), (0, 5, 5)):
        out, lse = s2attn.attention(torch.ones(batch, t, 4, 8), *(torch.ones(batch, s, 2, 8),) * 2, selector, return_lse=True)
        assert out.shape == (batch, t, 4, 8) and lse.shape == (batch, 4, t)
        assert not out.any() and bool((lse == -torch.inf).all())


def test_queries_before_all_keys_give_zero():
    q, k, v = tensors(1, 100, 40, 2, 1)
    out, lse = s2attn.attention(q, k, v, XAttention(8, block=16), return_lse=True)
    assert not out[:, :60].any() and bool((lse[..., :60] == -torch.inf).all()) and bool(lse[..., 60:].isfinite().all())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: XAttention(stride=0), ValueError, "stride must be an integer >= 1; got 0"),
        (lambda: XAttention(stride=24), ValueError, r"stride must divide block \(128\); got 24"),
        (lambda: XAttention(threshold=0), ValueError, r"threshold must be in \(0, 1\]; got 0"),
        (lambda: XAttention(threshold=1.5), ValueError, r"threshold must be in \(0, 1\]; got 1.5"),
        (lambda: XAttention(threshold=[[0.5, 2]]), ValueError, r"threshold must be in \(0, 1\]; got 2"),
        (lambda: XAttention(threshold=[0.5]), TypeError, "threshold must be a number, or a table"),
        (lambda: XAttention(threshold=[]), ValueError, "at least one layer"),
        (lambda: XAttention(block=100), ValueError, "block must be one of"),
        (lambda: XAttention(forced=("row",)), ValueError, "forced must be a tuple of names among"),
        (lambda: XAttention(forced=("sink", "sink")), ValueError, "each once"),
        (lambda: XAttention(share="some"), ValueError, "share must be one of none, union, mean, majority; got 'some'"),
    ],
)
def test_bad_selectors(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"block": 64}, "block and heads must be left out when a selector is given"),
        ({"layer": -1}, "layer must be an integer >= 0; got -1"),
        ({"layer": 2}, "threshold must have a row for layer 2: is it the table of another model"),
        ({"layer": 1}, "threshold must have a number for each of the 4 query heads in layer 1: is it the table of another model"),
        ({"scale": math.nan}, "scale must be finite"),
    ],
)
def test_bad_calls(settings_, words):
    q, k, v = tensors(1, 32, 32, 4, 2)
    with pytest.raises(ValueError, match=words):
        s2attn.attention(q, k, v, XAttention(threshold=[[0.5] * 4, [0.5] * 8]), **settings_)


def test_the_module_takes_a_selector():
    q, k, v = (torch.randn(1, 128, heads, 16) for heads in (4, 2, 2))
    selector = XAttention(8, 0.7, block=32)
    assert torch.equal(s2attn.SparseAttention(selector, 4, 2)(q, k, v), s2attn.attention(q, k, v, selector))
    with pytest.raises(ValueError, match="heads must be left out when a selector is given"):
        s2attn.SparseAttention(selector, 4, 2, heads=HeadRange(0, 4, 8, 4))
