"""The block lists of every head of every layer, equal ones worked out once: what all figures of a report are computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, Union

import numpy as np

from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.layout import HeadRange, Layout, build_layout, default_block, layout_heads
from s2attn.layout.entries import first_with_same_lists
from s2attn.patterns import Pattern, PerHead, Recipe
from s2attn.patterns.base import check_layer
from s2attn.patterns.runs import Array, repeat_ranges

MOST_HEADS = 65536
"""Heads of all layers together: the pattern of each is worked out."""
MOST_BLOCKS = 32768
"""Blocks of a sequence: a dense head lists half of their square."""
T = TypeVar("T")
Key = Union[Pattern, int]  # noqa: UP007  evaluated at run time
"""Names the lists of one head: its resolved pattern, or its number in a layout that was given. Equal keys have equal lists."""


@dataclass(frozen=True, eq=False)
class Lists:
    """The key blocks that each query block of one head reads: row i reads ``idx[ptr[i]:ptr[i + 1]]``, in no special order.

    ``blocks`` is the number of key blocks, ``partial`` the number of entries with a mask tile, ``tiles`` those tiles as bytes.
    """

    ptr: Array
    idx: Array
    blocks: int
    pairs: int = 0
    partial: int = 0
    tiles: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, layout: Layout, head: int) -> Lists:
        """The lists of one head of a layout."""
        # Plain numpy from here on: its small steps cost the same on a busy machine, where torch would wait for its threads.
        ptr = layout.rows.ptr[head].cpu().numpy()
        idx = layout.rows.idx.cpu().numpy()[ptr[0] : ptr[-1]]
        partial = len(idx) - int(layout.rows.full[head].cpu().numpy().sum())
        first = int(layout.rows.tile_ptr[head, 0]) if layout.rows.lines else 0
        used = np.unique(layout.rows.tile.cpu().numpy()[first : first + partial])
        tiles = frozenset(np.packbits(tile).tobytes() for tile in layout.tiles.cpu().numpy()[used])
        return cls(ptr - ptr[0], idx, len(layout.k_spans), int(layout.pairs[head]), partial, tiles)

    @property
    def rows(self) -> int:
        return len(self.ptr) - 1

    @property
    def listed(self) -> int:
        return len(self.idx)

    @cached_property
    def row(self) -> Array:
        """The row of each entry."""
        return np.repeat(np.arange(self.rows, dtype=np.int32), np.diff(self.ptr))

    @cached_property
    def read(self) -> Array:
        """Which key blocks any row reads, ``(blocks,)`` bool."""
        return self.marked(self.idx)

    def marked(self, idx: Array) -> Array:
        seen = np.zeros(self.blocks, dtype=bool)
        seen[idx] = True
        return seen

    def of_rows(self, rows: Array) -> Array:
        """Which key blocks any of ``rows`` (row numbers) reads, ``(blocks,)`` bool."""
        _, entry = repeat_ranges(self.ptr[rows], self.ptr[rows + 1] - self.ptr[rows])
        return self.marked(self.idx[entry])

    @classmethod
    def union(cls, parts: list[Lists]) -> Lists:
        """Per row the blocks that any of the heads reads; pairs and tiles are not known of it."""
        blocks = parts[0].blocks
        keys = np.unique(np.concatenate([part.row.astype(np.int64) * blocks + part.idx for part in parts]))
        row, idx = keys // max(blocks, 1), keys % max(blocks, 1)
        count = np.bincount(row, minlength=parts[0].rows)
        return cls(np.concatenate([[0], np.cumsum(count)]), idx.astype(np.int32), blocks)


@dataclass(frozen=True, eq=False)
class Stack:
    """The layers that are judged together; ``layers[l]`` holds the keys of layer l's layout heads (G of them, or H)."""

    num_heads: int
    num_kv_heads: int
    seqlen: int
    block: int
    causal: bool
    first_layer: int
    layers: tuple[tuple[Key, ...], ...]
    layout: Layout | None = None
    _known: dict[tuple, Any] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return -(-self.seqlen // self.block)

    def once(self, make: Callable[..., T], *arguments: Any) -> T:
        """``make(self, *arguments)``, kept: equal heads and equal layers are worked out once."""
        known = (make, *arguments)
        if known not in self._known:
            self._known[known] = make(self, *arguments)
        return self._known[known]

    def lists(self, key: Key) -> Lists:
        """The lists of one head, made on first use, those of its layer together: the heads of a layer have much in common."""
        known = (_make_lists, key)
        if known not in self._known:
            layer = next((keys for keys in self.layers if key in keys), (key,))
            missing = [one for one in dict.fromkeys(layer) if (_make_lists, one) not in self._known]
            self._known.update(((_make_lists, one), made) for one, made in zip(missing, _make_lists(self, missing), strict=True))
        return self._known[known]

    def groups(self, layer: int) -> list[frozenset[Key]]:
        """For every KV head, the distinct keys of its query heads."""
        keys = self.layers[layer]
        size = max(1, len(keys) // self.num_kv_heads)
        return [frozenset(keys[h * len(keys) // self.num_kv_heads :][:size]) for h in range(self.num_kv_heads)]

    def group(self, keys: frozenset[Key]) -> Lists:
        """The lists of a KV head: what any of its query heads reads."""
        if len(keys) == 1:
            return self.lists(next(iter(keys)))
        return self.once(_make_union, keys)

    def query_keys(self, layer: int) -> list[Key]:
        """The key of every query head."""
        keys = self.layers[layer]
        return [keys[h * len(keys) // self.num_heads] for h in range(self.num_heads)]


def _make_lists(stack: Stack, keys: list[Key]) -> list[Lists]:
    if stack.layout is not None:
        return [Lists.of(stack.layout, int(key)) for key in keys if isinstance(key, int)]
    layout = layout_of(keys, stack.seqlen, stack.seqlen, stack.block, stack.causal)
    return [Lists.of(layout, head) for head in range(len(keys))]


def layout_of(keys: list[Key], seqlen_q: int, seqlen_k: int, block: int, causal: bool) -> Layout:
    """One layout whose heads have the resolved patterns ``keys``."""
    patterns = {head: key for head, key in enumerate(keys) if isinstance(key, Pattern)}
    return build_layout(PerHead(patterns), len(keys), len(keys), seqlen_q, seqlen_k, block=block, causal=causal)


def _make_union(stack: Stack, keys: frozenset[Key]) -> Lists:
    return Lists.union([stack.lists(key) for key in keys])


def stack_of(
    pattern: Pattern | Recipe | Layout,
    num_heads: int,
    num_kv_heads: int | None = None,
    seqlen: int | None = None,
    *,
    layers: int = 1,
    block: int | None = None,
    causal: bool = True,
    layer: int = 0,
) -> Stack:
    """Check the arguments that all of the lab shares, and resolve every head's pattern in ``layers`` layers, from number ``layer`` on."""
    num_heads = check_int("num_heads", num_heads, 1)
    num_kv_heads = num_heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise bad_value("num_kv_heads", f"must divide num_heads ({num_heads})", num_kv_heads)
    layers, layer = check_int("layers", layers, 1), check_layer(layer)
    check_sizes(num_heads, layers)
    if isinstance(pattern, Layout):
        return _stack_of_layout(pattern, num_heads, num_kv_heads, seqlen, layers, block)
    if not isinstance(pattern, (Pattern, Recipe)):
        raise bad_kind("pattern", "must be a Pattern, a Recipe or a Layout", pattern)
    seqlen = check_int("seqlen", seqlen, 1)
    block = None if block is None else check_block("block", block)
    chosen = [pattern.pattern(number) if isinstance(pattern, Recipe) else pattern for number in range(layer, layer + layers)]
    heads = HeadRange(0, num_heads, num_heads, num_kv_heads)
    resolved = tuple(layout_heads(one, heads, num_kv_heads, layer + i) for i, one in enumerate(chosen))
    block = _default_block(chosen) if block is None else block
    if seqlen > MOST_BLOCKS * block:
        rule = f"must be at most {MOST_BLOCKS * block} tokens, {MOST_BLOCKS} blocks of {block}"
        raise bad_value("seqlen", rule, seqlen)
    return Stack(num_heads, num_kv_heads, seqlen, block, bool(causal), layer, resolved)


def check_sizes(num_heads: int, layers: int) -> None:
    """Refuse more heads than any model has, before each is worked out."""
    if num_heads * layers > MOST_HEADS:
        came = f"{num_heads} heads in {layers} layers"
        raise bad_value("num_heads and layers", f"must be at most {MOST_HEADS} heads in all", came)


def _default_block(patterns: list[Pattern]) -> int:
    """The finest that any layer would choose, layers without a grid aside."""
    return min((default_block(pattern) for pattern in set(patterns) if pattern.grids), default=64)


def _stack_of_layout(layout: Layout, num_heads: int, num_kv_heads: int, seqlen: int | None, layers: int, block: int | None) -> Stack:
    if layout.packed or layout.seqlen_q != layout.seqlen_k:
        came = "packed sequences" if layout.packed else f"{layout.seqlen_q} queries and {layout.seqlen_k} keys"
        raise bad_value("layout", "must be of one sequence with as many queries as keys", came)
    if seqlen not in (None, layout.seqlen_q):
        raise bad_value("seqlen", f"must be left out or be that of the layout ({layout.seqlen_q})", seqlen)
    if not layout.seqlen_q:
        raise bad_value("layout", "must have at least one token", "seqlen_q 0")
    if block not in (None, layout.block):
        raise bad_value("block", f"must be left out or be that of the layout ({layout.block})", block)
    if num_heads % layout.heads or (layout.heads % num_kv_heads and num_kv_heads % layout.heads):
        rule = f"must be multiples of the layout's heads ({layout.heads}), or divide them evenly in the case of num_kv_heads"
        raise bad_value("num_heads and num_kv_heads", rule, (num_heads, num_kv_heads))
    keys = first_with_same_lists(layout.rows)
    if len(keys) < num_kv_heads:
        keys = [keys[h * len(keys) // num_kv_heads] for h in range(num_kv_heads)]
    return Stack(num_heads, num_kv_heads, layout.seqlen_q, layout.block, layout.causal, 0, (tuple(keys),) * layers, layout)
