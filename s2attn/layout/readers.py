"""Until when a key is needed: the last query that reads each block of keys, from the same arithmetic as a layout."""

from __future__ import annotations

import numpy as np

from s2attn.core import check_block, check_int
from s2attn.layout.build import lists_of
from s2attn.layout.tiles import TileTable
from s2attn.patterns import Pattern, Shape, View
from s2attn.patterns.runs import Array

_ROWS = 64
"""Query blocks that are looked at together: they write out all blocks that they list."""


def last_readers(pattern: Pattern, seqlen: int, block: int) -> Array:
    """The position of the last query among ``seqlen`` that reads some key of each block, exact to the token; -1 where none does.

    Causal: a query at position p reads keys up to p. Time grows with the listed blocks, memory with the sequence.

    Args:
        pattern: of one head (resolved with ``.at(head)``).
        seqlen: tokens of queries and of keys.
        block: tokens per block.

    Returns:
        ``(ceil(seqlen / block),)`` int64.

    >>> from s2attn.patterns import Sink, Window
    >>> last_readers(Sink(4) | Window(20), seqlen=100, block=16).tolist()
    [99, 50, 66, 82, 98, 99, 99]
    """
    check_int("seqlen", seqlen, 0)
    check_block("block", block)
    blocks = -(-seqlen // block)
    found = np.full(blocks, -1, dtype=np.int64)
    tiles, shape = TileTable(block), Shape(seqlen)
    for high in range(blocks, 0, -_ROWS):  # from the end, so that the first reader met is the last one
        rows = np.arange(max(0, high - _ROWS), high, dtype=np.int64)
        q_lo = rows * block
        length = np.minimum(block, seqlen - q_lo)
        lists = lists_of(pattern, View(q_lo, q_lo + length - 1, block, shape), length, tiles)
        idx = np.empty(int(lists.count.sum()), dtype=np.int32)
        lists.write(idx, 0)
        row = np.repeat(np.arange(len(rows)), lists.count)
        inside = np.arange(len(idx)) - np.repeat(np.cumsum(lists.count) - lists.count, lists.count)
        last = (q_lo + length - 1)[row]
        partial = inside >= lists.full[row]
        last[partial] = q_lo[row[partial]] + _last_rows(tiles)[lists.tile]
        here = np.full(blocks, -1, dtype=np.int64)
        here[idx] = last  # entries stand row by row, and the last assignment to an element stays
        found = np.where(found < 0, here, found)
        if (found >= 0).all():
            break
    return found


def _last_rows(tiles: TileTable) -> Array:
    """The last query of each mask tile that sees anything."""
    some = tiles.tensor().any(dim=2).numpy()
    return some.shape[1] - 1 - np.argmax(some[:, ::-1], axis=1) if len(some) else np.zeros(0, dtype=np.int64)
