"""A square layout read by position: which rows the last queries of sequences need, and what of them these queries see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from s2attn.layout.entries import Entries, first_with_same_lists, index_from
from s2attn.layout.index import Spans, spans_of
from s2attn.layout.layout import Layout

UNIT = 16
"""Tokens that are looked at together: every page and every block is a multiple of it."""


@dataclass(frozen=True, eq=False)
class Lines:
    """Rows of a square layout that queries need, one line for each row of each sequence; int64 vectors.

    Attributes:
        seq, row: sequence, and row of the layout.
        low, high: the queries of the row that ask: places ``low .. high - 1``.
        query: first of them among the queries of all sequences.
    """

    seq: Tensor
    row: Tensor
    low: Tensor
    high: Tensor
    query: Tensor


def query_lines(cu_q: Sequence[int], lengths: Sequence[int], block: int, device: torch.device) -> Lines:
    """The lines of sequences of ``lengths`` tokens whose last queries ``cu_q`` counts up; queries before the first token need none."""
    found: list[np.ndarray] = [np.zeros((0, 5), dtype=np.int64)]
    for sequence, ((before, after), length) in enumerate(zip(pairwise(cu_q), lengths, strict=True)):
        first = max(length - (after - before), 0)
        rows = np.arange(first // block, -(-length // block)) if after > before and length else np.zeros(0, dtype=np.int64)
        low, high = np.maximum(first - rows * block, 0), np.minimum(length - rows * block, block)
        query = before + rows * block + low - (length - (after - before))
        found.append(np.stack([np.full_like(rows, sequence), rows, low, high, query], axis=1))
    return Lines(*torch.from_numpy(np.concatenate(found)).to(device).T.contiguous())


@dataclass(frozen=True, eq=False)
class Listed:
    """Entries that lines list, of one head, line after line and full ones first; int64 vectors.

    Attributes:
        line: number of the line.
        block: key block.
        code: mask tile, or -1 for a full entry.
    """

    line: Tensor
    block: Tensor
    code: Tensor


def listed_entries(layout: Layout, head: int, lines: Lines) -> Listed:
    """What the lines list; lines beyond the layout list nothing."""
    rows = layout.rows
    inside = lines.row < rows.lines
    row = torch.where(inside, lines.row, 0)
    begin, full, codes = rows.ptr[head, row], rows.full[head, row].long(), rows.tile_ptr[head, row]
    count = torch.where(inside, rows.ptr[head, row + 1] - begin, 0)
    line = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    entry = torch.arange(len(line), device=count.device) - (count.cumsum(0) - count)[line]
    code = torch.full_like(line, -1)
    partial = (entry >= full[line]).nonzero()[:, 0]
    of = line[partial]
    code[partial] = rows.tile[codes[of] + entry[partial] - full[of]].long()
    return Listed(line, rows.idx[begin[line] + entry].long(), code)


def seen_units(layout: Layout, lines: Lines, listed: Listed) -> Tensor:
    """Which units of 16 keys of each entry some query of its line sees, ``(entries, block / 16)`` bool."""
    seen = torch.ones(len(listed.line), layout.block // UNIT, dtype=torch.bool, device=layout.device)
    partial = (listed.code >= 0).nonzero()[:, 0]
    if len(partial):
        of, code, some = listed.line[partial], listed.code[partial], _some_seen(layout)
        seen[partial] = some[code, lines.high[of]] > some[code, lines.low[of]]
    return seen


def _same_lists(layout: Layout) -> list[int]:
    """For every head the first one with the same lists."""
    return layout.derive("same lists", lambda: first_with_same_lists(layout.rows))


def _some_seen(layout: Layout) -> Tensor:
    """For each mask tile how many of the queries before each place see some key of each unit: ``(tiles, block + 1, units)``."""

    def make() -> Tensor:
        seen = layout.tiles.unflatten(2, (-1, UNIT)).any(-1)
        return torch.nn.functional.pad(seen.to(torch.int32).cumsum(1), (0, 0, 1, 0))

    return layout.derive("seen units", make)


def take_lines(layout: Layout, lines: Lines, total_q: int) -> Layout:
    """A packed layout in which every line is a sequence of its own, as far as its last query sees: no pattern is looked at again.

    ``total_q``: queries of the call; those of no line see nothing, and stand in no span.
    """
    block, device = layout.block, layout.device
    ends = lines.row * block + lines.high
    k_spans = spans_of(ends.tolist(), block).to(device)
    blocks = -(-ends // block)
    first = blocks.cumsum(0) - blocks
    same = _same_lists(layout)
    heads = list(dict.fromkeys(same))
    kept = []
    for head in heads:
        listed = listed_entries(layout, head, lines)
        some = seen_units(layout, lines, listed).any(1)
        kept.append(Listed(listed.line[some], listed.block[some], listed.code[some]))
    tiles, numbers = _moved_tiles(layout, lines, kept)
    entries = [Entries(one.line, first[one.line] + one.block, number) for one, number in zip(kept, numbers, strict=True)]
    index = index_from(entries, [heads.index(head) for head in same], len(ends), layout.rows)
    start, length, seq = lines.query, lines.high - lines.low, torch.arange(len(ends), device=device)
    q_spans = Spans(*(part.int() for part in (start, length, seq, lines.row * block + lines.low)))
    made = Layout(block, True, index, tiles, q_spans, k_spans, True, total_q, int(ends.sum()))
    return made.proven()  # the lists of a layout that holds its invariants


def _moved_tiles(layout: Layout, lines: Lines, kept: list[Listed]) -> tuple[Tensor, list[Tensor]]:
    """The distinct mask tiles of partial entries with the first query of their line moved to the top, and each entry's number of them."""
    span = layout.block + 1
    code, line = (torch.cat([getattr(one, name) for one in kept]) for name in ("code", "line"))
    partial = code >= 0
    of = line[partial]
    kinds, which = torch.unique((code[partial] * span + lines.low[of]) * span + lines.high[of], return_inverse=True)
    low, high = kinds // span % span, kinds % span
    place = low[:, None] + torch.arange(layout.block, device=layout.device)
    moved = layout.tiles[(kinds // span**2)[:, None], place.clamp(max=layout.block - 1)] & (place < high[:, None])[..., None]
    number = torch.full_like(code, -1)
    number[partial] = which
    return moved, list(number.split([len(one.line) for one in kept]))
