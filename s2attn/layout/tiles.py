"""The deduplicated table of mask tiles, and the token-level look at perhaps partial blocks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from s2attn.patterns import CAUSAL, Pattern, View
from s2attn.patterns.runs import Array

_AT_ONCE = 1 << 24  # token pairs whose masks are computed together


class TileTable:
    """Distinct ``block x block`` masks, numbered as they come (FastAttention's tiling-mask, arXiv:2410.16663, in its general form)."""

    EMPTY, FULL = -2, -1

    def __init__(self, block: int):
        self.block = block
        self._numbers: dict[bytes, int] = {}

    def number(self, masks: Array, inside: Array) -> Array:
        """A number per ``(n, block, block)`` mask: EMPTY, FULL (where all of ``inside`` is allowed), or that of its tile.

        ``inside`` marks what may count: pairs whose query exists. A pair whose key does not exist makes a mask partial.
        """
        numbers = np.full(len(masks), self.EMPTY, dtype=np.int64)
        full = (masks | ~inside).all(axis=(1, 2))
        some = masks.any(axis=(1, 2))
        numbers[full & some] = self.FULL
        for i in np.flatnonzero(some & ~full):
            numbers[i] = self._numbers.setdefault(np.packbits(masks[i]).tobytes(), len(self._numbers))
        return numbers

    def tensor(self) -> Tensor:
        """All tiles, ``(num_tiles, block, block)`` bool."""
        size = self.block * self.block
        bits = np.frombuffer(b"".join(self._numbers), dtype=np.uint8).reshape(len(self._numbers), size // 8)
        tiles = np.unpackbits(bits, axis=1).astype(bool).reshape(-1, self.block, self.block)
        return torch.from_numpy(tiles)


def classify(pattern: Pattern, view: View, q_length: Array, row: Array, col: Array, tiles: TileTable) -> Array:
    """The tile number of each (row, col) block, EMPTY or FULL where its tokens say so; equal signatures are looked at once."""
    if not len(row):
        return np.zeros(0, dtype=np.int64)
    block, shape = view.block, view.shape
    q_lo, k_lo = view.q_lo[row], col * block
    k_length = np.minimum(block, shape.seqlen_k - k_lo)
    columns = [q_length[row], k_length, *pattern.signature(q_lo, k_lo, block, shape)]
    if shape.causal:
        columns += CAUSAL.signature(q_lo, k_lo, block, shape)
    first, back = _distinct(columns)
    numbers = np.empty(len(first), dtype=np.int64)
    step, token = max(1, _AT_ONCE // (block * block)), np.arange(block)
    for at in range(0, len(first), step):
        some = first[at : at + step]
        q = (q_lo[some][:, None] + token)[:, :, None]
        k = (k_lo[some][:, None] + token)[:, None, :]
        exists = np.broadcast_to((token < q_length[row][some][:, None])[:, :, None], (len(some), block, block))
        numbers[at : at + step] = tiles.number(pattern.allowed(q, k, shape) & exists, exists)
    return numbers[back]


def _distinct(columns: list[Array]) -> tuple[Array, Array]:
    """Places of the first of each distinct row of ``columns``, and for every row the number of its distinct one."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    size = 1
    for column in columns:
        low, high = int(column.min()), int(column.max())
        if low == high:
            continue
        if high - low >= 1 << 30 or size * (high - low + 1) >= 1 << 62:  # numbers too wide to be packed into one: rank them first
            _, code = np.unique(code, return_inverse=True)
            _, column = np.unique(column, return_inverse=True)
            size, low, high = int(code.max()) + 1, 0, int(column.max())
        code = code * (high - low + 1) + (column - low)
        size *= high - low + 1
    if size <= 1:
        return np.zeros(1, dtype=np.int64), np.zeros(len(code), dtype=np.int64)
    _, first, back = np.unique(code, return_index=True, return_inverse=True)
    return first, back.reshape(-1)
