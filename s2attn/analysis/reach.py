"""Reach: how much of the context the last block sees through several layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2attn.analysis.stack import Key, Stack, stack_of
from s2attn.core import bad_value
from s2attn.layout import Layout
from s2attn.patterns import Pattern, Recipe
from s2attn.patterns.runs import Array


@dataclass(frozen=True)
class Reach:
    """What the last query block sees through the first 1, 2, ... layers (residual connections keep what was seen before).

    Attributes:
        blocks: per number of layers, how many key blocks are seen, itself among them.
        distance: per number of layers, the greatest d such that every block at distance 0 .. d is seen.
        total: key blocks that could be seen.
    """

    blocks: tuple[int, ...]
    distance: tuple[int, ...]
    total: int

    @property
    def layers_to_all(self) -> int | None:
        """So many layers see every block; None when these layers do not."""
        return self.blocks.index(self.total) + 1 if self.total in self.blocks else None

    @property
    def stalled(self) -> bool:
        """Whether the last layers brought nothing new although something is missing."""
        return len(self.blocks) > 1 and self.blocks[-1] < self.total and self.blocks[-1] == self.blocks[-2]


def reach(
    pattern: Pattern | Recipe | Layout,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    seqlen: int | None = None,
    *,
    layers: int = 1,
    block: int | None = None,
    causal: bool = True,
    layer: int = 0,
) -> Reach:
    """What the last block sees through d layers, through any of the heads (PowerAttention, arXiv:2503.03588, section 3.2).

    Args:
        pattern: a pattern, a recipe (its layers one by one), or a layout.
        num_heads, num_kv_heads, seqlen, layers, block, causal, layer: as in `describe`; the blocks that are counted have ``block`` tokens.

    Raises:
        ValueError, TypeError: naming the argument, the rule and what came.

    >>> from s2attn.patterns import preset
    >>> reach(preset("power_attention"), seqlen=128 * 256, layers=6, block=256).blocks
    (10, 35, 75, 110, 126, 128)
    """
    return reach_of(stack_of(pattern, num_heads, num_kv_heads, seqlen, layers=layers, block=block, causal=causal, layer=layer))


def reach_of(stack: Stack) -> Reach:
    """`reach` of layers that are resolved already; memory grows with the blocks, not with their square."""
    if stack.num_blocks < 1:
        raise bad_value("seqlen", "must be at least 1", stack.seqlen)
    layers = [tuple(dict.fromkeys(keys)) for keys in stack.layers]
    if len({frozenset(keys) for keys in layers}) == 1:
        seen = _alike(stack, layers[0], len(layers))
    else:
        seen = [_down(stack, layers[:depth]) for depth in range(1, len(layers) + 1)]
    distance = [int(np.argmin(np.append(one[::-1], False))) - 1 for one in seen]
    return Reach(tuple(int(one.sum()) for one in seen), tuple(distance), stack.num_blocks)


def _last_block(stack: Stack) -> Array:
    seen = np.zeros(stack.num_blocks, dtype=bool)
    seen[-1] = True
    return seen


def _alike(stack: Stack, keys: tuple[Key, ...], depth: int) -> list[Array]:
    """All layers read the same: only blocks that are newly seen can bring more."""
    seen = [_last_block(stack)]
    new = seen[0]
    for _ in range(depth):
        more = seen[-1] | _through(stack, keys, new)
        new = more & ~seen[-1]
        seen.append(more)
    return seen[1:]


def _down(stack: Stack, layers: list[tuple[Key, ...]]) -> Array:
    """What the last block sees above ``layers``, from the last of them down to the first."""
    seen, idle = _last_block(stack), set()
    for keys in reversed(layers):
        if keys in idle:
            continue
        more = seen | _through(stack, keys, seen)
        if more.all():
            return more
        # A layer that brought nothing brings nothing again before another one did.
        idle = {*idle, keys} if np.array_equal(more, seen) else set()
        seen = more
    return seen


def _through(stack: Stack, keys: tuple[Key, ...], rows: Array) -> Array:
    """The blocks that any head reads for any of the marked rows."""
    seen, numbers = np.zeros(stack.num_blocks, dtype=bool), np.flatnonzero(rows)
    for key in keys:
        if len(numbers):
            seen |= stack.lists(key).of_rows(numbers)
        if seen.all():
            break
    return seen
