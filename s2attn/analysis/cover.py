"""Completeness: whether the heads, and the layers, together read the whole context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2attn.analysis.stack import Stack
from s2attn.patterns.runs import Array

_LONGEST_PERIOD = 4096


@dataclass(frozen=True)
class Cover:
    """Which of the other blocks the last query block reads, through any of some heads.

    Attributes:
        covered, earlier: blocks that are read, and blocks that there are beside the last row's own.
        missing: the others in words ("" when there are none).
    """

    covered: int
    earlier: int
    missing: str

    @property
    def complete(self) -> bool:
        return self.covered == self.earlier

    def __str__(self) -> str:
        return f"{self.covered} of {self.earlier} earlier blocks"


def last_row(stack: Stack, layer: int) -> Array:
    """What the last query block reads in one layer through all heads, ``(blocks,)`` bool."""
    seen = np.zeros(stack.num_blocks, dtype=bool)
    for keys in stack.groups(layer):
        seen |= stack.once(_group_row, keys)
    return seen


def least_group_row(stack: Stack, layer: int) -> Array:
    """What the last query block reads in one layer through the query heads of one KV head, the one that reads the least."""
    return min((stack.once(_group_row, keys) for keys in stack.groups(layer)), key=lambda seen: int(seen.sum()))


def _group_row(stack: Stack, keys: frozenset) -> Array:
    seen = np.zeros(stack.num_blocks, dtype=bool)
    for key in keys:
        seen |= stack.lists(key).of_rows(np.array([stack.num_blocks - 1]))
    return seen


def cover_of(seen: Array) -> Cover:
    """The cover of a ``(blocks,)`` bool vector whose last block is the row's own."""
    return Cover(int(seen[:-1].sum()), len(seen) - 1, name_blocks(~seen[:-1]))


def name_blocks(chosen: Array) -> str:
    """A set of block numbers in words: as residues where it is periodic, else as ranges.

    >>> name_blocks(np.arange(64) % 8 > 4)
    'j % 8 in {5..7} among blocks 5..63'
    >>> name_blocks(np.isin(np.arange(9), [2, 3, 7]))
    'blocks 2..3, 7'
    """
    numbers = np.flatnonzero(chosen)
    if not len(numbers):
        return ""
    first, last = int(numbers[0]), int(numbers[-1])
    period = _period(chosen[first : last + 1])
    if period is None or period == 1:
        return f"blocks {_ranges(numbers)}" if last > first else f"block {first}"
    residues = np.unique(numbers % period)
    return f"j % {period} in {{{_ranges(residues, 8)}}} among blocks {first}..{last}"


def _period(chosen: Array) -> int | None:
    """The smallest period that is seen at least twice, or None."""
    last = min(_LONGEST_PERIOD, len(chosen) // 2)
    alike = np.flatnonzero(chosen[1 : last + 1] == chosen[0]) + 1
    return next((int(period) for period in alike if np.array_equal(chosen[period:], chosen[:-period])), None)


def _ranges(numbers: Array, most: int = 6) -> str:
    """Ascending numbers as ranges; only the first of many are written out."""
    cuts = np.flatnonzero(np.diff(numbers) > 1) + 1
    parts = np.split(numbers, cuts)
    texts = [f"{part[0]}..{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts[:most]]
    return ", ".join(texts) + (f", ... ({len(numbers)} in all)" if len(parts) > most else "")
