"""KV-efficiency and the cache: which blocks come back after they were left out, and which ones a server must keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2attn.analysis.stack import Key, Lists, Stack, layout_of
from s2attn.patterns.runs import Array


@dataclass(frozen=True)
class CounterExample:
    """A key block that is left out and read again later, so that it cannot be evicted: the first of its KV head.

    Attributes:
        layer, kv_head: where it happens.
        key_block: number of the key block.
        skipped_at: the first query block, from the key block on, that does not read it although a later one does.
        read_again_at: the first query block after that which reads it.
    """

    layer: int
    kv_head: int
    key_block: int
    skipped_at: int
    read_again_at: int

    def __str__(self) -> str:
        where = f"layer {self.layer}, KV head {self.kv_head}: key block {self.key_block}"
        return f"{where} is not read by query block {self.skipped_at} and is read again by query block {self.read_again_at}"


def first_return(lists: Lists) -> tuple[int, int, int] | None:
    """The first (key block, query block that skips it, later query block that reads it again) of causal lists, or None.

    A block is safe to evict when its readers are the query blocks from its own one to some last one, without a gap.
    """
    own = np.arange(lists.blocks)
    count = np.bincount(lists.idx, minlength=lists.blocks)
    last = np.full(lists.blocks, -1)
    last[lists.idx] = lists.row  # entries stand row by row, and the last assignment to an element stays
    back = np.flatnonzero((count > 0) & (count != last - own + 1))
    if not len(back):
        return None
    block = int(back[0])
    readers = np.sort(lists.row[lists.idx == block])
    gap = int(np.argmax(readers != block + np.arange(len(readers))))
    return block, block + gap, int(readers[gap])


def counter_example(stack: Stack, layer: int) -> CounterExample | None:
    """The first counter-example to KV-efficiency in a causal layer, or None when every KV head is KV-efficient."""
    for kv_head, keys in enumerate(stack.groups(layer)):
        found = stack.once(_first_return, keys)
        if found is not None:
            return CounterExample(stack.first_layer + layer, kv_head, *found)
    return None


def _first_return(stack: Stack, keys: frozenset[Key]) -> tuple[int, int, int] | None:
    return first_return(stack.group(keys))


def cache_horizon(stack: Stack) -> int:
    """How many coming tokens a cache is asked to serve: as many as there are already."""
    return stack.seqlen


def cached_tokens(stack: Stack, layer: int) -> list[int] | None:
    """Tokens of each KV head that must stay in the cache, or None where that cannot be said (not causal, or only a layout is known).

    A block stays when the query at ``seqlen - 1`` or a later one reads it. For a KV-efficient head the next two blocks of queries tell
    that for all times; for another one the queries of the next `cache_horizon` tokens are asked.
    """
    if not stack.causal or stack.layout is not None:
        return None
    return [int(stack.once(_needed, keys).sum()) for keys in stack.groups(layer)]


def _needed(stack: Stack, keys: frozenset[Key]) -> Array:
    """Tokens of each block that must stay, ``(blocks,)``."""
    ahead = 2 * stack.block if stack.once(_first_return, keys) is None else cache_horizon(stack)
    length = np.minimum(stack.block, stack.seqlen - np.arange(stack.num_blocks) * stack.block)
    later = layout_of(list(keys), ahead + 1, stack.seqlen + ahead, stack.block, causal=True)
    seen = np.zeros(len(later.k_spans), dtype=bool)
    seen[later.rows.idx.numpy()] = True
    return np.where(seen[: stack.num_blocks], length, 0)
