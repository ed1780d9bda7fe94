"""Until when each page of each KV head is needed: a pattern, asked once for the longest sequence."""

from __future__ import annotations

import numpy as np

from s2attn.core import BLOCKS, check_int
from s2attn.layout import HeadRange, build_layout, last_readers, layout_heads
from s2attn.patterns import Pattern, Recipe
from s2attn.patterns.runs import Array


def pattern_of(pattern: Pattern | Recipe, layer: int) -> Pattern:
    """The pattern of one layer."""
    return pattern.pattern(layer) if isinstance(pattern, Recipe) else pattern


def page_needs(pattern: Pattern | Recipe, heads: HeadRange, num_kv_heads: int, num_layers: int, max_tokens: int, page_size: int) -> Array:
    """The position of the last query that reads each page, ``(layers, num_kv_heads, pages)`` int64; -1 where none ever does.

    Exact for sequences of up to ``max_tokens``: of all query heads of a group the last one counts.
    """
    block = next(size for size in reversed(BLOCKS) if page_size % size == 0)
    pages, blocks = -(-max_tokens // page_size), page_size // block
    known: dict[Pattern, Array] = {}
    needs = np.empty((num_layers, num_kv_heads, pages), dtype=np.int64)
    for layer in range(num_layers):
        resolved = layout_heads(pattern_of(pattern, layer), heads, num_kv_heads, layer)
        for one in dict.fromkeys(resolved):
            if one not in known:
                readers = np.full(pages * blocks, -1, dtype=np.int64)
                found = last_readers(one, max_tokens, block)
                readers[: len(found)] = found
                known[one] = readers.reshape(pages, blocks).max(axis=1)
        by_head = np.stack([known[one] for one in resolved])
        needs[layer] = by_head.reshape(num_kv_heads, -1, pages).max(axis=1)
    return needs


def pages_read(pattern: Pattern, heads: HeadRange, num_kv_heads: int, layer: int, position: int, page_size: int) -> Array:
    """Which pages ``(num_kv_heads, pages)`` the query at ``position`` reads of what stands at or before it."""
    shape = (heads.end - heads.start, num_kv_heads, 1, position + 1)
    layout = build_layout(pattern, *shape, block=16, layer=layer, heads=heads)
    listed = np.zeros((num_kv_heads, position // page_size + 1), dtype=bool)
    for head in range(layout.heads):
        full, partial = layout.rows.line(head, 0)
        blocks = np.array([*full, *(block for block, _ in partial)], dtype=np.int64)
        listed[head * num_kv_heads // layout.heads, blocks * 16 // page_size] = True
    return listed


def pages_needed(
    pattern: Pattern | Recipe,
    *,
    num_kv_heads: int,
    tokens: int,
    chunk: int = 512,
    num_layers: int = 1,
    num_heads: int | None = None,
    page_size: int = 64,
    heads: HeadRange | None = None,
    hold: int = 0,
) -> int:
    """Pages that let a `SparseCache` take one sequence to so many tokens, in steps of any lengths up to ``chunk``.

    It is enough even if all layers store a step before the first of them gives anything back. The other arguments are those of the cache.

    >>> from s2attn import Dense, Window
    >>> [pages_needed(pattern, num_kv_heads=8, tokens=8192, chunk=64) for pattern in (Dense(), Window(256))]
    [1024, 48]
    """
    check_int("tokens", tokens, 1)
    check_int("chunk", chunk, 1)
    check_int("hold", hold, 0)
    query_heads = num_kv_heads if num_heads is None else num_heads
    everyone = heads or HeadRange(0, query_heads, query_heads, num_kv_heads)
    needs = page_needs(pattern, everyone, num_kv_heads, num_layers, tokens, page_size)
    return most_pages(needs, tokens=tokens, chunk=chunk, page_size=page_size, hold=hold)


def most_pages(needs: Array, *, tokens: int, chunk: int, page_size: int, hold: int = 0) -> int:
    """The most pages that a sequence of so many tokens holds at a time, in steps of up to ``chunk``; ``needs`` of some layers."""
    # A step that begins at b holds the pages that begin before b + chunk and have a reader at b - hold or later.
    first = np.broadcast_to(np.maximum(np.arange(needs.shape[2]) * page_size - chunk + 1, 0), needs.shape)
    last = np.minimum(needs + hold, tokens - 1)
    read = (needs >= 0) & (last >= first)
    change = np.bincount(first[read], minlength=tokens + 1) - np.bincount(last[read] + 1, minlength=tokens + 1)
    return max(1, int(change.cumsum().max()))
