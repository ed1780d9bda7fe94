"""The table of pieces: which part of which list each program walks, in what order, and which pieces are joined afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WHOLE = -1


@dataclass(frozen=True, eq=False)
class Schedule:
    """Pieces of lists in the order in which programs take them.

    An *item* is a line of a head, ``head * lines + line``. Its list has a full part and a part of other entries, each counted from 0; a
    piece is an interval of both. An item in one piece is written straight to the result. The pieces of any other item leave partial
    results in *slots* of a workspace, and a second kernel joins them in a fixed order: no atomics, the same bits every run.

    Attributes:
        pieces: ``(n, 6)`` int32: item, full entries from and to, other entries from and to, slot (``WHOLE`` = -1 when there is none).
        splits: ``(m, 3)`` int32: item, first slot, and the slot after its last, of every item with several pieces.

    Invariants:
        S1  the pieces of an item hold each of its entries exactly once, and an item that lists nothing has one empty piece
        S2  an item with one piece has no slot; the slots of any other are consecutive, its own, and in the order of its entries
        S3  inside a key range (there is one unless asked for) the longest pieces come first
    """

    pieces: np.ndarray
    splits: np.ndarray

    @property
    def slots(self) -> int:
        return int(self.splits[-1, 2]) if len(self.splits) else 0


def plan_by_length(full: np.ndarray, rest: np.ndarray, limit: np.ndarray | int, unit: int = 1) -> Schedule:
    """Cut the lists that are longer than ``limit`` into equal pieces; order all pieces the longest first.

    Args:
        full, rest: ``(heads, lines)`` entries of the two parts of each list.
        limit: ``(lines,)`` or one number: entries that a piece may have, at least 1; a piece may have ``unit - 1`` more.
        unit: entries that fill one tile; cuts lie at multiples of it.

    >>> made = plan_by_length(np.array([[1, 6, 0]]), np.array([[1, 1, 0]]), limit=4)
    >>> made.pieces.tolist()
    [[1, 0, 4, 0, 0, 0], [1, 4, 6, 0, 1, 1], [0, 0, 1, 0, 1, -1], [2, 0, 0, 0, 0, -1]]
    >>> made.splits.tolist()
    [[1, 0, 2]]
    """
    heads, lines = full.shape
    length = (full + rest).astype(np.int64).ravel()
    most = np.maximum(np.broadcast_to(limit, (heads, lines)).ravel(), 1)
    cuts = np.maximum(-(-length // most), 1)
    size = -(-np.maximum(-(-length // cuts), 1) // unit) * unit
    cuts = np.maximum(-(-length // size), 1)
    item = np.repeat(np.arange(heads * lines), cuts)
    inside = np.arange(len(item)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    begin = inside * size[item]
    end = np.minimum(begin + size[item], length[item])
    of_full = full.ravel().astype(np.int64)[item]
    intervals = [np.minimum(begin, of_full), np.minimum(end, of_full), np.maximum(begin - of_full, 0), np.maximum(end - of_full, 0)]
    return _ordered(item, intervals, np.zeros(len(item), np.int64), lines)


def plan_by_range(of_full: np.ndarray, of_rest: np.ndarray) -> Schedule:
    """Cut every list where its blocks cross from one range of the listed axis into the next; order by range, then the longest first.

    While programs work on one range of keys, its K and V stay in the second-level cache, however long the context is. It costs partial
    results for almost every line, so it pays only where K and V of the heads at work are far larger than that cache.

    Args:
        of_full, of_rest: ``(heads, lines, ranges)`` entries of the two parts of each list that lie in each range. Blocks ascend inside
            a part, so the entries of a range are neighbours.
    """
    heads, lines, ranges = of_full.shape
    ends = [np.cumsum(part.reshape(heads * lines, ranges).astype(np.int64), axis=1) for part in (of_full, of_rest)]
    begins = [np.concatenate([np.zeros_like(end[:, :1]), end[:, :-1]], axis=1) for end in ends]
    kept = (ends[0] > begins[0]) | (ends[1] > begins[1])
    kept[~kept.any(axis=1), :1] = True  # an item that lists nothing
    item, number = np.nonzero(kept)
    return _ordered(item, [begins[0][kept], ends[0][kept], begins[1][kept], ends[1][kept]], number, lines)


def _ordered(item: np.ndarray, intervals: list[np.ndarray], number: np.ndarray, lines: int) -> Schedule:
    """Give slots to the pieces (sorted by item), then sort: by range, the longest first, line after line, heads side by side."""
    items = int(item[-1]) + 1 if len(item) else 0
    count = np.bincount(item, minlength=items)
    several = count[item] > 1
    slot = np.where(several, np.cumsum(several) - 1, WHOLE)
    split = np.flatnonzero(count > 1)
    last = np.cumsum(count[split])
    length = intervals[1] - intervals[0] + intervals[3] - intervals[2]
    order = np.lexsort((item // max(lines, 1), item % max(lines, 1), -length, number))
    pieces = np.stack([item, *intervals, slot], axis=1)[order]
    return Schedule(pieces.astype(np.int32), np.stack([split, last - count[split], last], axis=1).astype(np.int32))
