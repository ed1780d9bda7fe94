"""Sets of key blocks per row as arithmetic progressions: the interval arithmetic under every layout.

A row of a million-token stripe pattern lists hundreds of blocks, but it is a handful of progressions. All set operations here cost
time in the number of progressions, not of blocks, and work on all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

# Keys that sort (row, block) pairs: a row has room for 2**31 blocks on either side of zero.
_ROW = np.int64(1) << 32
_HALF = np.int64(1) << 31


def ranges(first: Array, count: Array) -> Array:
    """The numbers ``first[i] .. first[i] + count[i] - 1`` of every i, one after another.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    before = np.cumsum(count) - count
    return np.arange(int(count.sum()), dtype=np.int64) + np.repeat(first - before, count)


def repeat_ranges(first: Array, count: Array) -> tuple[Array, Array]:
    """The same numbers, behind the i that each belongs to."""
    return np.repeat(np.arange(len(count)), count), ranges(first, count)


@dataclass(frozen=True, eq=False)
class Runs:
    """Sets of integers, one per row, each a list of arithmetic progressions ``start, start + step, ...`` of ``count`` members.

    Invariants: R1 sorted by (row, start); R2 counts are >= 1, and a single member has step 1; R3 the spans ``start .. last`` of a row's
    progressions do not touch each other's inside, so members ascend when the progressions are written out one after another.
    """

    row: Array
    start: Array
    step: Array
    count: Array

    @classmethod
    def of(cls, row: Array, start: Array, step: Array | int, count: Array, limit: int) -> Runs:
        """Any progressions, cut to members in ``[0, limit)`` and brought into canonical form."""
        row, start, count = (np.asarray(x, dtype=np.int64) for x in np.broadcast_arrays(row, start, count))
        step = np.broadcast_to(np.asarray(step, dtype=np.int64), row.shape)
        return _canonical(*_cut(np.int64(0), np.int64(limit - 1), row, start, step, count))

    @classmethod
    def none(cls) -> Runs:
        empty = np.zeros(0, dtype=np.int64)
        return cls(empty, empty, empty, empty)

    @classmethod
    def intervals(cls, lo: Array, hi: Array, limit: int) -> Runs:
        """Row i holds ``lo[i] .. hi[i]``, both included; nothing when ``hi < lo``."""
        return cls.of(np.arange(len(lo)), lo, 1, np.asarray(hi) - lo + 1, limit)

    @property
    def last(self) -> Array:
        return self.start + (self.count - 1) * self.step

    def __len__(self) -> int:
        return len(self.row)

    def __or__(self, other: Runs) -> Runs:
        if not len(other):
            return self
        if not len(self):
            return other
        return _canonical(*(np.concatenate(pair) for pair in zip(_parts(self), _parts(other), strict=True)))

    def __and__(self, other: Runs) -> Runs:
        a, b = _overlapping(self, other)
        lo, hi = np.maximum(self.start[a], other.start[b]), np.minimum(self.last[a], other.last[b])
        step_a, step_b = self.step[a], other.step[b]
        # The progression with the wider step is cut to the common span; its members must then be members of the other one.
        wide_a = step_a >= step_b
        wide = [np.where(wide_a, x[a], y[b]) for x, y in zip(_parts(self), _parts(other), strict=True)]
        row, start, step, count = _cut(lo, hi, *wide, keep_empty=True)
        dense_start, dense_step = np.where(wide_a, other.start[b], self.start[a]), np.where(wide_a, step_b, step_a)
        aligned = (start - dense_start) % dense_step == 0
        simple = (dense_step == 1) | ((step % dense_step == 0) & aligned)
        if not (mixed := ~simple & (count > 0) & (step % dense_step != 0)).any():
            keep = simple & (count > 0)
            return _singles(row[keep], start[keep], step[keep], count[keep])
        owner, member = _members(start[mixed], step[mixed], count[mixed])
        hit = (member - dense_start[mixed][owner]) % dense_step[mixed][owner] == 0
        keep = simple & (count > 0)
        one = np.ones(int(hit.sum()), dtype=np.int64)
        extra = (row[mixed][owner][hit], member[hit], one, one)
        return _canonical(*(np.concatenate([x[keep], y]) for x, y in zip((row, start, step, count), extra, strict=True)))

    def __sub__(self, other: Runs) -> Runs:
        if not len(self) or not len(other):
            return self
        plain = other.step == 1
        left = _outside(self, _take(other, plain))
        strided = _take(other, ~plain)
        a, _ = _overlapping(left, strided)
        if not len(a):
            return left
        touched = np.zeros(len(left), dtype=bool)
        touched[a] = True
        part = _take(left, touched)
        owner, member = _members(part.start, part.step, part.count)
        points = _canonical(part.row[owner], member, np.ones_like(member), np.ones_like(member), merge=False)
        i, j = _overlapping(points, strided)
        gone = np.zeros(len(points), dtype=bool)
        gone[i[(points.start[i] - strided.start[j]) % strided.step[j] == 0]] = True
        return _take(left, ~touched) | _take(points, ~gone)

    def below(self, end: Array) -> Runs:
        """The members of row i that are at most ``end[i]``."""
        return _singles(*_cut(-_HALF, end[self.row], *_parts(self)))

    def above(self, begin: Array) -> Runs:
        """The members of row i that are greater than ``begin[i]``."""
        return _singles(*_cut(begin[self.row] + 1, _HALF, *_parts(self)))

    def expand(self) -> tuple[Array, Array]:
        """All members as ``(row, member)``, ascending."""
        owner, member = _members(self.start, self.step, self.count)
        return self.row[owner], member

    def counts(self, rows: int) -> Array:
        """Members of each row."""
        return np.bincount(self.row, weights=self.count, minlength=rows).astype(np.int64)


