"""Dense masks and block tables to layouts and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.layout import Layout, build_layout, from_block_table, to_block_table
from s2attn.patterns import Dense, Local, Random, Stride, Window
from tests.support.strategies import CallShape, call_shapes, patterns


def built(pattern, shape: CallShape) -> Layout:
    lengths = (shape.seqlen_q, shape.seqlen_k)
    return build_layout(pattern, shape.num_heads, shape.num_kv_heads, *lengths, block=shape.block, causal=shape.causal)


def same_lists(a: Layout, b: Layout) -> bool:
    """Equal lists with equal tokens (tiles may have other numbers)."""
    for head in range(a.heads):
        for line in range(a.rows.lines):
            (full_a, partial_a), (full_b, partial_b) = a.rows.line(head, line), b.rows.line(head, line)
            if full_a != full_b or [block for block, _ in partial_a] != [block for block, _ in partial_b]:
                return False
            if any(not torch.equal(a.tiles[x], b.tiles[y]) for (_, x), (_, y) in zip(partial_a, partial_b, strict=True)):
                return False
    return (a.heads, a.rows.lines, a.block) == (b.heads, b.rows.lines, b.block)


@settings(max_examples=30)
@given(patterns(), call_shapes(200))
def test_layouts_go_through_dense_masks_unchanged(pattern, shape: CallShape):
    layout = built(pattern, shape)
    again = Layout.from_dense(layout.to_dense(), block=shape.block).validate()
    assert torch.equal(again.to_dense(), layout.to_dense())
    assert same_lists(layout, again)
    assert again.pairs.tolist() == layout.pairs.tolist()


@settings(max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(0, 90),
    st.integers(0, 90),
    st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    st.sampled_from([16, 32, 64]),
    st.integers(0, 99),
)
def test_any_mask_comes_back(heads, queries, keys, share, block, seed):
    mask = torch.rand(heads, queries, keys, generator=torch.Generator().manual_seed(seed)) < share
    layout = Layout.from_dense(mask, block=block).validate()
    assert torch.equal(layout.to_dense(), mask)
    assert layout.pairs.tolist() == mask.sum(dim=(1, 2)).tolist()
    q_pos = torch.arange(queries)[:, None] + keys - queries
    assert layout.causal == (not bool((mask & (torch.arange(keys)[None, :] > q_pos)).any()))


def test_a_mask_of_one_head_needs_no_head_axis():
    mask = torch.tril(torch.ones(100, 100, dtype=torch.bool))
    layout = Layout.from_dense(mask, block=32)
    assert (layout.heads, layout.causal) == (1, True)
    assert torch.equal(layout.to_dense(0), mask)
    assert same_lists(layout, build_layout(Dense(), 1, 1, 100, block=32))


@settings(max_examples=30)
@given(patterns(), call_shapes(200))
def test_block_tables_list_the_blocks_of_each_row(pattern, shape: CallShape):
    layout = built(pattern, shape)
    table, counts = to_block_table(layout)
    assert table.dtype == counts.dtype == torch.int32
    assert counts.tolist() == layout.rows.counts.tolist()
    assert table.shape == (layout.heads, layout.rows.lines, int(counts.max()))
    for head in range(layout.heads):
        for line in range(layout.rows.lines):
            full, partial = layout.rows.line(head, line)
            count = int(counts[head, line])
            assert table[head, line, :count].tolist() == sorted([*full, *(block for block, _ in partial)])
            assert bool((table[head, line, count:] == -1).all())


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=5, max_size=5), st.booleans(), st.integers(0, 31), st.integers(0, 9)
)
def test_block_tables_become_block_masks(bits, causal, short, seed):
    seqlen, block = 160 - short, 32
    chosen = torch.tensor(bits)
    counts = chosen.sum(dim=1)
    width = int(counts.max())
    table = torch.full((1, 5, width), -1)
    for row in range(5):  # in any order
        blocks = chosen[row].nonzero().flatten()
        blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
        table[0, row, : len(blocks)] = blocks
    layout = from_block_table(table, counts[None], seqlen_q=seqlen, seqlen_k=seqlen, block=block, causal=causal).validate()
    mask = chosen.repeat_interleave(block, 0).repeat_interleave(block, 1)[:seqlen, :seqlen]
    assert torch.equal(layout.to_dense(0), mask.tril() if causal else mask)
    assert layout.causal == causal


@pytest.mark.parametrize("pattern", [Dense(), Local(3) | Stride(4), Random(2)], ids=repr)
@pytest.mark.parametrize("causal", [True, False])
def test_block_patterns_go_through_block_tables_unchanged(pattern, causal):
    layout = build_layout(pattern, 4, 2, 700, block=64, causal=causal)
    again = from_block_table(*to_block_table(layout), seqlen_q=700, seqlen_k=700, causal=causal).validate()
    assert same_lists(layout, again)
    # Queries that do not begin on the grid see two of its rows through one block row, so the table says more than the layout.
    chunk = build_layout(pattern, 4, 2, 500, 700, block=64, causal=causal)
    wider = from_block_table(*to_block_table(chunk), seqlen_q=500, seqlen_k=700, causal=causal).validate().to_dense()
    assert torch.equal(wider & chunk.to_dense(), chunk.to_dense())


def test_a_table_of_a_token_pattern_is_exact_to_the_block():
    layout = build_layout(Window(40), 1, 1, 256, block=32)
    again = from_block_table(*to_block_table(layout), seqlen_q=256, seqlen_k=256, block=32)
    blocks = layout.to_dense(0).view(8, 32, 8, 32).any(dim=3).any(dim=1)
    assert torch.equal(again.to_dense(0), blocks.repeat_interleave(32, 0).repeat_interleave(32, 1).tril())


def test_packed_layouts_list_blocks_of_the_packed_axis():
    cu = torch.tensor([0, 70, 100])
    table, counts = to_block_table(build_layout(Dense(), 1, 1, cu_seqlens_q=cu, cu_seqlens_k=cu, block=32))
    assert table[0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [3, -1, -1]]
    assert counts[0].tolist() == [1, 2, 3, 1]


def test_heads_are_checked():
    layout = build_layout(Dense(), 2, 2, 64)
    with pytest.raises(ValueError, match=r"head must be in 0 \.\. 1; got 2"):
        layout.to_dense(2)


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ([[True]], TypeError, r"mask must be a bool tensor; got list"),
        (torch.ones(3, 3), TypeError, r"mask must be a bool tensor; got torch\.float32"),
        (
            torch.ones(3, dtype=torch.bool),
            ValueError,
            r"mask must have shape \(T, S\) or \(heads, T, S\) with at least one head; got \(3,\)",
        ),
        (torch.ones(0, 3, 3, dtype=torch.bool), ValueError, r"mask must have shape .* at least one head; got \(0, 3, 3\)"),
    ],
)
def test_bad_masks(mask, error, words):
    with pytest.raises(error, match=words):
        Layout.from_dense(mask)


def test_bad_block_of_a_mask():
    with pytest.raises(ValueError, match=r"block must be one of 16, 32, 64, 128, 256; got 48"):
        Layout.from_dense(torch.ones(3, 3, dtype=torch.bool), block=48)


@pytest.mark.parametrize(
    ("table", "counts", "error", "words"),
    [
        (
            torch.zeros(1, 3, 2, dtype=torch.int32),
            torch.ones(1, 3, dtype=torch.int32),
            ValueError,
            r"table must have shape \(heads, 2, width\)",
        ),
        (
            torch.zeros(2, 2, dtype=torch.int32),
            torch.ones(2, dtype=torch.int32),
            ValueError,
            r"table must have shape .*; got \(\(2, 2\), \(2,\)\)",
        ),
        (torch.zeros(1, 2, 2, dtype=torch.int32), torch.tensor([[1, 3]]), ValueError, r"counts must be in 0 \.\. 2; got \[1, 3\]"),
        (torch.zeros(1, 2, 2, dtype=torch.int32), torch.tensor([[-1, 1]]), ValueError, r"counts must be in 0 \.\. 2; got \[-1, 1\]"),
        (torch.tensor([[[0, 9], [0, 2]]]), torch.tensor([[1, 2]]), ValueError, r"table must list key blocks in 0 \.\. 1; got \[0, 2\]"),
        (torch.tensor([[[0, 9], [-1, 0]]]), torch.tensor([[1, 2]]), ValueError, r"table must list key blocks in 0 \.\. 1; got \[-1, 0\]"),
        (
            torch.tensor([[[0, 9], [1, 1]]]),
            torch.tensor([[1, 2]]),
            ValueError,
            r"table must list a key block once in a row; got a repetition",
        ),
        (
            torch.zeros(0, 2, 2, dtype=torch.int32),
            torch.zeros(0, 2, dtype=torch.int32),
            ValueError,
            r"table must have .* at least one head",
        ),
        ([[[0]]], torch.tensor([[1, 2]]), TypeError, r"table must be an integer tensor; got list"),
        (torch.zeros(1, 2, 2), torch.tensor([[1, 2]]), TypeError, r"table must be an int32 or int64 tensor; got torch\.float32"),
        (torch.tensor([[[0, 1], [0, 1]]]), torch.ones(1, 2), TypeError, r"counts must be an int32 or int64 tensor; got torch\.float32"),
    ],
)
def test_bad_tables(table, counts, error, words):
    with pytest.raises(error, match=words):
        from_block_table(table, counts, seqlen_q=100, seqlen_k=100)
