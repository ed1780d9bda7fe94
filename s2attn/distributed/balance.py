"""`balanced_shards`: tokens dealt to ranks so that every rank lists about as many blocks as the others."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.distributed.needs import lists_of_pieces
from s2attn.distributed.pieces import Asked, query_pieces
from s2attn.distributed.shards import MOST_RANKS, Shards
from s2attn.distributed.traffic import ask
from s2attn.layout.tiles import TileTable
from s2attn.patterns import Pattern, Recipe
from s2attn.patterns.runs import Array

MOST_LAYERS = 1 << 16
EVEN = 1.03
"""The busiest rank over the mean that is good enough: finer parts would be more even, and would have more neighbours to ask."""


def balanced_shards(
    pattern: Pattern | Recipe,
    num_heads: int,
    num_kv_heads: int | None = None,
    seqlen: int | None = None,
    *,
    ranks: int,
    layers: int = 1,
    layer: int = 0,
    block: int | None = None,
    causal: bool = True,
    lengths: tuple[int, ...] | None = None,
) -> Shards:
    """Deal equal parts of a sequence to ranks, as many tokens to each, so that the blocks that they list are even.

    The parts are as long as they may be: contiguous where that is even (a window), pairs where work grows along the sequence (the zigzag
    of dense causal attention), smaller ones, down to blocks, where that does not do. Each part goes to the rank that has the least work so
    far and room for it, the heaviest first.

    Args:
        pattern: a pattern, or a recipe, of which ``layers`` layers from number ``layer`` on are evened together.
        seqlen: tokens of all ranks, a multiple of ``ranks * block``; ``lengths`` of packed sequences may say it too.
        ranks: how many.
        num_heads, num_kv_heads, block, causal: as of `context_attention`.

    >>> from s2attn.patterns import Dense, Window
    >>> balanced_shards(Window(64), 1, 1, 65536, ranks=4) == Shards.contiguous(65536, 4)
    True
    >>> balanced_shards(Dense(), 1, 1, 65536, ranks=4) == Shards.zigzag(65536, 4)
    True
    """
    ranks, layers = check_int("ranks", ranks, 1, MOST_RANKS), check_int("layers", layers, 1, MOST_LAYERS)
    if not isinstance(pattern, (Pattern, Recipe)):
        raise bad_kind("pattern", "must be a Pattern or a Recipe", pattern)
    total = sum(lengths) if lengths is not None and seqlen is None else check_int("seqlen", seqlen, 1)
    one = Shards.contiguous(total, 1)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    asked = [
        ask(chosen, num_heads, kv_heads, one, lengths=lengths, block=block, causal=causal, layer=number)
        for number in range(layer, layer + layers)
        for chosen in [pattern.pattern(number) if isinstance(pattern, Recipe) else pattern]
    ]
    grain = max(each.block for each in asked)
    if total % (ranks * grain):
        raise bad_value("seqlen", f"must be a multiple of ranks * block ({ranks} * {grain})", total)
    work = sum(_work(each, times, grain) for each, times in Counter(asked).items())
    return _dealt(total, np.asarray(work), ranks)


def _work(asked: Asked, times: int, grain: int) -> Array:
    """Listed blocks of the rows in each ``grain`` tokens, over all query heads, ``times`` over."""
    pieces = query_pieces(asked)
    work = np.zeros(int(pieces.line[-1]) + 1, dtype=np.int64)
    patterns = list(dict.fromkeys(asked.resolved))
    heads = [asked.resolved.count(pattern) * asked.num_heads // len(asked.resolved) for pattern in patterns]
    for part in lists_of_pieces(patterns, asked, pieces, np.arange(len(pieces.line)), TileTable(asked.block)):
        for lists, count in zip(part.lists, heads, strict=True):
            np.add.at(work, pieces.line[part.pieces], lists.count * count * times)
    return work.reshape(-1, grain // asked.block).sum(axis=1)


def _dealt(seqlen: int, work: Array, ranks: int) -> Shards:
    """The first of ever smaller parts that can be dealt evenly, or the most even."""
    cells, parts, best = len(work) // ranks, 1, None
    while True:
        heavy = work.reshape(ranks * parts, -1).sum(axis=1)
        chunks, imbalance = _deal(heavy, ranks)
        if best is None or imbalance < best[0]:
            best = imbalance, chunks
        finer = next((more for more in range(2 * parts, cells + 1) if cells % more == 0), None)
        if imbalance <= EVEN or finer is None:
            return Shards.of_chunks(seqlen, best[1])
        parts = finer


def _deal(heavy: Array, ranks: int) -> tuple[list[list[int]], float]:
    """The heaviest part first, to who has the least so far and room for it; and the busiest rank over the mean."""
    room = len(heavy) // ranks
    chunks: list[list[int]] = [[] for _ in range(ranks)]
    waiting = [(0, rank) for rank in range(ranks)]
    for part in np.argsort(-heavy, kind="stable").tolist():
        load, rank = heapq.heappop(waiting)
        chunks[rank].append(part)
        if len(chunks[rank]) < room:
            heapq.heappush(waiting, (load + int(heavy[part]), rank))
    loads = [int(heavy[mine].sum()) for mine in chunks]
    mean = sum(loads) / ranks
    # Ranks in the order of their first parts, so that neighbours are near each other where that is all the same.
    return sorted(sorted(mine) for mine in chunks), max(loads) / mean if mean else 1.0
