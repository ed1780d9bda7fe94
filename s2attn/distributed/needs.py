"""Which key blocks the rows of each rank list, per KV head, as progressions: what a plan and its bytes are counted from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from s2attn.distributed.pieces import Asked, QueryPieces
from s2attn.layout.build import Lists, lists_of
from s2attn.layout.tiles import TileTable
from s2attn.patterns import Pattern, Shape, View
from s2attn.patterns.runs import Array, Runs

_RANKS = 64
"""Ranks that are looked at together."""
_CELLS = 1 << 24
"""Pairs of a rank and a block that are written out together."""
_SPARSE = 16
"""Up to one block in so many, sorting those that are listed is quicker than marking them among all."""


@dataclass(frozen=True)
class Part:
    """The lists of some pieces of one sequence: ``pieces`` their numbers, ``lists`` of each pattern, ``first_block`` of the sequence."""

    pieces: Array
    lists: list[Lists]
    first_block: int


def lists_of_pieces(patterns: list[Pattern], asked: Asked, pieces: QueryPieces, which: Array, tiles: TileTable) -> list[Part]:
    """What the pieces ``which`` (their numbers) list, sequence after sequence."""
    parts = []
    order = which[np.argsort(pieces.seq[which], kind="stable")]
    for mine in np.split(order, np.flatnonzero(np.diff(pieces.seq[order])) + 1):
        if not len(mine):
            continue
        seq, q_lo, length = int(pieces.seq[mine[0]]), pieces.pos[mine], pieces.length[mine]
        view = View(q_lo, q_lo + length - 1, asked.block, Shape(asked.lengths[seq], asked.causal))
        lists = [lists_of(pattern, view, length, tiles) for pattern in patterns]
        parts.append(Part(mine, lists, int(asked.first_block[seq])))
    return parts


@dataclass(frozen=True)
class Needed:
    """What the ranks ``low .. high - 1`` need.

    Attributes:
        blocks: for every distinct group of ``Asked.groups``, a row of key blocks for each of these ranks.
        listed: entries of the lists of each of these ranks, over all query heads: its work.
    """

    low: int
    high: int
    blocks: dict[frozenset[Pattern], Runs]
    listed: Array


def needs(asked: Asked, pieces: QueryPieces, low: int = 0, high: int | None = None) -> Iterator[Needed]:
    """What ranks need, some ranks at a time; time grows with the rows of all ranks, not with the blocks that they list."""
    patterns = list(dict.fromkeys(asked.resolved))
    tiles, end = TileTable(asked.block), asked.shards.ranks if high is None else high
    for first in range(low, end, _RANKS):
        last = min(first + _RANKS, end)
        which = np.arange(pieces.rank_ptr[first], pieces.rank_ptr[last])
        parts = lists_of_pieces(patterns, asked, pieces, which, tiles)
        found: dict[Pattern, list[tuple[Array, ...]]] = {pattern: [] for pattern in patterns}
        listed = np.zeros(last - first, dtype=np.int64)
        for part in parts:
            rank = pieces.rank[part.pieces] - first
            for pattern, lists in zip(patterns, part.lists, strict=True):
                runs = lists.runs
                np.add.at(listed, rank, lists.count * (asked.resolved.count(pattern) * asked.num_heads // len(asked.resolved)))
                found[pattern].append((rank[runs.row], runs.start + part.first_block, runs.step, runs.count))
        joined = {}
        for group in dict.fromkeys(asked.groups):
            several = [one for pattern in group for one in found[pattern]]
            row, start, step, count = (np.concatenate(column) for column in zip(*several, strict=True))
            joined[group] = union_rows(row, start, step, count, last - first, asked.blocks)
        yield Needed(first, last, joined, listed)


def union_rows(row: Array, start: Array, step: Array, count: Array, rows: int, limit: int) -> Runs:
    """The union of progressions that may overlap in any way, row by row.

    >>> r = union_rows(np.array([0, 0, 1]), np.array([2, 6, 1]), np.array([4, 4, 1]), np.array([3, 2, 2]), 2, 99)
    >>> r.row.tolist(), r.start.tolist(), r.step.tolist(), r.count.tolist()
    ([0, 1], [2, 1], [4, 1], [3, 2])
    """
    row, start, step, count = _merged_alike(row, start, step, count)
    strided = np.bincount(row[step > 1], minlength=rows)
    # Progressions of several steps or residues cross each other: few members are sorted, many are marked among all blocks.
    members = np.bincount(row, weights=count, minlength=rows)
    many = np.flatnonzero((strided > 1) & (members > limit / _SPARSE))
    crossing = np.zeros(rows, dtype=bool)
    crossing[many] = True
    plain = ~crossing[row]
    parts = [Runs.of(row[plain], start[plain], step[plain], count[plain], limit)]
    at_once = max(1, _CELLS // max(1, limit))
    for some in (many[i : i + at_once] for i in range(0, len(many), at_once)):
        mine = np.isin(row, some)
        written = _written(np.searchsorted(some, row[mine]), start[mine], step[mine], count[mine], len(some), limit)
        parts.append(Runs(some[written.row], written.start, written.step, written.count))
    if len(parts) == 1:
        return parts[0]
    columns = [np.concatenate(column) for column in zip(*((p.row, p.start, p.step, p.count) for p in parts), strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return Runs(*(column[order] for column in columns))


def _merged_alike(row: Array, start: Array, step: Array, count: Array) -> tuple[Array, Array, Array, Array]:
    """Progressions of one row, step and residue that touch or overlap become one."""
    step = np.where(count == 1, 1, step)
    kind, which = np.unique(step * (1 << 31) + start % step, return_inverse=True)
    turn = start // step
    key = ((row * len(kind) + which.reshape(-1)) << 32) + turn
    order = np.argsort(key, kind="stable")
    key, count = key[order], count[order]
    reached = np.maximum.accumulate(key + count - 1) if len(key) else key
    first = np.flatnonzero(np.concatenate([[True], key[1:] > reached[:-1] + 1])) if len(key) else np.zeros(0, dtype=np.int64)
    if not len(first):
        return row, start, step, count
    length = reached[np.append(first[1:], len(key)) - 1] - key[first] + 1
    row, start, step = row[order][first], start[order][first], step[order][first]
    return row, start, np.where(length == 1, 1, step), length


def _written(row: Array, start: Array, step: Array, count: Array, rows: int, limit: int) -> Runs:
    """The same union through one bool for each row and block, read back as intervals."""
    seen = np.zeros((rows, limit), dtype=bool)
    for one in np.unique(step):
        mine = step == one
        width = -(-(limit + one) // one) * one
        edge = np.zeros((rows, width), dtype=np.int16)
        np.add.at(edge, (row[mine], start[mine]), 1)
        np.add.at(edge, (row[mine], start[mine] + count[mine] * one), -1)
        seen |= edge.reshape(rows, -1, one).cumsum(axis=1, dtype=np.int16).reshape(rows, width)[:, :limit] > 0
    edges = np.diff(np.pad(seen.view(np.int8), ((0, 0), (1, 1))), axis=1)
    at_row, at = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    return Runs(at_row, at, np.ones_like(at), end - at)


def holds(runs: Runs, row: Array, block: Array) -> Array:
    """Whether each (row, block) is a member; arrays of one shape, and runs whose progressions do not cross."""
    if not len(runs):
        return np.zeros(len(row), dtype=bool)
    place = np.searchsorted((runs.row << 32) + runs.start, (row << 32) + block, side="right") - 1
    at = np.maximum(place, 0)
    inside = (place >= 0) & (runs.row[at] == row) & (block <= runs.last[at])
    return inside & ((block - runs.start[at]) % runs.step[at] == 0)


class Tally:
    """Sums over progressions: how many of them each block is in, and how many tokens each holds; time by distinct steps, not by members."""

    def __init__(self, block_length: Array):
        self._length = block_length
        self._edges: dict[int, Array] = {}
        self._sums: dict[int, Array] = {}

    def _width(self, step: int) -> int:
        return -(-(len(self._length) + step) // step) * step

    def add(self, runs: Runs, times: int = 1) -> None:
        """Count the members of all rows, ``times`` each."""
        for step in np.unique(runs.step).tolist():
            mine = runs.step == step
            edge = self._edges.setdefault(step, np.zeros(self._width(step), dtype=np.int64))
            np.add.at(edge, runs.start[mine], times)
            np.add.at(edge, runs.last[mine] + step, -times)

    def counts(self) -> Array:
        """How often each block was counted."""
        total = np.zeros(len(self._length), dtype=np.int64)
        for step, edge in self._edges.items():
            total += edge.reshape(-1, step).cumsum(axis=0).ravel()[: len(total)]
        return total

    def tokens(self, runs: Runs, rows: int) -> Array:
        """Tokens of the members of each row."""
        total = np.zeros(rows, dtype=np.int64)
        for step in np.unique(runs.step).tolist():
            mine = runs.step == step
            if step not in self._sums:
                padded = np.pad(self._length, (step, self._width(step) - len(self._length)))  # tokens before a block, in steps
                self._sums[step] = padded.reshape(-1, step).cumsum(axis=0).ravel()
            sums = self._sums[step]
            held = sums[runs.last[mine] + step] - sums[runs.start[mine]]
            np.add.at(total, runs.row[mine], held)
        return total
