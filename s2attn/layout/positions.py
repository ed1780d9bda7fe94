"""A square layout read by position: which rows the last queries of sequences need, and what of them these queries see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from s2attn.layout.layout import Layout

UNIT = 16
"""Tokens that are looked at together: every page and every block is a multiple of it."""
_some: WeakKeyDictionary[Layout, Tensor] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Lines:
    """Rows of a square layout that queries need, one line for each row of each sequence; int64 vectors.

    Attributes:
        seq, row: sequence, and row of the layout.
        low, high: the queries of the row that ask: places ``low .. high - 1``.
    """

    seq: Tensor
    row: Tensor
    low: Tensor
    high: Tensor


def query_lines(cu_q: Sequence[int], lengths: Sequence[int], block: int, device: torch.device) -> Lines:
    """The lines of sequences of ``lengths`` tokens whose last queries ``cu_q`` counts up; queries before the first token need none."""
    found: list[np.ndarray] = [np.zeros((0, 4), dtype=np.int64)]
    for sequence, ((before, after), length) in enumerate(zip(pairwise(cu_q), lengths, strict=True)):
        first = max(length - (after - before), 0)
        rows = np.arange(first // block, -(-length // block)) if after > before and length else np.zeros(0, dtype=np.int64)
        low, high = np.maximum(first - rows * block, 0), np.minimum(length - rows * block, block)
        found.append(np.stack([np.full_like(rows, sequence), rows, low, high], axis=1))
    return Lines(*torch.from_numpy(np.concatenate(found)).to(device).T.contiguous())


@dataclass(frozen=True, eq=False)
class Units:
    """Keys in units of 16 tokens that lines list, of one head; int64 vectors.

    Attributes:
        line: number of the line.
        pos: position of the first token.
        seen: whether some query of the line sees some key of it.
    """

    line: Tensor
    pos: Tensor
    seen: Tensor


def listed_units(layout: Layout, head: int, lines: Lines) -> Units:
    """What the lines list, exact to 16 tokens; lines beyond the layout list nothing."""
    rows, block = layout.rows, layout.block
    inside = lines.row < rows.lines
    row = torch.where(inside, lines.row, 0)
    begin, full, codes = rows.ptr[head, row], rows.full[head, row].long(), rows.tile_ptr[head, row]
    count = torch.where(inside, rows.ptr[head, row + 1] - begin, 0)
    line = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    entry = torch.arange(len(line), device=count.device) - (count.cumsum(0) - count)[line]
    unit = torch.arange(block // UNIT, device=count.device)
    pos = rows.idx[begin[line] + entry].long()[:, None] * block + unit * UNIT
    seen = torch.ones_like(pos, dtype=torch.bool)
    partial = (entry >= full[line]).nonzero()[:, 0]
    if len(partial):
        of = line[partial]
        code = rows.tile[codes[of] + entry[partial] - full[of]].long()
        some = _some_seen(layout)
        seen[partial] = some[code, lines.high[of]] > some[code, lines.low[of]]
    return Units(line.repeat_interleave(len(unit)), pos.flatten(), seen.flatten())


def _some_seen(layout: Layout) -> Tensor:
    """For each mask tile how many of the queries before each place see some key of each unit: ``(tiles, block + 1, units)``."""
    made = _some.get(layout)
    if made is None:
        seen = layout.tiles.unflatten(2, (-1, UNIT)).any(-1)
        made = _some[layout] = torch.nn.functional.pad(seen.to(torch.int32).cumsum(1), (0, 0, 1, 0))
    return made
