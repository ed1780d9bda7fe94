"""Sharded sequences cut where something changes: queries into rows of each rank's layout, keys into blocks with one holder each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from s2attn.distributed.shards import Shards
from s2attn.patterns import Pattern
from s2attn.patterns.runs import Array, ranges


@dataclass(frozen=True)
class Asked:
    """What a plan follows from; equal ones have equal plans.

    Attributes:
        resolved: the pattern of every layout head: one per KV head, or per query head.
        num_heads, num_kv_heads: heads of the tensors.
        shards: who holds which tokens.
        lengths: tokens of each sequence; one number when nothing is packed.
        block, causal: as of a layout.
    """

    resolved: tuple[Pattern, ...]
    num_heads: int
    num_kv_heads: int
    shards: Shards
    lengths: tuple[int, ...]
    block: int
    causal: bool

    @cached_property
    def groups(self) -> tuple[frozenset[Pattern], ...]:
        """For every KV head the distinct patterns of the query heads that read it."""
        heads, kv_heads = len(self.resolved), self.num_kv_heads
        size = max(1, heads // kv_heads)
        return tuple(frozenset(self.resolved[g * heads // kv_heads :][:size]) for g in range(kv_heads))

    @cached_property
    def first_token(self) -> Array:
        """First token of each sequence, and the end: ``(sequences + 1,)``."""
        return np.concatenate([[0], np.cumsum(np.asarray(self.lengths, dtype=np.int64))])

    @cached_property
    def first_block(self) -> Array:
        """First key block of each sequence, and the number of all: ``(sequences + 1,)``. Blocks begin anew in every sequence."""
        return np.concatenate([[0], np.cumsum(-(-np.asarray(self.lengths, dtype=np.int64) // self.block))])

    @property
    def blocks(self) -> int:
        """Key blocks of all sequences."""
        return int(self.first_block[-1])

    @cached_property
    def block_length(self) -> Array:
        """Tokens of each key block."""
        sequence = np.repeat(np.arange(len(self.lengths)), np.diff(self.first_block))
        inside = np.arange(self.blocks) - self.first_block[sequence]
        return np.minimum(self.block, np.asarray(self.lengths, dtype=np.int64)[sequence] - inside * self.block)


@dataclass(frozen=True)
class QueryPieces:
    """Queries of all ranks, rank after rank, cut into pieces that lie in one row of their rank's layout and follow each other.

    Attributes:
        rank: who holds it.
        line, place: the rank's queries ``line * block + place ...``.
        length: queries.
        seq, pos: sequence and position of the first one.
    """

    rank: Array
    line: Array
    place: Array
    length: Array
    seq: Array
    pos: Array

    @cached_property
    def rank_ptr(self) -> Array:
        """Pieces of rank r are ``rank_ptr[r] .. rank_ptr[r + 1] - 1``."""
        return np.searchsorted(self.rank, np.arange(int(self.rank[-1]) + 2))


@dataclass(frozen=True)
class KeyPieces:
    """Keys in their order, cut into pieces of one key block with one holder.

    Attributes:
        rank: who holds it.
        token: its first token among those of the holder.
        block: key block.
        offset: its first token inside the block.
        length: tokens.
    """

    rank: Array
    token: Array
    block: Array
    offset: Array
    length: Array

    @cached_property
    def block_ptr(self) -> Array:
        """Pieces of block j are ``block_ptr[j] .. block_ptr[j + 1] - 1``."""
        return np.searchsorted(self.block, np.arange(int(self.block[-1]) + 2))

    @cached_property
    def by_rank(self) -> tuple[Array, Array]:
        """Numbers of the pieces, rank after rank and each rank's in their order, and where each rank begins."""
        order = np.argsort(self.rank, kind="stable")
        return order, np.searchsorted(self.rank[order], np.arange(int(self.rank.max()) + 2))


def query_pieces(asked: Asked) -> QueryPieces:
    """Cut where an interval of the shards, a row of a rank's layout, or a sequence begins."""
    shards, block, tokens = asked.shards, asked.block, asked.shards.tokens
    first = np.cumsum(shards.length) - shards.length  # of each interval, on an axis on which the ranks' tokens follow each other
    rows = -(-tokens // block)
    grid = (np.arange(shards.ranks)[:, None] * tokens + np.arange(rows) * block).ravel()
    # Where a sequence begins, on that axis: the interval that holds its first token.
    order = np.argsort(shards.start)
    begins = asked.first_token[:-1]
    begins = begins[begins < shards.seqlen]  # an empty last sequence begins nowhere
    holder = order[np.searchsorted(shards.start[order], begins, side="right") - 1]
    cuts = np.unique(np.concatenate([first, grid, first[holder] + begins - shards.start[holder]]))
    interval = np.searchsorted(first, cuts, side="right") - 1
    token = shards.start[interval] + cuts - first[interval]
    seq = np.searchsorted(asked.first_token, token, side="right") - 1
    rank, local = cuts // tokens, cuts % tokens
    length = np.diff(np.append(cuts, shards.seqlen))
    return QueryPieces(rank, local // block, local % block, length, seq, token - asked.first_token[seq])


def key_pieces(asked: Asked) -> KeyPieces:
    """Cut where an interval of the shards or a key block begins."""
    shards, block = asked.shards, asked.block
    order = np.argsort(shards.start)
    start, rank = shards.start[order], shards.rank[order]
    ahead = np.cumsum(shards.length) - shards.length
    local = (ahead - shards.rank * shards.tokens)[order]
    blocks = np.diff(asked.first_block)
    grid = np.repeat(asked.first_token[:-1], blocks) + ranges(np.zeros_like(blocks), blocks) * block
    cuts = np.unique(np.concatenate([start, grid]))
    interval = np.searchsorted(start, cuts, side="right") - 1
    seq = np.searchsorted(asked.first_token, cuts, side="right") - 1
    pos = cuts - asked.first_token[seq]
    length = np.diff(np.append(cuts, shards.seqlen))
    return KeyPieces(rank[interval], local[interval] + cuts - start[interval], asked.first_block[seq] + pos // block, pos % block, length)
