"""Keys and values scattered over the pages of a cache whose other pages hold NaN and whose unread table entries are garbage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Paged:
    """What `s2attn.decode` takes besides q: pages, block table, lengths."""

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    seq_lens: Tensor


def scatter(
    keys: list[Tensor], values: list[Tensor], read: list[Tensor], page_size: int, *, per_head: bool, heads_first: bool = False
) -> Paged:
    """Put the keys ``(S, G, D)`` and values ``(S, G, Dv)`` of each sequence into pages in random order.

    Args:
        read: for each sequence a bool ``(G, S)``: which keys some query sees. A page is kept, for a KV head (or for all of them), only if
            one of its tokens is seen; no other page of the cache holds a number, and table entries of other pages point anywhere.
        per_head: give each KV head a table of its own.
        heads_first: store pages heads first, as vLLM's "HND".
    """
    kv_heads, batch = keys[0].shape[1], len(keys)
    longest = max(max(len(k) for k in keys), 1)
    max_pages, lines = -(-longest // page_size) + 1, kv_heads if per_head else 1
    count = batch * lines * max_pages + 3
    free = iter(torch.randperm(count).tolist())
    order = (count, kv_heads, page_size) if heads_first else (count, page_size, kv_heads)
    k_pages, v_pages = (x.new_full((*order, x.shape[-1]), torch.nan) for x in (keys[0], values[0]))
    if heads_first:
        k_pages, v_pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    garbage = torch.tensor([-1, -(2**31), 2**31 - 1, count])
    table = garbage[torch.randint(4, (batch, lines, max_pages))].int()
    for i, (k, v, seen) in enumerate(zip(keys, values, read, strict=True)):
        for line in range(lines):
            mine = slice(line, line + 1) if per_head else slice(None)
            for number in range(-(-len(k) // page_size)):
                tokens = slice(number * page_size, min((number + 1) * page_size, len(k)))
                if bool(seen[mine, tokens].any()):
                    page = next(free)
                    table[i, line, number] = page
                    length = tokens.stop - tokens.start
                    k_pages[page, :length, mine], v_pages[page, :length, mine] = k[tokens, mine], v[tokens, mine]
    lengths = torch.tensor([len(k) for k in keys], dtype=torch.int32)
    return Paged(k_pages, v_pages, table if per_head else table[:, 0], lengths)
