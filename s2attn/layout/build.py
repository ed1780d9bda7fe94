"""From a pattern to a layout: interval arithmetic for the lists, and token masks only for distinct partial blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.layout.index import BlockIndex, spans_of
from s2attn.layout.layout import Layout
from s2attn.layout.tiles import TileTable, classify
from s2attn.patterns import Cells, Head, Pattern, Recipe, Runs, Shape, View
from s2attn.patterns.cells import cut_future
from s2attn.patterns.runs import Array


@dataclass(frozen=True)
class HeadRange:
    """The contiguous global heads that a call holds: query heads ``start .. end - 1`` of ``num_heads``.

    Patterns count heads globally, so a tensor-parallel rank names its range instead of guessing its rank.

    >>> HeadRange(8, 16, num_heads=32, num_kv_heads=8).query_heads
    range(8, 16)
    """

    start: int
    end: int
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        check_int("heads num_kv_heads", self.num_kv_heads, 1)
        if check_int("heads num_heads", self.num_heads, 1) % self.num_kv_heads:
            raise bad_value("heads num_heads", f"must be a multiple of num_kv_heads ({self.num_kv_heads})", self.num_heads)
        if not 0 <= self.start < self.end <= self.num_heads:
            raise bad_value("heads", f"must satisfy 0 <= start < end <= {self.num_heads}", f"({self.start}, {self.end})")

    @property
    def query_heads(self) -> range:
        return range(self.start, self.end)


def pattern_hint(came: object) -> str:
    """The end of an error about something that is no pattern, but can be made one."""
    if isinstance(came, str):
        return "; s2attn.parse_pattern(text) reads one from a string"
    if isinstance(came, (Tensor, np.ndarray)):
        return "; a bool mask becomes a Layout, for s2attn.attention, by s2attn.Layout.from_dense(mask)"
    return "; take recipe.pattern(layer)" if isinstance(came, Recipe) else ""


@lru_cache(maxsize=256)
def layout_heads(pattern: Pattern, heads: HeadRange, num_kv_heads: int, layer: int) -> tuple[Pattern, ...]:
    """The resolved pattern of every layout head: one per local KV head, or per query head where the pattern tells them apart."""
    resolved = tuple(pattern.at(Head(h, heads.num_heads, heads.num_kv_heads, layer)) for h in heads.query_heads)
    group = len(resolved) // num_kv_heads
    shared = all(resolved[h] == resolved[h - h % group] for h in range(len(resolved)))
    return resolved[::group] if shared and not pattern.per_query_head else resolved


def default_block(pattern: Pattern) -> int:
    """The block that suits a pattern: its finest grid, at most 128; 64 for patterns without a grid."""
    return min(128, min(pattern.grids, default=64))


@dataclass(frozen=True)
class Lists:
    """The lists of one head of one sequence, still as progressions."""

    runs: Runs  # of every row, the full blocks first, then the partial ones
    count: Array
    full: Array
    tile: Array

    def write(self, out: Array, offset: int) -> None:
        """Write all block numbers, one row after another, each plus ``offset``."""
        if not len(out):
            return
        # One running sum writes all progressions: inside one it adds the step, at its start it jumps from the last number written.
        steps = np.repeat(self.runs.step.astype(np.int32), self.runs.count)
        steps[np.cumsum(self.runs.count) - self.runs.count] = self.runs.start - np.concatenate([[-offset], self.runs.last[:-1]])
        np.cumsum(steps, out=out)


def lists_of(pattern: Pattern, view: View, q_length: Array, tiles: TileTable) -> Lists:
    """The lists of a pattern of one head for the rows of ``view``, of ``q_length`` queries each."""
    cells: Cells = view.cells_of(pattern)
    if view.shape.causal:
        cells = cut_future(cells, view)
    full, partial = cells.full, cells.partial
    if view.shape.seqlen_k % view.block:  # a key block that ends early is never full: kernels then load full ones unmasked
        inner = np.full(view.rows, view.num_blocks - 2)
        full, partial = full.below(inner), partial | full.above(inner)
    row, col = partial.expand()
    number = classify(pattern, view, q_length, row, col, tiles)
    full |= _points(row, col, number == tiles.FULL)
    kept = _points(row, col, number >= 0)
    full_count, partial_count = full.counts(view.rows), kept.counts(view.rows)
    return Lists(_full_first(full, kept, view.rows), full_count + partial_count, full_count, number[number >= 0].astype(np.int32))


def _points(row: Array, col: Array, keep: Array) -> Runs:
    one = np.ones(int(keep.sum()), dtype=np.int64)
    return Runs(row[keep], col[keep], one, one)


def _full_first(full: Runs, partial: Runs, rows: int) -> Runs:
    """Both lists in one, ordered by row, inside a row the full ones first (so no longer by start)."""
    full_runs, partial_runs = np.bincount(full.row, minlength=rows), np.bincount(partial.row, minlength=rows)
    full_place = np.arange(len(full)) + (np.cumsum(partial_runs) - partial_runs)[full.row]
    partial_place = np.arange(len(partial)) + np.cumsum(full_runs)[partial.row]
    parts = []
    for a, b in zip((full.row, full.start, full.step, full.count), (partial.row, partial.start, partial.step, partial.count), strict=True):
        part = np.empty(len(a) + len(b), dtype=np.int64)
        part[full_place], part[partial_place] = a, b
        parts.append(part)
    return Runs(*parts)


def _index_of(heads: list[list[Lists]], first_block: list[int], which: list[int]) -> BlockIndex:
    """Write the lists of every head over all sequences; ``which[h]`` says whose lists layout head h uses: equal heads share storage."""
    count = np.stack([np.concatenate([part.count for part in head]) for head in heads])
    full = np.stack([np.concatenate([part.full for part in head]) for head in heads])
    ends, tile_ends = np.cumsum(count).reshape(count.shape), np.cumsum(count - full).reshape(count.shape)
    begin = np.concatenate([[0], ends[:-1, -1]]) if count.shape[1] else np.zeros(len(heads), dtype=np.int64)
    ptr = np.concatenate([begin[:, None], ends], axis=1)
    idx = np.empty(int(count.sum()), dtype=np.int32)
    at = 0
    for head in heads:
        for part, offset in zip(head, first_block, strict=True):
            size = int(part.count.sum())
            part.write(idx[at : at + size], offset)
            at += size
    tile = np.concatenate([part.tile for head in heads for part in head] or [np.zeros(0, dtype=np.int32)])
    take = np.array(which)
    arrays = (ptr[take], full[take].astype(np.int32), (tile_ends - (count - full))[take], idx, tile)
    return BlockIndex(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def read_cu_seqlens(name: str, cu_seqlens: Tensor, total: int | None = None) -> list[int]:
    """Check a vector of cumulative sequence lengths and return its numbers.

    Raises:
        ValueError: not one-dimensional, not starting at 0, decreasing, or not ending at ``total``.
        TypeError: not an integer tensor.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise bad_kind(name, "must be an int32 or int64 tensor", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise bad_value(name, "must have shape (sequences + 1,)", tuple(cu_seqlens.shape))
    numbers = cu_seqlens.tolist()
    if numbers[0] != 0:
        raise bad_value(name, "must start at 0", numbers[0])
    for before, after in pairwise(numbers):
        if after < before:
            raise bad_value(name, "must never decrease", f"{after} after {before}")
    if total is not None and numbers[-1] != total:
        raise bad_value(name, f"must end at the number of tokens, {total}", numbers[-1])
    return numbers


def build_layout(
    pattern: Pattern,
    num_heads: int,
    num_kv_heads: int | None = None,
    seqlen_q: int | None = None,
    seqlen_k: int | None = None,
    *,
    block: int | None = None,
    causal: bool = True,
    layer: int = 0,
    heads: HeadRange | None = None,
    device: torch.device | str = "cpu",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Layout:
    """Compile a pattern into the block index that kernels walk; time and memory grow with the listed blocks, not with S x S.

    Args:
        pattern: what may be seen.
        num_heads, num_kv_heads: query heads H and key/value heads G of the call; G defaults to H and divides it.
        seqlen_q, seqlen_k: tokens; ``seqlen_k`` defaults to ``seqlen_q``. The last query sits at the last key: ``q_pos = i + S - T``.
        block: tokens per block of the layout, 16 to 256; by default the finest grid of the pattern (at most 128), or 64.
        causal: cut keys after the query.
        layer: number of the layer, for patterns that differ by layer.
        heads: which global heads these are, under tensor parallelism; all of them by default.
        device: where the layout shall lie.
        cu_seqlens_q, cu_seqlens_k: cumulative lengths, instead of ``seqlen_q`` and ``seqlen_k``, for packed sequences.

    Returns:
        A `Layout` with G heads, or H when the pattern tells query heads apart; heads with equal patterns share storage.

    Raises:
        ValueError, TypeError: naming the argument, the rule and what came.

    >>> from s2attn.patterns import Local, Stride
    >>> build_layout(Local(16) | Stride(8), num_heads=4, num_kv_heads=2, seqlen_q=8192)
    Layout(heads=2, seqlen_q=8192, seqlen_k=8192, block=64, entries=5438, tiles=1, device='cpu')
    """
    if not isinstance(pattern, Pattern):
        raise bad_kind("pattern", f"must be a Pattern{pattern_hint(pattern)}", pattern)
    num_heads = check_int("num_heads", num_heads, 1)
    num_kv_heads = num_heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise bad_value("num_kv_heads", f"must divide num_heads ({num_heads})", num_kv_heads)
    heads = heads or HeadRange(0, num_heads, num_heads, num_kv_heads)
    if len(heads.query_heads) != num_heads:
        raise bad_value("heads", f"must name as many heads as the call has ({num_heads})", f"({heads.start}, {heads.end})")
    block = default_block(pattern) if block is None else check_block("block", block)
    lengths_q, lengths_k, packed = _lengths(seqlen_q, seqlen_k, cu_seqlens_q, cu_seqlens_k)
    resolved = layout_heads(pattern, heads, num_kv_heads, check_int("layer", layer, 0))
    return _build(resolved, lengths_q, lengths_k, block, bool(causal), packed).to(device)


def _lengths(seqlen_q: int | None, seqlen_k: int | None, cu_q: Tensor | None, cu_k: Tensor | None) -> tuple[list[int], list[int], bool]:
    if cu_q is None and cu_k is None:
        q = check_int("seqlen_q", seqlen_q, 0)
        return [q], [q if seqlen_k is None else check_int("seqlen_k", seqlen_k, 0)], False
    if cu_q is None or cu_k is None:
        raise bad_value("cu_seqlens_q and cu_seqlens_k", "must be given together", "one of them")
    numbers_q, numbers_k = read_cu_seqlens("cu_seqlens_q", cu_q, seqlen_q), read_cu_seqlens("cu_seqlens_k", cu_k, seqlen_k)
    if len(numbers_q) != len(numbers_k):
        raise bad_value("cu_seqlens_k", f"must have as many numbers as cu_seqlens_q ({len(numbers_q)})", len(numbers_k))
    return np.diff(numbers_q).tolist(), np.diff(numbers_k).tolist(), True


def _build(resolved: Sequence[Pattern], lengths_q: list[int], lengths_k: list[int], block: int, causal: bool, packed: bool) -> Layout:
    offsets = [k - q for q, k in zip(lengths_q, lengths_k, strict=True)]
    q_spans, k_spans = spans_of(lengths_q, block, offsets), spans_of(lengths_k, block)
    unique = list(dict.fromkeys(resolved))
    tiles, made = TileTable(block), {}
    heads: list[list[Lists]] = [[] for _ in unique]
    first_block = [0]
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        if (length_q, length_k) not in made:
            made[length_q, length_k] = _sequence(unique, length_q, length_k, block, causal, tiles)
        for head, lists in zip(heads, made[length_q, length_k], strict=True):
            head.append(lists)
        first_block.append(first_block[-1] + -(-length_k // block))
    index = _index_of(heads, first_block[:-1], [unique.index(pattern) for pattern in resolved])
    layout = Layout(block, causal, index, tiles.tensor(), q_spans, k_spans, packed)
    return layout.proven()  # holds its invariants by construction, which tests prove


def _sequence(patterns: list[Pattern], length_q: int, length_k: int, block: int, causal: bool, tiles: TileTable) -> list[Lists]:
    """The lists of every distinct head of one sequence."""
    q_lo = np.arange(-(-length_q // block), dtype=np.int64) * block + length_k - length_q
    q_length = np.minimum(block, length_k - q_lo)
    view = View(q_lo, q_lo + q_length - 1, block, Shape(length_k, causal))
    return [lists_of(pattern, view, q_length, tiles) for pattern in patterns]
