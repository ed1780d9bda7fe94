"""Figures of reports against brute force on token masks, for random patterns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.analysis.cover import name_blocks
from s2attn.analysis.describe import describe
from s2attn.patterns import Recipe, Stride, Window
from tests.support import dense_mask
from tests.support.strategies import CallShape, call_shapes, patterns

HEAD_DIM, DTYPE_BYTES = 8, 4


def blocks_of(mask: np.ndarray, block: int) -> np.ndarray:
    """Which blocks of ``(H, T, S)`` masks have any pair."""
    rows = np.add.reduceat(mask.astype(int), np.arange(0, mask.shape[1], block), axis=1)
    return np.add.reduceat(rows, np.arange(0, mask.shape[2], block), axis=2) > 0


def grouped(blocks: np.ndarray, num_kv_heads: int) -> np.ndarray:
    return blocks.reshape(num_kv_heads, -1, *blocks.shape[1:]).any(axis=1)


def masks_of(pattern, shape: CallShape, layers: int, longer: int = 0) -> list[np.ndarray]:
    n = shape.seqlen_q + longer
    get = pattern.pattern if isinstance(pattern, Recipe) else lambda layer: pattern
    return [
        dense_mask(get(layer), shape.num_heads, shape.num_kv_heads, n, n, causal=shape.causal, layer=layer).numpy()
        for layer in range(layers)
    ]


@settings(max_examples=60)
@given(patterns(), call_shapes(200), st.integers(1, 3))
def test_density_work_and_cover(pattern, shape: CallShape, layers):
    recipe = Recipe(pattern, layers={1: Window(30) | Stride(3)})
    n, block = shape.seqlen_q, min(shape.block, 64)
    masks = masks_of(recipe, shape, layers)
    blocks = [blocks_of(mask, block) for mask in masks]
    report = describe(
        recipe,
        shape.num_heads,
        shape.num_kv_heads,
        n,
        layers=layers,
        block=block,
        causal=shape.causal,
        head_dim=HEAD_DIM,
        dtype_bytes=DTYPE_BYTES,
    )
    pairs = sum(int(mask.sum()) for mask in masks)
    dense = n * (n + 1) / 2 if shape.causal else n * n
    assert report.density == pytest.approx(pairs / (dense * shape.num_heads * layers))
    assert report.density_square == pytest.approx(pairs / (n * n * shape.num_heads * layers))
    assert report.flops_forward == 4 * HEAD_DIM * pairs
    per_head = [int(one.sum()) for layer in blocks for one in layer]
    assert (report.listed.min, report.listed.max, report.listed.total) == (min(per_head), max(per_head), sum(per_head))
    union = np.stack([one.any(axis=0) for one in blocks])[:, -1, :-1]
    assert [one.cover.covered for one in report.per_layer] == union.sum(axis=1).tolist()
    assert report.cover.covered == union.any(axis=0).sum()
    together = [int(union[: i + 1].any(axis=0).sum()) for i in range(layers)]
    full = union.shape[1]
    assert report.complete_after == (together.index(full) + 1 if full in together else None)
    length = np.minimum(block, n - np.arange(-(-n // block)) * block)
    read = sum(int(length[head.any(axis=0)].sum()) for one in blocks for head in grouped(one, shape.num_kv_heads))
    assert report.kv_bytes == read * 2 * HEAD_DIM * DTYPE_BYTES


def comes_back(blocks: np.ndarray) -> tuple[int, int, int] | None:
    """The first block that a row leaves out, from its own row on, while a later one reads it."""
    for j in range(blocks.shape[1]):
        for i in range(j, blocks.shape[0]):
            later = np.flatnonzero(blocks[i + 1 :, j])
            if not blocks[i, j] and len(later):
                return j, i, i + 1 + int(later[0])
    return None


def kept_tokens(later: np.ndarray, n: int, block: int) -> int:
    """Of today's n tokens those that lie in a block which the ``later`` rows read (the last block is still being filled)."""
    blocks = -(-n // block)
    read = later[:, : blocks * block].any(axis=0)
    whole = np.add.reduceat(read.astype(int), np.arange(0, blocks * block, block)) > 0
    return int(np.repeat(whole, block)[:n].sum())


@settings(max_examples=50)
@given(patterns(), call_shapes(120))
def test_kv_efficiency_and_cache(pattern, shape: CallShape):
    shape = CallShape(shape.num_heads, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k, min(shape.block, 32), True, 0)
    n, block = shape.seqlen_q, shape.block
    report = describe(pattern, shape.num_heads, shape.num_kv_heads, n, block=block, head_dim=HEAD_DIM, dtype_bytes=DTYPE_BYTES)
    heads = grouped(blocks_of(masks_of(pattern, shape, 1)[0], block), shape.num_kv_heads)
    found = [comes_back(head) for head in heads]
    first = next(((h, *one) for h, one in enumerate(found) if one is not None), None)
    example = report.counter_example
    assert report.kv_efficient == (first is None)
    assert first is None or first == (example.kv_head, example.key_block, example.skipped_at, example.read_again_at)
    # What any query from the last token on reads; heads that are not KV-efficient are asked for as many tokens as there are.
    longer = masks_of(pattern, shape, 1, longer=max(n, 2 * block))[0]
    kept = 0
    for head, one in zip(grouped(longer, shape.num_kv_heads), found, strict=True):
        last = 2 * n if one is not None else n + 2 * block
        kept += kept_tokens(head[n - 1 : last], n, block)
    assert report.cache_bytes == kept * 2 * HEAD_DIM * DTYPE_BYTES


@settings(max_examples=40)
@given(patterns(), call_shapes(150))
def test_a_kv_efficient_cache_holds_what_later_queries_of_the_same_kind_read(pattern, shape: CallShape):
    """Where the longer sequence is KV-efficient too, nothing outside of the kept blocks is ever read again."""
    n, block = shape.seqlen_q, min(shape.block, 32)
    now = describe(pattern, shape.num_heads, shape.num_kv_heads, n, block=block, head_dim=1, dtype_bytes=1)
    later = describe(pattern, shape.num_heads, shape.num_kv_heads, 2 * n + 4 * block, block=block)
    if not (now.kv_efficient and later.kv_efficient):
        return
    small = CallShape(shape.num_heads, shape.num_kv_heads, n, n, block, True, 0)
    mask = masks_of(pattern, small, 1, longer=max(n, 2 * block))[0]
    kept = sum(kept_tokens(head[n - 1 :], n, block) for head in grouped(mask, shape.num_kv_heads))
    assert now.cache_bytes == kept * 2


@settings(max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_block_names_say_which_blocks(chosen):
    chosen = np.array(chosen)
    text = name_blocks(chosen)
    numbers = np.flatnonzero(chosen)
    if not len(numbers):
        assert text == ""
        return
    if "%" in text:
        period = int(text.split()[2])
        low, high = int(text.split("..")[-2].split()[-1]), int(text.split("..")[-1])
        residues = set()
        for part in text[text.index("{") + 1 : text.index("}")].split(","):
            if "..." in part:
                return  # only the first of many residues are written out
            ends = [int(end) for end in part.split("..")]
            residues |= set(range(ends[0], ends[-1] + 1))
        assert [j for j in range(low, high + 1) if j % period in residues] == numbers.tolist()
    elif "..." not in text.replace("....", ""):
        listed = set()
        for part in text.removeprefix("blocks").removeprefix("block").split(","):
            ends = [int(end) for end in part.split("..")]
            listed |= set(range(ends[0], ends[-1] + 1))
        assert listed == set(numbers.tolist())
