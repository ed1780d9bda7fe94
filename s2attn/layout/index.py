"""The two records that a kernel walks: compressed lists of blocks, and where each block lies in the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2attn.core import bad_value

MOST_TOKENS = 2**31 - 1
"""Tokens of queries, or of keys, in a layout."""


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Compressed lists of blocks: for every (head, line), the blocks of the other axis that it meets, full ones first.

    A *line* is a query block (rows, CSR) or a key block (columns, CSC). Nothing is padded to the longest line, and heads with equal
    lists may point to the same storage, so ``ptr`` holds absolute offsets.

    Attributes:
        ptr: ``(heads, lines + 1)`` int64; line i of head h is ``idx[ptr[h, i]:ptr[h, i + 1]]``.
        full: ``(heads, lines)`` int32; so many of a line's first entries are full, the rest are partial.
        tile_ptr: ``(heads, lines)`` int64; the j-th partial entry of a line uses mask tile ``tile[tile_ptr[h, i] + j]``.
        idx: ``(entries,)`` int32 block numbers of the other axis, ascending inside the full and inside the partial part.
        tile: ``(partial entries,)`` int32 numbers of mask tiles.
    """

    ptr: Tensor
    full: Tensor
    tile_ptr: Tensor
    idx: Tensor
    tile: Tensor

    @property
    def heads(self) -> int:
        return self.full.shape[0]

    @property
    def lines(self) -> int:
        return self.full.shape[1]

    @property
    def counts(self) -> Tensor:
        """Entries of each line, ``(heads, lines)`` int64."""
        return self.ptr[:, 1:] - self.ptr[:, :-1]

    @property
    def entries(self) -> int:
        """Listed blocks over all heads (heads that share storage count each)."""
        return int((self.ptr[:, -1] - self.ptr[:, 0]).sum())

    @property
    def nbytes(self) -> int:
        """Bytes that the index really holds."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        return [self.ptr, self.full, self.tile_ptr, self.idx, self.tile]

    def to(self, device: torch.device | str) -> BlockIndex:
        return BlockIndex(*(t.to(device) for t in self.tensors()))

    def line(self, head: int, line: int) -> tuple[list[int], list[tuple[int, int]]]:
        """One line as Python numbers: its full blocks, and its partial ones as (block, mask tile)."""
        lo, hi = int(self.ptr[head, line]), int(self.ptr[head, line + 1])
        mid, first = lo + int(self.full[head, line]), int(self.tile_ptr[head, line])
        tiles = self.tile[first : first + hi - mid].tolist()
        return self.idx[lo:mid].tolist(), list(zip(self.idx[mid:hi].tolist(), tiles, strict=True))


@dataclass(frozen=True, eq=False)
class Spans:
    """Where the blocks of one axis lie: int32 vectors with one number per block.

    Attributes:
        start: first token of the block in the (packed) tensor.
        length: tokens in the block; only the last block of a sequence may have fewer than ``block``.
        seq: number of the sequence that the block belongs to (0 when nothing is packed).
        pos: position of the block's first token inside its sequence, counted like keys (queries sit at the end: ``i + S - T``).
    """

    start: Tensor
    length: Tensor
    seq: Tensor
    pos: Tensor

    def __len__(self) -> int:
        return self.start.shape[0]

    @property
    def total(self) -> int:
        """Tokens on this axis."""
        return int(self.start[-1] + self.length[-1]) if len(self) else 0

    def sequences(self) -> list[int]:
        """Tokens of each sequence, up to the last one that has any; waits for the device."""
        if not len(self):
            return []
        seq, length = self.seq.long().cpu(), self.length.long().cpu()
        return torch.zeros(int(seq[-1]) + 1, dtype=torch.int64).index_add_(0, seq, length).tolist()

    @property
    def nbytes(self) -> int:
        return 4 * self.start.element_size() * len(self)

    def tensors(self) -> list[Tensor]:
        return [self.start, self.length, self.seq, self.pos]

    def to(self, device: torch.device | str) -> Spans:
        return Spans(*(t.to(device) for t in self.tensors()))


def spans_of(lengths: Sequence[int], block: int, offsets: Sequence[int] | None = None) -> Spans:
    """Cut sequences that lie one after another into blocks; ``offsets`` are the positions of their first tokens.

    >>> s = spans_of([100, 0, 64], block=64)
    >>> s.start.tolist(), s.length.tolist(), s.seq.tolist(), s.pos.tolist()
    ([0, 64, 100], [64, 36, 64], [0, 0, 2], [0, 64, 0])
    """
    if sum(lengths) > MOST_TOKENS:
        raise bad_value("lengths", f"must have at most {MOST_TOKENS} tokens in all, since a layout counts in int32", sum(lengths))
    length = np.asarray(lengths, dtype=np.int64)
    blocks = -(-length // block)
    seq = np.repeat(np.arange(len(length)), blocks)
    inside = (np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)) * block
    first = np.cumsum(length) - length
    pos = inside if offsets is None else inside + np.asarray(offsets, dtype=np.int64)[seq]
    parts = (inside + first[seq], np.minimum(block, length[seq] - inside), seq, pos)
    return Spans(*(torch.from_numpy(part.astype(np.int32)) for part in parts))
