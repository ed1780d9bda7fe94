"""Which blocks of a request nobody will read again: arithmetic on a recipe, without vLLM.

vLLM has one block table for all heads of a layer, on all tensor-parallel ranks. So a block counts as read while any head of the model reads
any of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from s2attn.cache.needs import page_needs
from s2attn.core import bad_value, check_int
from s2attn.layout import HeadRange
from s2attn.patterns import Recipe
from s2attn.patterns.runs import Array

WORTH = 0.9
"""A layer gets a block table of its own kind if at most this share of its blocks is ever held at once."""


@dataclass(frozen=True)
class Model:
    """What says which blocks are read: the recipe and the whole model that it is for.

    Attributes:
        recipe: JSON text.
        num_layers, num_heads, num_kv_heads: of the whole model, whatever part of it a process holds.
        max_tokens: the longest request.
    """

    recipe: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_tokens: int


@lru_cache(maxsize=16)
def last_reads(model: Model, block_size: int) -> Array:
    """The position of the last query that reads each block in any head, ``(layers, blocks)`` int64; -1 where none does.

    >>> from s2attn import Window
    >>> last_reads(Model(Recipe(Window(20)).to_json(), 1, 2, 1, 64), 16).tolist()
    [[34, 50, 63, 63]]
    """
    if check_int("block_size", block_size, 1) % 16:
        raise bad_value("block_size", "must be a multiple of 16", block_size)
    heads = HeadRange(0, model.num_heads, model.num_heads, model.num_kv_heads)
    recipe = Recipe.from_json(model.recipe)
    by_head = page_needs(recipe, heads, model.num_kv_heads, model.num_layers, model.max_tokens, block_size)
    found = by_head.max(axis=1)
    found.flags.writeable = False
    return found


def first_alike(model: Model, layer: int, block_size: int) -> int:
    """The first layer whose blocks live exactly as long as those of ``layer``: both can share a block table."""
    reads = last_reads(model, block_size)
    return int(np.argmax((reads == reads[layer]).all(axis=1)))


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """How long the blocks of a request live in one layer.

    Attributes:
        last: ``(blocks,)`` int64: position of the last query that reads each; -1 where none does.
        block_size: tokens of a block.

    Invariants:
        L1  a block that is gone after n tokens is read by no query at position n or later
        L2  a block that is gone after n tokens gets none of the tokens from n on
    """

    last: Array
    block_size: int

    @classmethod
    def of(cls, model: Model, layer: int, block_size: int) -> Lifetimes:
        return cls(last_reads(model, block_size)[layer], block_size)

    @cached_property
    def ends(self) -> Array:
        """For each block, the number of processed tokens from which on it is gone."""
        return np.maximum(self.last + 1, (np.arange(len(self.last)) + 1) * self.block_size)

    @cached_property
    def _by_end(self) -> tuple[Array, Array]:
        order = np.argsort(self.ends, kind="stable")
        return self.ends[order], order

    def gone(self, processed: int, before: int = 0) -> Array:
        """The blocks that can be given back once so many tokens are processed and could not after ``before``, ascending."""
        ends, order = self._by_end
        first, end = np.searchsorted(ends, [before, processed], side="right")
        return np.sort(order[first:end])

    def needed(self, count: int) -> Array:
        """Which of the first ``count`` blocks a query behind them reads, ``(count,)`` bool.

        >>> Lifetimes(np.array([31, 32, 63]), 16).needed(2).tolist()
        [False, True]
        """
        return self.last[:count] >= count * self.block_size

    def most_held(self, in_flight: int) -> int:
        """Blocks that one request holds at most, when up to ``in_flight`` tokens are scheduled and not yet processed.

        >>> lives = Lifetimes(np.array([34, 50, 63, 63]), 16)
        >>> lives.most_held(1), lives.most_held(64)
        (3, 4)
        """
        count = len(self.last)
        # Block i is held from the first number of processed tokens with which its first token can be in flight.
        begin = np.maximum(np.arange(count) * self.block_size - in_flight + 1, 0)
        change = np.zeros(int(max(self.ends.max(initial=0), begin.max(initial=0))) + 1, dtype=np.int64)
        np.add.at(change, begin, 1)
        np.add.at(change, self.ends, -1)
        return int(change.cumsum().max())

    def longest_hit(self, cached: Callable[[int], bool], most: int, multiple: int) -> int:
        """The longest prefix, in blocks, behind which a request can go on: whatever a later query reads of it is cached.

        Args:
            cached: whether block i of the prefix is cached; asked once for each, in ascending order.
            most: blocks at most.
            multiple: the number of blocks must be a multiple of this.

        >>> lives = Lifetimes(np.array([34, 50, 66, 82, 98]), 16)  # a window of 20 tokens
        >>> lives.longest_hit([False, False, True, True, False].__getitem__, 5, 1)
        4
        """
        most = min(most, len(self.last))
        missed = np.zeros(most + 2, dtype=np.int64)
        for block in range(most):
            if not cached(block):
                # It is read by a request that goes on after more than `block` and up to last // block_size blocks.
                until = min(int(self.last[block]) // self.block_size, most)
                if until > block:
                    missed[block + 1] += 1
                    missed[until + 1] -= 1
                if until == most:
                    break
        fits = (missed[: most + 1].cumsum() == 0) & (np.arange(most + 1) % multiple == 0)
        return int(np.flatnonzero(fits).max())
