"""Layouts and FlexAttention's block masks: exact both ways, and the same attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from s2attn.core import Unsupported
from s2attn.layout import Layout, build_layout
from s2attn.layout.flex import from_block_mask, to_block_mask
from s2attn.patterns import ByRange, Dense, Local, PerHead, Sink, Stride, Window, preset
from tests.support import dense_mask
from tests.support.strategies import CallShape, call_shapes, patterns

PATTERNS = [
    Dense(),
    Sink(20) | Window(77),
    Local(2, 32) | Stride(3, block=32),
    Local(2, 32) | Stride(3, block=32, heads="query"),
    ByRange([(0, 50, Dense()), (90, None, Stride(2, block=32))]),
    PerHead({1: Window(1)}, default=Stride(2, offset=1, block=32)),
]


def flex_mask(block_mask: BlockMask, num_heads: int, queries: int, keys: int) -> torch.Tensor:
    return create_mask(block_mask.mask_mod, 1, num_heads, queries, keys, device="cpu")[0]


@settings(max_examples=20)
@given(patterns(), call_shapes(150))
def test_block_masks_are_exact_and_come_back(pattern, shape: CallShape):
    lengths = (shape.seqlen_q, shape.seqlen_k)
    layout = build_layout(pattern, shape.num_heads, shape.num_kv_heads, *lengths, block=shape.block, causal=shape.causal)
    block_mask = to_block_mask(layout, shape.num_heads)
    expected = dense_mask(pattern, shape.num_heads, shape.num_kv_heads, *lengths, causal=shape.causal)
    assert torch.equal(flex_mask(block_mask, shape.num_heads, *lengths), expected)
    assert (
        int(block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum()) == layout.rows.entries * shape.num_heads // layout.heads
    )
    again = from_block_mask(block_mask).validate()
    assert torch.equal(again.to_dense(), expected)
    assert again.rows.counts.sum() == layout.rows.entries * shape.num_heads // layout.heads
    assert again.causal or not layout.causal


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("lengths", [(160, 160), (100, 150)], ids=str)
def test_flex_attention_gives_the_same(pattern, lengths):
    queries, keys = lengths
    layout = build_layout(pattern, 4, 2, queries, keys, block=32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, dtype=torch.float64, generator=generator) for heads, n in ((4, queries), (2, keys), (2, keys)))
    got = flex_attention(q, k, v, block_mask=to_block_mask(layout, 4), enable_gqa=True)
    mask = dense_mask(pattern, 4, 2, queries, keys)
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4).masked_fill(~mask, float("-inf"))
    expected = scores.softmax(dim=-1).nan_to_num(0.0) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["s2", "power_attention", "streaming_llm", "bigbird"])
def test_presets_round_trip(name):
    layout = build_layout(preset(name), 4, 2, 600)
    again = from_block_mask(to_block_mask(layout))
    assert torch.equal(again.to_dense(), layout.to_dense())
    assert again.rows.idx.tolist() == lists_of_all_heads(layout)


def lists_of_all_heads(layout: Layout) -> list[int]:
    """The lists of all heads, head by head, whether or not they share storage."""
    return [block for h in range(layout.heads) for block in layout.rows.idx[layout.rows.ptr[h, 0] : layout.rows.ptr[h, -1]].tolist()]


def test_masks_of_others_are_read():
    document = torch.arange(300) // 110

    def within_documents(b, h, q, k):
        return (q >= k) & (document[q] == document[k]) & ((q - k < 50) | (h == 1))

    block_mask = create_block_mask(within_documents, None, 2, 300, 300, device="cpu", BLOCK_SIZE=32)
    layout = from_block_mask(block_mask).validate()
    assert layout.causal and layout.heads == 2 and layout.block == 32
    assert torch.equal(layout.to_dense(), create_mask(within_documents, 1, 2, 300, 300, device="cpu")[0])


def test_a_mask_that_broadcasts_over_heads_gives_one_head():
    block_mask = create_block_mask(lambda b, h, q, k: q - k < 40, None, None, 128, 200, device="cpu", BLOCK_SIZE=64)
    layout = from_block_mask(block_mask)
    assert layout.heads == 1 and not layout.causal
    assert torch.equal(layout.to_dense(0), create_mask(block_mask.mask_mod, 1, 1, 128, 200, device="cpu")[0, 0])


def test_mask_mod_is_asked_for_partial_blocks_only():
    layout = build_layout(Window(200), 1, 1, 1024, block=64)
    block_mask = to_block_mask(layout)
    asked, plain = [], block_mask.mask_mod

    def watched(b, h, q, k):
        asked.append(1)
        return plain(b, h, q, k)

    block_mask.mask_mod = watched
    assert torch.equal(from_block_mask(block_mask).to_dense(), layout.to_dense())
    assert len(asked) == 1  # all partial blocks together


def test_packed_layouts_have_no_block_mask():
    cu = torch.tensor([0, 50, 100])
    with pytest.raises(Unsupported, match=r"a packed layout cannot become a BlockMask\n  flex: blocks of packed sequences do not begin"):
        to_block_mask(build_layout(Dense(), 1, 1, cu_seqlens_q=cu, cu_seqlens_k=cu))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"num_heads must be a multiple of the layout's heads \(2\); got 3"):
        to_block_mask(build_layout(Dense(), 2, 2, 64), 3)
    with pytest.raises(TypeError, match=r"block_mask must be a BlockMask; got Tensor"):
        from_block_mask(torch.zeros(3))


def test_every_reason_is_named():
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, 2, 1, 256, 256, device="cpu", BLOCK_SIZE=(64, 128))
    with pytest.raises(Unsupported, match=r"must have batch 1; got 2; BLOCK_SIZE must be square and one of .*; got \(64, 128\)"):
        from_block_mask(block_mask)
