"""`decode_cascade`: a prefix that sequences share is attended once for all of them, and merged with what each has of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from s2attn.core import BLOCKS, bad_kind, bad_value, check_int
from s2attn.layout import HeadRange, build_layout, default_block, layout_heads, pattern_hint, read_cu_seqlens
from s2attn.layout.cascade import Cascade, split_prefix
from s2attn.ops.checks import autocast_to_pages, check_heads
from s2attn.ops.decode import check_paged_tensors, check_tables, decode
from s2attn.ops.merge import merge
from s2attn.patterns import Pattern


def decode_cascade(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pattern: Pattern,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    prefix_tokens: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    layer: int = 0,
    heads: HeadRange | None = None,
    **options: Any,
) -> Any:
    """What `decode` gives, with the pages of a common prefix read once for the queries of all sequences and not once for each.

    Two calls of `decode` over layouts that are halves of one, and `merge`: the prefix for all queries, stacked; the rest for each sequence.
    Exact for every pattern, and for sequences of different lengths, since every query keeps its position. A prefix consists of whole pages
    that stand in the tables of all sequences, before the first query of each.

    Args:
        prefix_tokens: length of the prefix, a multiple of page_size; by default as long as the tables agree. Without any this is `decode`.
        options: scale, softcap, k_scale, v_scale, backend of `decode`, whose arguments and results the others are too.

    Raises:
        ValueError, TypeError, Unsupported: as `decode`; also a prefix that the tables do not share, or that reaches a query.

    >>> import s2attn
    >>> k_pages, v_pages = torch.randn(2, 10, 16, 1, 8)
    >>> table = torch.tensor([[3, 1, 4, 5], [3, 1, 4, 9]])  # two sequences begin with the same 48 tokens
    >>> q, where = torch.randn(2, 1, 2, 8), {"block_table": table, "seq_lens": torch.tensor([50, 63])}
    >>> out = s2attn.decode_cascade(q, k_pages, v_pages, s2attn.Dense(), **where)
    >>> torch.allclose(out, s2attn.decode(q, k_pages, v_pages, s2attn.Dense(), **where), atol=1e-6)
    True
    """
    if not isinstance(pattern, Pattern):
        raise bad_kind("pattern", f"must be a Pattern{pattern_hint(pattern)}", pattern)
    q = autocast_to_pages(q, k_pages, v_pages)
    check_paged_tensors(q, k_pages, v_pages, packed=cu_seqlens_q is not None)
    check_tables(q, k_pages, block_table, seq_lens, cu_seqlens_q)
    check_heads(heads, q)
    if cu_seqlens_q is None:
        cu = list(range(0, q.shape[0] * q.shape[1] + 1, q.shape[1])) if q.shape[1] else [0] * (len(q) + 1)
    else:
        cu = read_cu_seqlens("cu_seqlens_q", cu_seqlens_q, len(q))
    table, page_size = block_table if block_table.dim() == 3 else block_table[:, None], k_pages.shape[1]
    queries, tokens = [after - before for before, after in pairwise(cu)], seq_lens.tolist()
    room = table.shape[2] * page_size
    if not all(0 <= length <= room for length in tokens):
        raise bad_value("seq_lens", f"must be 0 to {room}, the tokens that block_table has room for", tokens)
    common = shared_pages(table, list(zip(queries, tokens, strict=True)), page_size)
    agreed = page_size * common.shape[1]
    prefix = agreed if prefix_tokens is None else check_int("prefix_tokens", prefix_tokens, 0)
    if prefix % page_size or prefix > agreed:
        rule = f"must be a multiple of page_size ({page_size}), up to the {agreed} tokens that all tables share before the queries"
        raise bad_value("prefix_tokens", rule, prefix_tokens)
    how: Any = {**options, "return_lse": True}
    if not prefix or sum(count > 0 for count in queries) < 2:
        where: Any = {"block_table": block_table, "seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q}
        out, lse = decode(q, k_pages, v_pages, pattern, **where, sinks=sinks, layer=layer, heads=heads, **how)
        return (out, lse) if return_lse else out
    halves = _halves(pattern, layer, heads, _Sizes(q.shape[-2], k_pages.shape[2], page_size, prefix, tuple(queries), tuple(tokens)))
    flat, total, device = q.reshape(-1, *q.shape[-2:]), cu[-1], seq_lens.device
    unread = common.new_full((len(common), -(-total // page_size)), -1)  # the places of the queries themselves
    pages = torch.cat([common[:, : prefix // page_size], unread], dim=1)
    whole = {"seq_lens": torch.tensor([prefix + total], device=device), "cu_seqlens_q": torch.tensor([0, total], device=device)}
    each = {"block_table": block_table, "seq_lens": seq_lens, "cu_seqlens_q": torch.tensor(cu, device=device)}
    shared, own = halves.shared.to(q.device), halves.own.to(q.device)
    parts = [
        decode(flat, k_pages, v_pages, own, **each, sinks=sinks, **how),
        decode(flat, k_pages, v_pages, shared, block_table=pages[None] if block_table.dim() == 3 else pages, **whole, **how),
    ]
    out, lse = merge(parts)
    if cu_seqlens_q is None:
        out, lse = out.view(*q.shape[:-1], -1), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    return (out, lse) if return_lse else out


def shared_pages(table: Tensor, calls: list[tuple[int, int]], page_size: int) -> Tensor:
    """The first pages ``(lines, n)`` of ``table`` ``(B, lines, pages)`` that all sequences of (queries, tokens) share, before the queries.

    A page that one of them has given back (-1) is shared if the others agree: no query of that sequence reads it.
    """
    asking = [i for i, (queries, tokens) in enumerate(calls) if queries and tokens]
    if not asking:
        return table.new_zeros(table.shape[1], 0)
    most = max(0, min((calls[i][1] - calls[i][0]) // page_size for i in asking))
    some = table[asking, :, :most]
    top = some.amax(0)
    same = ((some == top) | (some < 0)).all(0).all(0)
    return top[:, : int(same.long().cumprod(0).sum())]


@dataclass(frozen=True)
class _Sizes:
    num_heads: int
    num_kv_heads: int
    page_size: int
    prefix: int
    queries: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Asked:
    """What a split is made of; layers whose heads have equal patterns find the same one."""

    resolved: tuple[Pattern, ...]
    block: int
    sizes: _Sizes
    pattern: Pattern = field(compare=False)
    layer: int = field(compare=False)
    heads: HeadRange | None = field(compare=False)


def _halves(pattern: Pattern, layer: int, heads: HeadRange | None, sizes: _Sizes) -> Cascade:
    everyone = heads or HeadRange(0, sizes.num_heads, sizes.num_heads, sizes.num_kv_heads)
    block = next(size for size in reversed(BLOCKS) if sizes.page_size % size == 0 and size <= max(16, default_block(pattern)))
    resolved = tuple(layout_heads(pattern, everyone, sizes.num_kv_heads, check_int("layer", layer, 0)))
    return _split(_Asked(resolved, block, sizes, pattern, layer, heads))


@lru_cache(maxsize=64)
def _split(asked: _Asked) -> Cascade:
    sizes = asked.sizes
    cu_q, cu_k = (torch.tensor([0, *numbers]).cumsum(0) for numbers in (sizes.queries, sizes.tokens))
    settings: Any = {"block": asked.block, "layer": asked.layer, "heads": asked.heads, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    return split_prefix(build_layout(asked.pattern, sizes.num_heads, sizes.num_kv_heads, **settings), sizes.prefix)
