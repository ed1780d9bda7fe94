"""`Shards`: which tokens of a sequence (or of packed sequences) each rank of a group holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.patterns.runs import Array, ranges

NAMED = ("contiguous", "zigzag")
"""Shardings that a length and a number of ranks say everything about."""
MOST_RANKS = 1 << 16
MOST_TOKENS = 1 << 40
"""Larger numbers are taken for mistakes: plans count in int64, and lists grow with the ranks."""


@dataclass(frozen=True, eq=False)
class Shards:
    """Which tokens every rank holds: intervals of the token axis, rank after rank, each rank's in the order of its tensors.

    Every rank holds ``seqlen / ranks`` tokens. For packed sequences the axis is that of all of them, one after another. Shards compare by
    value.

    Attributes:
        seqlen, ranks: tokens of all ranks together, and the number of ranks.
        rank, start, length: int64 vectors, one number per interval: who holds it, its first token, how many.

    Raises:
        ValueError: the intervals do not hold every token once, or ranks differ in how many they hold.

    >>> shards = Shards.zigzag(16, ranks=2)
    >>> shards.positions(0).tolist(), shards.positions(1).tolist()
    ([0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11])
    """

    seqlen: int
    ranks: int
    rank: Array
    start: Array
    length: Array

    def __post_init__(self) -> None:
        seqlen, ranks = check_int("shards seqlen", self.seqlen, 1, MOST_TOKENS), check_int("shards ranks", self.ranks, 1, MOST_RANKS)
        if seqlen % ranks:
            raise bad_value("shards seqlen", f"must be a multiple of the number of ranks ({ranks})", seqlen)
        for name in ("rank", "start", "length"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.int64))
        if len({self.rank.shape, self.start.shape, self.length.shape}) > 1 or self.rank.ndim != 1 or not len(self.rank):
            came = (self.rank.shape, self.start.shape, self.length.shape)
            raise bad_value("shards", "must have one rank, start and length for each interval", came)
        order = np.argsort(self.start, kind="stable")
        start, length = self.start[order], self.length[order]
        ends = np.append(start[1:], seqlen)
        if start[0] or (length < 1).any() or (start + length != ends).any():
            wrong = int(start[0]) if start[0] else int(start[np.argmax((length < 1) | (start + length != ends))])
            raise bad_value("shards", f"must hold each of the {seqlen} tokens once", f"a gap or an overlap at {wrong}")
        if (np.diff(self.rank) < 0).any() or self.rank[0] < 0 or self.rank[-1] >= ranks:
            raise bad_value("shards rank", f"must ascend from 0 to {ranks - 1}", self.rank[:8].tolist())
        held = np.bincount(self.rank, weights=self.length, minlength=ranks)
        if (held != seqlen // ranks).any():
            worst = int(np.argmax(held != seqlen // ranks))
            raise bad_value("shards", f"must give every rank {seqlen // ranks} tokens", f"{int(held[worst])} for rank {worst}")

    @classmethod
    def contiguous(cls, seqlen: int, ranks: int) -> Shards:
        """Rank r holds the r-th of ``ranks`` equal parts; ``seqlen`` is a multiple of ``ranks``."""
        return cls.of_chunks(seqlen, [[rank] for rank in range(check_int("ranks", ranks, 1, MOST_RANKS))])

    @classmethod
    def zigzag(cls, seqlen: int, ranks: int) -> Shards:
        """Rank r holds the r-th part of ``2 * ranks`` and the r-th from the end, which evens causal work; as Megatron-core has it."""
        return cls.of_chunks(seqlen, [[rank, 2 * ranks - 1 - rank] for rank in range(check_int("ranks", ranks, 1, MOST_RANKS))])

    @classmethod
    def named(cls, name: str, seqlen: int, ranks: int) -> Shards:
        """The sharding of that name: "contiguous" or "zigzag"."""
        if name not in NAMED:
            raise bad_value("shards", f"must be Shards or one of {', '.join(NAMED)}", repr(name))
        return _named(name, seqlen, ranks)

    @classmethod
    def of_chunks(cls, seqlen: int, chunks: Sequence[Sequence[int]]) -> Shards:
        """Rank r holds the parts ``chunks[r]`` of equal parts, as many as all ranks name together; neighbours become one interval.

        >>> Shards.of_chunks(80, [[0, 1], [2, 3]]).length.tolist()
        [40, 40]
        """
        seqlen = check_int("seqlen", seqlen, 1, MOST_TOKENS)
        counts = np.array([len(mine) for mine in chunks])
        rank = np.repeat(np.arange(len(chunks)), counts)
        part = np.array([number for mine in chunks for number in mine], dtype=np.int64)
        if seqlen % max(1, len(part)):
            kinds = f"{len(part)} equal parts for {len(chunks)} ranks"
            raise bad_value("seqlen", f"must be a multiple of {len(part)} ({kinds})", seqlen)
        size = seqlen // len(part)
        first = np.flatnonzero(np.concatenate([[True], (np.diff(part) != 1) | (np.diff(rank) != 0)]))
        return cls(seqlen, len(chunks), rank[first], part[first] * size, np.diff(np.append(first, len(part))) * size)

    @property
    def tokens(self) -> int:
        """Tokens of each rank."""
        return self.seqlen // self.ranks

    @cached_property
    def _value(self) -> tuple[int, int, bytes]:
        return self.seqlen, self.ranks, b"".join(part.tobytes() for part in (self.rank, self.start, self.length))

    @cached_property
    def digest(self) -> str:
        """A hash of the value that is the same in every process."""
        return hashlib.sha256(repr(self._value).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return f"Shards(seqlen={self.seqlen}, ranks={self.ranks}, intervals={len(self.rank)})"

    def positions(self, rank: int) -> Tensor:
        """The tokens of a rank, in its order, ``(tokens,)`` int64: what its rotary embedding counts by, too."""
        if not 0 <= check_int("rank", rank, 0) < self.ranks:
            raise bad_value("rank", f"must be in 0 .. {self.ranks - 1}", rank)
        mine = self.rank == rank
        return torch.from_numpy(ranges(self.start[mine], self.length[mine]))

    def split(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The part of a whole tensor that a rank holds; ``dim`` is the token axis."""
        self._check(x, dim, self.seqlen)
        return x.index_select(dim, self.positions(rank).to(x.device))

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole tensor from the parts of all ranks, in the order of the ranks: the inverse of :meth:`split`."""
        if len(parts) != self.ranks:
            raise bad_value("parts", f"must be one tensor for each of the {self.ranks} ranks", len(parts))
        for part in parts:
            self._check(part, dim, self.tokens)
        place = torch.from_numpy(np.argsort(ranges(self.start, self.length)))
        return torch.cat(list(parts), dim).index_select(dim, place.to(parts[0].device))

    def _check(self, x: Tensor, dim: int, tokens: int) -> None:
        if not isinstance(x, Tensor):
            raise bad_kind("x", "must be a tensor", x)
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != tokens:
            raise bad_value("x", f"must have {tokens} tokens on axis {dim}", tuple(x.shape))


@lru_cache(maxsize=256)
def _named(name: str, seqlen: int, ranks: int) -> Shards:
    """Calls of one length find the object that the first one made."""
    return Shards.contiguous(seqlen, ranks) if name == "contiguous" else Shards.zigzag(seqlen, ranks)
