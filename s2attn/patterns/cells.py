"""`View`: the block rows that a layout asks about; `Cells`: the answer, which blocks are full and which may be partial."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s2attn.patterns.runs import Array, Runs


@dataclass(frozen=True)
class Shape:
    """What a pattern may know of the call: ``seqlen_k`` key tokens at positions ``0 .. seqlen_k - 1``, and causality."""

    seqlen_k: int
    causal: bool = True


@dataclass(frozen=True)
class View:
    """Query blocks of one sequence, seen against its key blocks of ``block`` tokens.

    ``q_lo, q_hi`` are the positions of each row's first and last query (they may be negative when there are more queries than keys).
    """

    q_lo: Array
    q_hi: Array
    block: int
    shape: Shape
    _known: dict[Any, Cells] = field(default_factory=dict)

    def cells_of(self, pattern: Any) -> Cells:
        """``pattern.cells(self)``, kept: what the heads have in common is worked out once."""
        if pattern not in self._known:
            self._known[pattern] = pattern.cells(self)
        return self._known[pattern]

    @property
    def rows(self) -> int:
        return len(self.q_lo)

    @property
    def num_blocks(self) -> int:
        return -(-self.shape.seqlen_k // self.block)

    def intervals(self, lo: Array, hi: Array) -> Runs:
        return Runs.intervals(lo, hi, self.num_blocks)


@dataclass(frozen=True, eq=False)
class Cells:
    """Per row, blocks in which every pair is allowed (``full``) and others in which some may be (``partial``); disjoint.

    ``partial`` may hold too many blocks (a layout looks at their tokens), never too few, and no block in neither set has a pair.
    """

    full: Runs
    partial: Runs

    def __or__(self, other: Cells) -> Cells:
        full = self.full | other.full
        return Cells(full, (self.partial | other.partial) - full)

    def __and__(self, other: Cells) -> Cells:
        mixed = (self.partial & other.full) | (self.full & other.partial)
        return Cells(self.full & other.full, mixed | (self.partial & other.partial))


def cut_future(cells: Cells, view: View) -> Cells:
    """Leave out blocks after the query; blocks that some of the row's queries come before are no longer full."""
    full_end = (view.q_lo - view.block + 1) // view.block
    full = cells.full.below(full_end)
    edge = cells.full.above(full_end).below(view.q_hi // view.block)
    return Cells(full, cells.partial.below(view.q_hi // view.block) | edge)


def distance_cells(view: View, lo: int | None, hi: int | None) -> Cells:
    """Blocks by token distance ``lo <= q - k < hi`` (None is unbounded)."""
    size, end = view.block, view.num_blocks - 1
    first = last = full_first = full_last = None
    if hi is not None:  # the oldest key block that is still near enough
        first, full_first = -((hi + size - 2 - view.q_lo) // size), -((hi - 1 - view.q_hi) // size)
    if lo is not None:  # the newest one that is already far enough
        last, full_last = (view.q_hi - lo) // size, (view.q_lo - size + 1 - lo) // size
    zero = np.zeros(view.rows, dtype=np.int64)
    cover = view.intervals(zero if first is None else first, zero + end if last is None else last)
    full = view.intervals(zero if full_first is None else full_first, zero + end if full_last is None else full_last)
    return Cells(full, cover - full)


def key_cells(view: View, end: int) -> Cells:
    """Blocks by absolute key position ``k < end``."""
    zero = np.zeros(view.rows, dtype=np.int64)
    full = view.intervals(zero, zero + end // view.block - 1)
    cover = view.intervals(zero, zero + -(-end // view.block) - 1)
    return Cells(full, cover - full)


def refine(runs: Runs, view: View, grid: int) -> Cells:
    """Blocks of a pattern's own grid as blocks of the view, which may be finer (all full) or coarser (partly covered)."""
    if grid == view.block:
        return Cells(runs, Runs.none())
    limit = view.num_blocks
    if grid > view.block:
        many = grid // view.block
        plain = runs.step == 1
        row, member = Runs(*(x[~plain] for x in (runs.row, runs.start, runs.step, runs.count))).expand()
        row, start = np.concatenate([runs.row[plain], row]), np.concatenate([runs.start[plain], member])
        count = np.concatenate([runs.count[plain], np.ones_like(member)])
        return Cells(Runs.of(row, start * many, 1, count * many, limit), Runs.none())
    many = view.block // grid
    plain = runs.step == 1
    first, last = -(-runs.start // many), (runs.last + 1) // many - 1
    full = Runs.of(runs.row[plain], first[plain], 1, (last - first + 1)[plain], limit)
    even = ~plain & (runs.step % many == 0)
    row, member = Runs(*(x[~plain & ~even] for x in (runs.row, runs.start, runs.step, runs.count))).expand()
    cover = Runs.of(runs.row[plain], (runs.start // many)[plain], 1, (runs.last // many - runs.start // many + 1)[plain], limit)
    cover |= Runs.of(runs.row[even], (runs.start // many)[even], (runs.step // many)[even], runs.count[even], limit)
    cover |= Runs.of(row, member // many, 1, np.ones_like(member), limit)
    return Cells(full, cover - full)


def grid_cells(view: View, grid: int, lists) -> Cells:
    """Blocks of a grid pattern; ``lists(q_block)`` gives the key blocks of each query block, on the pattern's own grid.

    A row may touch several query blocks of the grid (a coarser layout, or positions that do not start on the grid): a key block is full
    when it is full for all of them, and covered when it is for any.
    """
    first, last = view.q_lo // grid, view.q_hi // grid
    cells = refine(lists(first), view, grid)
    touched = int((last - first).max(initial=0)) + 1
    if touched == 1:
        return cells
    full, cover = cells.full, cells.full | cells.partial
    for i in range(1, touched):
        cells = refine(lists(np.minimum(first + i, last)), view, grid)
        full, cover = full & cells.full, cover | cells.full | cells.partial
    return Cells(full, cover - full)
