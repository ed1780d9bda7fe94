"""Density, work and bytes of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2attn.analysis.stack import Key, Stack

BACKWARD = 2.5
"""Backward matmul FLOPs over forward ones: five products of the size of the two of the forward pass."""


@dataclass(frozen=True)
class Listed:
    """Listed key blocks of the query heads: the least, mean and greatest number of a head, and all heads together.

    ``imbalance`` is the busiest head over the mean: what heads that run side by side wait for.
    """

    min: int
    mean: float
    max: int
    total: int

    @property
    def imbalance(self) -> float:
        return self.max / self.mean if self.mean else 1.0

    @classmethod
    def of(cls, counts: list[int]) -> Listed:
        return cls(min(counts), sum(counts) / len(counts), max(counts), sum(counts))


def dense_pairs(stack: Stack) -> int:
    """(query, key) pairs of one dense head under the stack's causality."""
    return stack.seqlen * (stack.seqlen + 1) // 2 if stack.causal else stack.seqlen**2


def dense_blocks(stack: Stack) -> int:
    """Listed blocks of one dense head."""
    return stack.num_blocks * (stack.num_blocks + 1) // 2 if stack.causal else stack.num_blocks**2


def pairs_per_head(stack: Stack, layer: int) -> list[int]:
    """Allowed (query, key) pairs of every query head."""
    return [stack.lists(key).pairs for key in stack.query_keys(layer)]


def listed_per_head(stack: Stack, layer: int) -> list[int]:
    """Listed key blocks of every query head."""
    return [stack.lists(key).listed for key in stack.query_keys(layer)]


def group_density(stack: Stack, layer: int) -> float:
    """Blocks that a KV head's query heads read together, over dense blocks; the mean over KV heads."""
    listed = [stack.once(_group_listed, keys) for keys in stack.groups(layer)]
    return sum(listed) / len(listed) / dense_blocks(stack)


def _group_listed(stack: Stack, keys: frozenset[Key]) -> int:
    return stack.group(keys).listed


def forward_flops(pairs: int, head_dim: int) -> int:
    """FLOPs of the two matrix products over ``pairs`` pairs: q.k and p.v, two FLOPs per multiply-add."""
    return 4 * head_dim * pairs


def kv_tokens_read(stack: Stack, layer: int) -> int:
    """Tokens of K (and as many of V) that are read at least once, over all KV heads."""
    length = np.minimum(stack.block, stack.seqlen - np.arange(stack.num_blocks) * stack.block)
    total = 0
    for keys in stack.groups(layer):
        read = np.zeros(stack.num_blocks, dtype=bool)
        for key in keys:
            read |= stack.lists(key).read
        total += int(length[read].sum())
    return total


def layout_bytes(stack: Stack, layer: int) -> tuple[int, int]:
    """Bytes of the layer's layout (rows and tiles), and those of its mask tiles alone."""
    keys = stack.layers[layer]
    if stack.layout is not None:
        tiles = stack.layout.tiles
        return stack.layout.nbytes, tiles.numel() * tiles.element_size()
    lists = [stack.lists(key) for key in dict.fromkeys(keys)]
    tiles = len(frozenset().union(*(one.tiles for one in lists))) * stack.block**2
    per_head = 8 * (stack.num_blocks + 1) + 4 * stack.num_blocks + 8 * stack.num_blocks
    return sum(4 * (one.listed + one.partial) for one in lists) + per_head * len(keys) + tiles, tiles
