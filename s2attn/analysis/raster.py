"""A head of a layout as a small picture: tokens, blocks, or shares of blocks, whatever fits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2attn.analysis.stack import Lists
from s2attn.layout import Layout, Spans
from s2attn.layout.entries import entries_of
from s2attn.patterns.runs import Array


@dataclass(frozen=True, eq=False)
class Raster:
    """Shares ``(rows, columns)`` in 0 .. 1 of what a pixel covers: read in full blocks, and read in partial ones.

    Attributes:
        full, partial: the shares.
        future: pixels that lie wholly after the query, ``(rows, columns)`` bool; nowhere when not causal.
        query_tokens, key_tokens: what the picture spans, in tokens.
        unit: what a pixel is: "token", "block", or "share of blocks".
    """

    full: Array
    partial: Array
    future: Array
    query_tokens: float
    key_tokens: float
    unit: str


def raster_of(layout: Layout, head: int, most: int) -> Raster:
    """One head as a picture of at most ``most`` pixels on each side."""
    queries, keys = layout.seqlen_q, layout.seqlen_k
    if max(queries, keys) <= most:
        return _tokens(layout, head)
    if layout.packed:
        return _packed(layout, head, most)
    rows, cols = len(layout.q_spans), len(layout.k_spans)
    return _uniform(layout, head, min(rows, most), min(cols, most))


def _tokens(layout: Layout, head: int) -> Raster:
    """Every token: full blocks, and the tokens of partial ones."""
    mask = layout.to_dense(head).cpu().numpy()
    entries, block = entries_of(layout.rows, head), layout.block
    partial = np.zeros(mask.shape, dtype=bool)
    starts = (layout.q_spans.start[entries.line], layout.q_spans.length[entries.line], layout.k_spans.start[entries.idx])
    for q, rows, k, tile in zip(*(part.tolist() for part in (*starts, entries.tile)), strict=True):
        if tile >= 0:
            partial[q : q + rows, k : k + block] = True
    q_pos, k_pos = _positions(layout.q_spans), _positions(layout.k_spans)
    future = (k_pos[None, :] > q_pos[:, None]) & layout.causal
    return Raster((mask & ~partial).astype(float), (mask & partial).astype(float), future, len(q_pos), len(k_pos), "token")


def _positions(spans: Spans) -> Array:
    pos, length = spans.pos.numpy(force=True), spans.length.numpy(force=True)
    first = np.repeat(pos, length)
    return first + np.arange(len(first)) - np.repeat(np.cumsum(length) - length, length)


def _uniform(layout: Layout, head: int, rows: int, cols: int) -> Raster:
    """Blocks of one sequence, or shares of them: pixels are whole groups of blocks of nearly the same size."""
    q_blocks, k_blocks = len(layout.q_spans), len(layout.k_spans)
    q_pixel, k_pixel = np.arange(q_blocks) * rows // q_blocks, np.arange(k_blocks) * cols // k_blocks
    raster = _counted(layout, head, q_pixel, k_pixel, rows, cols)
    last_query = np.zeros(rows, dtype=np.int64)
    last_query[q_pixel] = layout.q_spans.pos.numpy(force=True) + layout.q_spans.length.numpy(force=True) - 1
    first_key = np.zeros(cols, dtype=np.int64)
    first_key[k_pixel[::-1]] = layout.k_spans.pos.numpy(force=True)[::-1]
    future = (first_key[None, :] > last_query[:, None]) & layout.causal
    unit = "block" if (rows, cols) == (q_blocks, k_blocks) else "share of blocks"
    return Raster(*raster, future, q_blocks * layout.block, k_blocks * layout.block, unit)


def last_blocks(layout: Layout, head: int, count: int) -> Raster:
    """The corner of the last ``count`` query blocks and key blocks of one sequence, block by block."""
    lists, first = Lists.of(layout, head), len(layout.q_spans) - count
    skip = len(layout.k_spans) - count
    full, partial = np.zeros((count, count)), np.zeros((count, count))
    for row in range(count):
        idx = lists.idx[lists.ptr[first + row] : lists.ptr[first + row + 1]] - skip
        is_full = np.arange(len(idx)) < int(layout.rows.full[head, first + row])
        full[row, idx[is_full & (idx >= 0)]] = 1
        partial[row, idx[~is_full & (idx >= 0)]] = 1
    future = np.triu(np.ones((count, count), dtype=bool), 1) & layout.causal
    return Raster(full, partial, future, count * layout.block, count * layout.block, "block")


def _packed(layout: Layout, head: int, most: int) -> Raster:
    """Blocks of packed sequences, whose last blocks are shorter: pixels are equal numbers of tokens, at least one block."""
    q_pixel, rows = _equal_pixels(layout.q_spans, layout.seqlen_q, min(most, max(1, layout.seqlen_q // layout.block)))
    k_pixel, cols = _equal_pixels(layout.k_spans, layout.seqlen_k, min(most, max(1, layout.seqlen_k // layout.block)))
    raster = _counted(layout, head, q_pixel, k_pixel, rows, cols)
    return Raster(*raster, np.zeros((rows, cols), dtype=bool), layout.seqlen_q, layout.seqlen_k, "share of blocks")


def _equal_pixels(spans: Spans, tokens: int, count: int) -> tuple[Array, int]:
    """The pixel in which each block begins, of ``count`` pixels of equal length."""
    return spans.start.numpy(force=True).astype(np.int64) * count // max(1, tokens), count


def _counted(layout: Layout, head: int, q_pixel: Array, k_pixel: Array, rows: int, cols: int) -> tuple[Array, Array]:
    """How many blocks of a pixel are listed as full, and as partial, over those it covers."""
    lists = Lists.of(layout, head)
    full_of_row = layout.rows.full[head].numpy(force=True)
    inside = np.arange(lists.listed) - lists.ptr[:-1][lists.row]
    is_full = inside < full_of_row[lists.row]
    pixel = q_pixel[lists.row] * cols + k_pixel[lists.idx]
    area = np.bincount(q_pixel, minlength=rows)[:, None] * np.bincount(k_pixel, minlength=cols)[None, :]
    counts = [np.bincount(pixel[chosen], minlength=rows * cols).reshape(rows, cols) for chosen in (is_full, ~is_full)]
    full, partial = (count / np.maximum(area, 1) for count in counts)
    return full, partial
