"""Block lists cut into chunks of work items of one shape, which one batched product serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from s2attn.layout import BlockIndex


@dataclass(frozen=True, eq=False)
class Items:
    """Work items: rows that share one list of blocks. int64 arrays with one number per item.

    Attributes:
        batch: batch entry, or sequence of a paged call.
        unit: group of heads that share keys and lists.
        head: layout head.
        line: row block of a row index, key block of a column index.
        low: first row of the block that the item holds.
        rows: number of rows of the block that the item holds.
        start: token of the first row, counted over all batch entries.
    """

    batch: np.ndarray
    unit: np.ndarray
    head: np.ndarray
    line: np.ndarray
    low: np.ndarray
    rows: np.ndarray
    start: np.ndarray


@dataclass(frozen=True, eq=False)
class Chunk:
    """Items of one shape: ``n`` items of ``tokens`` rows over ``entries`` blocks.

    Attributes:
        batch, unit, low, rows, start: ``(n,)`` int64, as of `Items`.
        line: ``(n,)`` int64.
        tokens: rows of each item, padded: ``rows <= tokens``.
        block: ``(n, entries)`` int64 listed blocks; 0 where the list is padded.
        code: ``(n, entries)`` int64 mask tiles; -1 is a full block, -2 is padding.
        full: the first ``full`` entries of every item are full blocks.
    """

    batch: Tensor
    unit: Tensor
    line: Tensor
    low: Tensor
    rows: Tensor
    start: Tensor
    tokens: int
    block: Tensor
    code: Tensor
    full: int

    def row_tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens ``(n, tokens)`` of the rows, and which exist; the others repeat the last one."""
        inside = torch.arange(self.tokens, device=self.start.device)
        exists = inside < self.rows[:, None]
        return self.start[:, None] + torch.minimum(inside, self.rows[:, None] - 1), exists


def chunks(index: BlockIndex, items: Items, most: Callable[[int, int], int]) -> Iterator[Chunk]:
    """The items that list something, in chunks.

    The shape of an item depends on its own list alone, so that its result has the same bits in any company.

    Args:
        index: the lists.
        items: rows or columns that read them.
        most: items of (rows, entries) that may be in memory together.
    """
    ptr, full, tile_ptr = (x.cpu().numpy() for x in (index.ptr, index.full, index.tile_ptr))
    begin = ptr[items.head, items.line]
    count, full = ptr[items.head, items.line + 1] - begin, full[items.head, items.line]
    # Few shapes: short lists as they are, then multiples of 4; rows in powers of two.
    entries = np.where(count <= 4, count, -(-count // 4) * 4)
    tokens = 1 << np.ceil(np.log2(np.maximum(items.rows, 1))).astype(np.int64)
    order = np.lexsort((full, entries, tokens))
    order = order[count[order] > 0]
    shape = np.stack([tokens, entries])[:, order]
    ends = [0, *(np.flatnonzero((shape[:, 1:] != shape[:, :-1]).any(0)) + 1).tolist(), len(order)]
    columns = [items.batch, items.unit, items.line, items.low, items.rows, items.start]
    columns += [begin, count, full, tile_ptr[items.head, items.line]]
    table = torch.from_numpy(np.stack(columns)[:, order].astype(np.int64)).to(index.idx.device)
    for first, end in pairwise(ends):
        if first == end:
            continue  # no item lists anything
        rows, width = shape[:, first].tolist()
        step = max(1, most(rows, width))
        for low in range(first, end, step):
            part = table[:, low : min(end, low + step)].unbind()
            block, code = _lists(index, part[6], part[7], part[8], part[9], width)
            yield Chunk(part[0], part[1], part[2], part[3], part[4], part[5], rows, block, code, int(full[order[low]]))


def _lists(index: BlockIndex, begin: Tensor, count: Tensor, full: Tensor, tile: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Padded lists ``(n, width)`` of blocks and mask codes."""
    entry = torch.arange(width, device=begin.device)
    listed, partial = entry < count[:, None], entry >= full[:, None]
    block = index.idx[torch.where(listed, begin[:, None] + entry, 0)].long()
    code = torch.full_like(block, -1)
    if index.tile.numel():
        number = torch.where(listed & partial, tile[:, None] + entry - full[:, None], 0)
        code = torch.where(partial, index.tile[number].long(), -1)
    return torch.where(listed, block, 0), torch.where(listed, code, -2)
