"""Grid patterns whose blocks are named one by one: `Blocks` (any block mask) and `Random` (BigBird)."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from s2attn.core import bad_value
from s2attn.patterns.base import Head, check_heads, check_number, head_number
from s2attn.patterns.cells import Shape
from s2attn.patterns.grid import Grid, _check_grid
from s2attn.patterns.runs import Array, Runs, repeat_ranges

MOST_DRAWN = 256
"""Blocks that `Random` may draw for a row: drawing without replacement takes time in the square of it."""
_SHAPE = "must be a non-empty (q_blocks, k_blocks) or (masks, q_blocks, k_blocks) array of bools"


@lru_cache(maxsize=64)
def _bits(rows: tuple[str, ...]) -> Array:
    return np.array([[bit == "1" for bit in row] for row in rows], dtype=bool)


def _texts(mask: Any) -> tuple[tuple[str, ...], ...]:
    """A block mask, given as an array of bools, nested lists of them, or rows like "0110", as one tuple of texts per head."""
    mask = _plain(mask, 3)
    first = mask[0] if isinstance(mask, (list, tuple)) and mask else None
    nested = isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], (list, tuple, str))
    heads = mask if nested else [mask]
    texts = tuple(tuple(_text(row) for row in _listed(head)) for head in heads)
    shapes = {(len(head), len(row)) for head in texts for row in head}
    if len(shapes) != 1 or 0 in next(iter(shapes)) or len({len(head) for head in texts}) != 1:
        raise bad_value("Blocks mask", f"{_SHAPE}, the same for every head and row", reprlib.repr(mask))
    return texts


def _plain(mask: Any, axes: int) -> Any:
    """``mask`` with the arrays in its outer ``axes`` axes as lists."""
    if hasattr(mask, "tolist"):
        dtype = str(getattr(mask, "dtype", "")).rpartition(".")[2]
        if dtype != "bool":
            raise _no_bools(f"an array of {dtype or type(mask).__name__}")
        return mask.tolist()
    if isinstance(mask, (list, tuple)) and axes:
        return [_plain(entry, axes - 1) for entry in mask]
    return mask


def _listed(entries: Any) -> Any:
    if not isinstance(entries, (list, tuple)):
        raise bad_value("Blocks mask", _SHAPE, reprlib.repr(entries))
    return entries


def _text(row: Any) -> str:
    if isinstance(row, str):
        if set(row) - {"0", "1"}:
            raise bad_value("Blocks mask", "as text must hold only 0 and 1", reprlib.repr(row))
        return row
    for entry in _listed(row):
        if not isinstance(entry, bool):
            raise _no_bools(reprlib.repr(entry))
    return "".join("1" if entry else "0" for entry in row)


def _no_bools(came: str) -> TypeError:
    """Numbers may mean anything: 0 keeps a block in an additive mask and drops it in a mask of zeros and ones."""
    how = "mask == 0 of an additive mask, mask == 1 of zeros and ones, scores > threshold of scores"
    return TypeError(f"Blocks mask must hold bools, True where a block is seen ({how}); got {came}")


@dataclass(frozen=True, repr=False)
class Blocks(Grid):
    """Any block mask: block-sparse FlashAttention's pattern (arXiv:2205.14135, section 3.3).

    Args:
        mask: ``(q_blocks, k_blocks)`` or ``(masks, q_blocks, k_blocks)`` of bools, as an array, nested lists, or
            rows like "0110". Rows count query blocks by absolute position. Blocks outside of the mask are not
            seen. The number of masks divides that of the heads: each serves as many consecutive heads.
        block: tokens per block of the mask.
        heads: whether the masks are for the "kv" or the "query" heads.

    Raises:
        TypeError: numbers in place of bools; an additive mask, scores or a table of indices would mean something else.
        ValueError: any other shape, or in a call a number of masks that does not divide the heads.

    >>> Blocks([[True, False], [True, True]])
    Blocks(['10', '11'], block=64)
    """

    mask: Any
    block: int = 64
    heads: str = "kv"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", _texts(self.mask))
        _check_grid(self)
        check_heads(self.heads)
        super().__post_init__()

    @property
    def per_query_head(self) -> bool:
        return self.heads == "query" and len(self.mask) > 1

    def at(self, head: Head) -> Blocks:
        if len(self.mask) == 1:
            return self if self.heads == "kv" else replace(self, heads="kv")
        number, total = head_number(self.heads, head)
        if total % len(self.mask):
            rule = f"must hold masks whose number divides the {self.heads} heads of the call ({total})"
            raise bad_value("Blocks mask", rule, f"{len(self.mask)} masks")
        return Blocks([list(self.mask[number * len(self.mask) // total])], self.block)

    def sees(self, q_block: Array, k_block: Array, shape: Shape) -> Array:
        bits = _bits(self.mask[0])
        inside = (q_block >= 0) & (q_block < bits.shape[0]) & (k_block >= 0) & (k_block < bits.shape[1])
        return inside & bits[np.clip(q_block, 0, bits.shape[0] - 1), np.clip(k_block, 0, bits.shape[1] - 1)]

    def lists(self, q_block: Array, shape: Shape) -> Runs:
        bits = _bits(self.mask[0])
        inside = (q_block >= 0) & (q_block < bits.shape[0])
        edges = np.diff(np.pad(bits.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        line, start = np.nonzero(edges == 1)
        _, end = np.nonzero(edges == -1)
        ptr = np.searchsorted(line, np.arange(bits.shape[0] + 1))
        safe = np.clip(q_block, 0, bits.shape[0] - 1)
        rows, run = repeat_ranges(ptr[safe], np.where(inside, ptr[safe + 1] - ptr[safe], 0))
        return Runs.of(rows, start[run], 1, (end - start)[run], self.limit(shape))

    def to_dict(self) -> dict[str, Any]:
        mask = [list(head) for head in self.mask]
        return {"type": "Blocks", "mask": mask[0] if len(mask) == 1 else mask, "block": self.block, "heads": self.heads}

    def __repr__(self) -> str:
        mask = [list(head) for head in self.mask]
        heads = "" if self.heads == "kv" else f", heads={self.heads!r}"
        return f"Blocks({mask[0] if len(mask) == 1 else mask!r}, block={self.block}{heads})"


def _mix(*numbers: Array | int) -> Array:
    """A hash of integers to 64 bits (the finaliser of SplitMix64), the same on every machine."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for number in numbers:
            state = state + np.asarray(number).astype(np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


@dataclass(frozen=True)
class Random(Grid):
    """``n`` blocks drawn for every query block, other ones for every head (BigBird, arXiv:2007.14062, section 2).

    When causal, a query block draws among itself and the blocks before it, so a row reads the same blocks whatever comes after;
    otherwise among all blocks of the call. The draw is a pure function of seed, head and query block, without replacement; a query
    block with no more than ``n`` candidates reads them all.
    """

    n: int
    seed: int = 0
    block: int = 64
    heads: str = "kv"
    head: int | None = None

    def __post_init__(self) -> None:
        if self.head is not None:
            object.__setattr__(self, "head", check_number("Random head", self.head, 0))
        _check_grid(self, n=1, seed=0)
        if self.n > MOST_DRAWN:
            raise bad_value("Random n", f"must be at most {MOST_DRAWN}", self.n)
        check_heads(self.heads)
        super().__post_init__()

    @property
    def per_query_head(self) -> bool:
        return self.heads == "query" and self.head is None

    def at(self, head: Head) -> Random:
        if self.head is not None:
            return self if self.heads == "kv" else replace(self, heads="kv")
        number, total = head_number(self.heads, head)
        return replace(self, head=head.layer * total + number, heads="kv")

    def _drawn(self, q_block: Array, shape: Shape) -> tuple[Array, Array]:
        """The drawn blocks ``(rows, n)`` and which of them count (Floyd's sampling, all rows at once)."""
        candidates = np.maximum(0, q_block + 1 if shape.causal else np.full_like(q_block, self.limit(shape)))
        drawn = np.zeros((len(q_block), self.n), dtype=np.int64)
        counts = np.zeros((len(q_block), self.n), dtype=bool)
        for i in range(self.n):
            top = candidates - self.n + i
            few = candidates <= self.n
            pick = (_mix(self.seed, self.head or 0, q_block, i) % np.maximum(1, top + 1).astype(np.uint64)).astype(np.int64)
            taken = (drawn[:, :i] == pick[:, None]).any(axis=1) if i else np.zeros(len(q_block), dtype=bool)
            drawn[:, i] = np.where(few, i, np.where(taken, top, pick))
            counts[:, i] = np.where(few, i < candidates, True)
        return drawn, counts

    def sees(self, q_block: Array, k_block: Array, shape: Shape) -> Array:
        q_block, k_block = np.broadcast_arrays(q_block, k_block)
        rows, back = np.unique(q_block.ravel(), return_inverse=True)
        drawn, counts = self._drawn(rows, shape)
        # Pair by pair against that row's draws, one draw at a time, so that memory stays that of the question.
        flat, seen = k_block.ravel(), np.zeros(k_block.size, dtype=bool)
        for i in range(self.n):
            seen |= (drawn[:, i][back.ravel()] == flat) & counts[:, i][back.ravel()]
        return seen.reshape(k_block.shape)

    def lists(self, q_block: Array, shape: Shape) -> Runs:
        drawn, counts = self._drawn(q_block, shape)
        rows = np.broadcast_to(np.arange(len(q_block))[:, None], drawn.shape)
        return Runs.of(rows[counts], drawn[counts], 1, np.ones(int(counts.sum()), dtype=np.int64), self.limit(shape))
