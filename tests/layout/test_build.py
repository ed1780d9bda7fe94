"""Built layouts say what patterns say, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from s2attn.layout import HeadRange, Layout, build_layout
from s2attn.patterns import PRESETS, Local, PerHead, Random, Recipe, Stride, Window, preset
from tests.support import dense_mask
from tests.support.strategies import CallShape, call_shapes, patterns


def expanded(layout: Layout, num_heads: int) -> torch.Tensor:
    return layout.to_dense().repeat_interleave(num_heads // layout.heads, dim=0)


@settings(max_examples=100)
@given(patterns(), call_shapes())
def test_layout_is_the_pattern(pattern, shape: CallShape):
    layout = build_layout(
        pattern,
        shape.num_heads,
        shape.num_kv_heads,
        shape.seqlen_q,
        shape.seqlen_k,
        block=shape.block,
        causal=shape.causal,
        layer=shape.layer,
    ).validate()
    mask = dense_mask(pattern, shape.num_heads, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k, causal=shape.causal, layer=shape.layer)
    assert torch.equal(expanded(layout, shape.num_heads), mask)
    assert layout.pairs.tolist() == layout.to_dense().sum(dim=(1, 2)).tolist()


@settings(max_examples=30)
@given(patterns(), call_shapes())
def test_columns_are_the_rows_turned(pattern, shape: CallShape):
    layout = build_layout(
        pattern, shape.num_heads, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k, block=shape.block, causal=shape.causal
    )
    turned = layout.columns
    for head in range(layout.heads):
        listed = {(r, c, t) for r in range(layout.rows.lines) for c, t in _line(layout.rows, head, r)}
        assert listed == {(r, c, t) for c in range(turned.lines) for r, t in _line(turned, head, c)}


def _line(index, head, line):
    full, partial = index.line(head, line)
    return [(block, -1) for block in full] + partial


@settings(max_examples=30)
@given(patterns(), call_shapes())
def test_transposing_twice_is_the_identity(pattern, shape: CallShape):
    from s2attn.layout.transpose import transpose_index

    layout = build_layout(
        pattern, shape.num_heads, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k, block=shape.block, causal=shape.causal
    )
    again = transpose_index(layout.columns, layout.rows.lines)
    for head in range(layout.heads):
        for line in range(again.lines):
            assert again.line(head, line) == layout.rows.line(head, line)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("causal", [True, False])
def test_presets(name, causal):
    made = preset(name)
    pattern = made.pattern(0) if isinstance(made, Recipe) else made
    layout = build_layout(pattern, 8, 4, 700, causal=causal).validate()
    assert torch.equal(expanded(layout, 8), dense_mask(pattern, 8, 4, 700, 700, causal=causal))


@settings(max_examples=20)
@given(patterns(), call_shapes(150), call_shapes(150))
def test_packed_sequences_are_separate(pattern, one: CallShape, two: CallShape):
    lengths = [(one.seqlen_q, one.seqlen_k), (0, 0), (two.seqlen_q, two.seqlen_k), (one.seqlen_q, one.seqlen_k), (3, 0)]
    cu_q = torch.tensor([0, *torch.tensor([q for q, _ in lengths]).cumsum(0).tolist()])
    cu_k = torch.tensor([0, *torch.tensor([k for _, k in lengths]).cumsum(0).tolist()])
    layout = build_layout(
        pattern, one.num_heads, one.num_kv_heads, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, block=one.block, causal=one.causal
    ).validate()
    expected = torch.zeros(one.num_heads, int(cu_q[-1]), int(cu_k[-1]), dtype=torch.bool)
    for i, (q, k) in enumerate(lengths):
        if q and k:
            mask = dense_mask(pattern, one.num_heads, one.num_kv_heads, q, k, causal=one.causal)
            expected[:, cu_q[i] : cu_q[i + 1], cu_k[i] : cu_k[i + 1]] = mask
    assert torch.equal(expanded(layout, one.num_heads), expected)


def test_equal_heads_share_storage():
    alone = build_layout(Window(100), 1, 1, 1000)
    shared = build_layout(Window(100), 8, 8, 1000)
    assert shared.rows.idx.numel() == alone.rows.idx.numel()
    assert shared.columns.idx.numel() == alone.columns.idx.numel()
    assert shared.rows.entries == 8 * alone.rows.entries


def test_a_layout_has_query_heads_only_when_the_pattern_tells_them_apart():
    assert build_layout(Local(2) | Stride(4), 8, 2, 512).heads == 2
    assert build_layout(Local(2) | Stride(4, heads="query"), 8, 2, 512).heads == 8
    assert build_layout(PerHead({3: Window(5)}, default=Local(2), heads="query"), 8, 2, 512).heads == 8


def test_head_ranges_are_slices_of_the_whole():
    pattern = Local(1) | Stride(4, heads="query") | Random(1)
    whole = expanded(build_layout(pattern, 8, 4, 640, layer=1), 8)
    for start, end, kv in ((0, 4, 2), (4, 8, 2), (6, 8, 1), (3, 4, 1)):
        part = build_layout(pattern, end - start, kv, 640, layer=1, heads=HeadRange(start, end, 8, 4))
        assert torch.equal(expanded(part, end - start), whole[start:end])


def test_mask_tiles_stay_few():
    layout = build_layout(Local(16) | Stride(8), 8, 8, 16384)
    assert layout.tiles.shape[0] == 1
    assert layout.nbytes < 16384 * 16384 // 64
