"""`context_traffic`: the bytes that every way of context parallelism moves, counted before any device is asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.distributed.needs import Tally, holds, needs
from s2attn.distributed.pieces import Asked, key_pieces, query_pieces
from s2attn.distributed.shards import Shards
from s2attn.layout import HeadRange, default_block, layout_heads
from s2attn.patterns import Pattern, Recipe
from s2attn.patterns.runs import Array

WAYS = ("all-gather", "exchange", "ring")
"""Ways to bring keys to the ranks that read them; where bytes are equal, the first one is taken."""
MOST_HEADS = 1 << 16
MOST_BLOCKS = 1 << 24
"""Key blocks of a plan: memory grows with them, about 100 bytes each."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """What each rank moves, in pairs of a token and a KV head (a row of K and one of V), and what it has to do.

    Attributes:
        ranks, seqlen, num_kv_heads: of the call.
        listed: ``(ranks,)`` listed blocks, over all query heads: work.
        read: ``(ranks,)`` distinct pairs that the rank's rows list, its own included.
        received: ``(ranks,)`` those of them that others hold: what the exchange brings, and not one more.
        sent: ``(ranks,)`` pairs that the exchange takes from the rank, counted once for each rank that gets them.
        slots: ``(ranks,)`` pairs that the rank has room for during the exchange, its own included.
    """

    ranks: int
    seqlen: int
    num_kv_heads: int
    listed: Array
    read: Array
    received: Array
    sent: Array
    slots: Array

    @property
    def imbalance(self) -> float:
        """Listed blocks of the busiest rank over the mean: what the others wait for."""
        mean = float(self.listed.mean())
        return float(self.listed.max()) / mean if mean else 1.0

    def moved(self, way: str, pair_bytes: int, sum_bytes: int, *, backward: bool = False) -> tuple[Array, Array]:
        """Bytes that each rank sends and receives in one direction of a layer, two ``(ranks,)`` vectors.

        Args:
            way: one of "all-gather", "exchange", "ring".
            pair_bytes: bytes of one pair: batch * (head_dim + v_head_dim) * bytes of a number.
            sum_bytes: the same where sums of gradients travel, which are float32 (float64 for float64): reduce-scatter and ring.
            backward: the way back, which the gradients of K and V take, instead of the way there.
        """
        if way not in WAYS:
            raise bad_value("way", f"must be one of {', '.join(WAYS)}", repr(way))
        if way == "exchange":
            there = self.sent * pair_bytes, self.received * pair_bytes
            return (there[1], there[0]) if backward else there
        whole = self.seqlen * self.num_kv_heads // self.ranks * np.ones(self.ranks, dtype=np.int64)
        keys, hops = (self.ranks - 1) * whole * pair_bytes, (self.ranks if self.ranks > 1 else 0) * whole * sum_bytes
        if not backward:
            return keys, keys
        # The ring's keys go round again, and the sums one hop farther: home. In a reduce-scatter a rank keeps its own share.
        total = keys + hops if way == "ring" else (self.ranks - 1) * whole * sum_bytes
        return total, total

    def busiest(self, way: str, pair_bytes: int, sum_bytes: int, *, backward: bool = False) -> int:
        """The most bytes that one rank sends or receives, there and, with ``backward``, back."""
        total = np.maximum(*self.moved(way, pair_bytes, sum_bytes))
        if backward:
            total = total + np.maximum(*self.moved(way, pair_bytes, sum_bytes, backward=True))
        return int(total.max())

    def held(self, way: str) -> Array:
        """Pairs of K and V that each rank has room for at one time, its own included."""
        whole = self.seqlen * self.num_kv_heads // self.ranks * np.ones(self.ranks, dtype=np.int64)
        return {"all-gather": whole * self.ranks, "exchange": self.slots, "ring": whole * min(3, self.ranks)}[way]

    def fewest(self, pair_bytes: int, sum_bytes: int, *, backward: bool) -> str:
        """The way whose busiest rank moves the fewest bytes."""
        return min(WAYS, key=lambda way: self.busiest(way, pair_bytes, sum_bytes, backward=backward))


@lru_cache(maxsize=256)
def traffic_of(asked: Asked) -> Traffic:
    """Count what a plan moves; time grows with the rows of all ranks, memory with the blocks of the sequence."""
    ranks, kv_heads, groups = asked.shards.ranks, asked.num_kv_heads, asked.groups
    keys = key_pieces(asked)
    order, begins = keys.by_rank
    listed, read, own, slots = (np.zeros(ranks, dtype=np.int64) for _ in range(4))
    tally = Tally(asked.block_length)
    for found in needs(asked, query_pieces(asked)):
        here = slice(found.low, found.high)
        listed[here] = found.listed
        mine = order[begins[found.low] : begins[found.high]]
        holder = keys.rank[mine] - found.low
        most = np.zeros(found.high - found.low, dtype=np.int64)
        for group, runs in found.blocks.items():
            times = groups.count(group)
            tally.add(runs, times)
            read[here] += times * tally.tokens(runs, found.high - found.low)
            inside = holds(runs, holder, keys.block[mine])
            own[here] += times * np.bincount(holder[inside], weights=keys.length[mine][inside], minlength=len(most)).astype(np.int64)
            most = np.maximum(most, runs.counts(found.high - found.low))
        slots[here] = most * asked.block * kv_heads
    readers = tally.counts()
    sent = np.bincount(keys.rank, weights=keys.length * readers[keys.block], minlength=ranks).astype(np.int64) - own
    return Traffic(ranks, asked.shards.seqlen, kv_heads, listed, read, read - own, sent, slots)


def ask(
    pattern: Pattern,
    num_heads: int,
    num_kv_heads: int,
    shards: Shards,
    *,
    lengths: tuple[int, ...] | None = None,
    block: int | None = None,
    causal: bool = True,
    layer: int = 0,
    heads: HeadRange | None = None,
) -> Asked:
    """Check the arguments that a plan follows from, and resolve the pattern of every head."""
    if not isinstance(pattern, Pattern):
        hint = "; take recipe.pattern(layer)" if isinstance(pattern, Recipe) else ""
        raise bad_kind("pattern", f"must be a Pattern{hint}", pattern)
    if not isinstance(shards, Shards):
        raise bad_kind("shards", "must be Shards", shards)
    num_heads = check_int("num_heads", num_heads, 1, MOST_HEADS)
    num_kv_heads = check_int("num_kv_heads", num_kv_heads, 1, MOST_HEADS)
    if num_heads % num_kv_heads:
        raise bad_value("num_kv_heads", f"must divide num_heads ({num_heads})", num_kv_heads)
    lengths = (shards.seqlen,) if lengths is None else lengths
    if sum(lengths) != shards.seqlen:
        raise bad_value("cu_seqlens", f"must end at the number of tokens of all ranks together, {shards.seqlen}", sum(lengths))
    size = default_block(pattern) if block is None else check_block("block", block)
    if sum(-(-length // size) for length in lengths) > MOST_BLOCKS:
        rule = f"must be at most {MOST_BLOCKS} blocks of {size} tokens"
        raise bad_value("seqlen", rule, f"{shards.seqlen} tokens")
    everyone = heads or HeadRange(0, num_heads, num_heads, num_kv_heads)
    resolved = layout_heads(pattern, everyone, num_kv_heads, check_int("layer", layer, 0))
    return Asked(resolved, num_heads, num_kv_heads, shards, tuple(lengths), size, bool(causal))


def context_traffic(
    pattern: Pattern, num_heads: int, num_kv_heads: int | None = None, seqlen: int | None = None, *, shards: Any, **options: Any
) -> Traffic:
    """Count what context parallelism moves between ranks, for sizes that need not fit anywhere: 10 million tokens on 1024 ranks, say.

    Pure arithmetic over intervals: no tensor of the sequence is made, and no process group is needed.

    Args:
        pattern: what may be seen; num_heads, num_kv_heads: query heads, and key/value heads (as many by default).
        seqlen: tokens of all ranks together; left out when ``shards`` are `Shards`.
        shards: `Shards`, or a pair like ``("zigzag", 8)``: the name of a sharding and the number of ranks.
        options: ``block``, ``causal``, ``layer``, ``heads`` as of `context_attention`; ``lengths``: tokens of each packed sequence.

    >>> from s2attn.patterns import Sink, Window
    >>> traffic = context_traffic(Sink(64) | Window(256), 8, 8, 1 << 20, shards=("contiguous", 64))
    >>> int(traffic.received.max()), 63 * (1 << 20) // 64 * 8, traffic.fewest(1024, 2048, backward=True)
    (2560, 8257536, 'exchange')
    """
    if not isinstance(shards, Shards):
        if not isinstance(shards, (tuple, list)) or len(shards) != 2:
            raise bad_kind("shards", 'must be Shards or a pair like ("zigzag", 8)', shards)
        shards = Shards.named(shards[0], check_int("seqlen", seqlen, 1), check_int("ranks", shards[1], 1))
    elif seqlen is not None and seqlen != shards.seqlen:
        raise bad_value("seqlen", f"must be that of the shards, {shards.seqlen}", seqlen)
    return traffic_of(ask(pattern, num_heads, num_heads if num_kv_heads is None else num_kv_heads, shards, **options))