def _parts(runs: Runs) -> tuple[Array, Array, Array, Array]:
    return runs.row, runs.start, runs.step, runs.count


def _take(runs: Runs, mask: Array) -> Runs:
    return Runs(*(part[mask] for part in _parts(runs)))


def _key(row: Array, value: Array) -> Array:
    return row * _ROW + (value + _HALF)


def _members(start: Array, step: Array, count: Array) -> tuple[Array, Array]:
    owner, inside = repeat_ranges(np.zeros_like(start), count)
    return owner, start[owner] + inside * step[owner]


def _singles(row: Array, start: Array, step: Array, count: Array) -> Runs:
    return Runs(row, start, np.where(count == 1, 1, step), count)


def _cut(
    lo: Array | np.int64, hi: Array | np.int64, row: Array, start: Array, step: Array, count: Array, *, keep_empty: bool = False
) -> tuple[Array, Array, Array, Array]:
    """Keep the members in ``lo .. hi`` (both included)."""
    skip = np.maximum(0, -((start - lo) // step))
    last = start + (count - 1) * step
    first = start + skip * step
    count = np.maximum(0, (np.minimum(last, hi) - first) // step + 1)
    if keep_empty:
        return row, first, step, count
    keep = count > 0
    return row[keep], first[keep], step[keep], count[keep]


def _canonical(row: Array, start: Array, step: Array, count: Array, *, merge: bool = True) -> Runs:
    """Sort, and make the spans of each row disjoint without changing the sets."""
    step = np.where(count == 1, 1, step)
    key = _key(row, start)
    if len(key) > 1 and not (key[1:] > key[:-1]).all():
        order = np.argsort(key, kind="stable")
        row, start, step, count, key = row[order], start[order], step[order], count[order], key[order]
    runs = Runs(row, start, step, count)
    if not merge or not _overlapping_rows(runs).size:
        return runs
    intervals = _merged(_take(runs, step == 1))
    runs = _sorted(intervals, _outside(_take(runs, step > 1), intervals))
    crossing = _overlapping_rows(runs)
    if not crossing.size:
        return runs
    # Progressions of different steps that cross each other: write those rows out and read them back as intervals.
    bad = np.isin(runs.row, crossing)
    some_row, member = _take(runs, bad).expand()
    return _sorted(_take(runs, ~bad), _from_keys(np.unique(_key(some_row, member))))


def _sorted(a: Runs, b: Runs) -> Runs:
    parts = [np.concatenate(pair) for pair in zip(_parts(a), _parts(b), strict=True)]
    order = np.argsort(_key(parts[0], parts[1]), kind="stable")
    return Runs(*(part[order] for part in parts))


def _overlapping_rows(runs: Runs) -> Array:
    """Rows in which a progression starts before the span of an earlier one has ended."""
    if len(runs) < 2:
        return runs.row[:0]
    reached = np.maximum.accumulate(_key(runs.row, runs.last))
    return np.unique(runs.row[1:][_key(runs.row, runs.start)[1:] <= reached[:-1]])


def _merged(intervals: Runs) -> Runs:
    """Join touching or overlapping intervals (step 1, sorted)."""
    if len(intervals) < 2:
        return intervals
    reached = np.maximum.accumulate(_key(intervals.row, intervals.last))
    new = np.concatenate([[True], _key(intervals.row, intervals.start)[1:] > reached[:-1] + 1])
    first = np.flatnonzero(new)
    row, start = intervals.row[first], intervals.start[first]
    last = reached[np.append(first[1:], len(new)) - 1] - row * _ROW - _HALF
    return Runs(row, start, np.ones_like(row), last - start + 1)


def _overlapping(a: Runs, b: Runs) -> tuple[Array, Array]:
    """All pairs (i, j) of progressions of one row whose spans meet."""
    first = np.searchsorted(_key(b.row, b.last), _key(a.row, a.start), side="left")
    end = np.searchsorted(_key(b.row, b.start), _key(a.row, a.last), side="right")
    return repeat_ranges(first, np.maximum(0, end - first))


def _outside(runs: Runs, intervals: Runs) -> Runs:
    """Remove disjoint, sorted intervals: every progression is cut to the gaps between the intervals that it meets."""
    if not len(intervals) or not len(runs):
        return runs
    first = np.searchsorted(_key(intervals.row, intervals.last), _key(runs.row, runs.start), side="left")
    end = np.searchsorted(_key(intervals.row, intervals.start), _key(runs.row, runs.last), side="right")
    met = np.maximum(0, end - first)
    owner, gap = repeat_ranges(np.zeros_like(met), met + 1)
    before, after = first[owner] + gap - 1, first[owner] + gap
    safe_before, safe_after = np.clip(before, 0, len(intervals) - 1), np.clip(after, 0, len(intervals) - 1)
    lo = np.where(gap == 0, -_HALF + 1, intervals.last[safe_before] + 1)
    hi = np.where(gap == met[owner], _HALF - 1, intervals.start[safe_after] - 1)
    return _singles(*_cut(lo, hi, *(part[owner] for part in _parts(runs))))


def _from_keys(keys: Array) -> Runs:
    """Sorted unique (row, member) keys as intervals."""
    new = np.concatenate([[True], keys[1:] != keys[:-1] + 1])
    first = np.flatnonzero(new)
    row = keys[first] // _ROW
    count = np.diff(np.append(first, len(keys)))
    return Runs(row, keys[first] - row * _ROW - _HALF, np.ones_like(row), count)
