"""Heads of a tensor-parallel process as data: which global ones it holds, and which keys and values they read."""

from __future__ import annotations

from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.layout import HeadRange


def head_range(rank: int, ranks: int, *, num_heads: int, num_kv_heads: int) -> HeadRange:
    """The query heads that process ``rank`` of ``ranks`` holds: one contiguous part of them, as every host cuts its projections.

    ``s2attn.attention(..., heads=head_range(...))`` on the local tensors then gives the rows of the whole call.

    Args:
        num_heads, num_kv_heads: of the whole model. ``ranks`` divides num_heads; and it divides num_kv_heads, so that a process has KV
            heads of its own, or is a multiple of it, so that some processes hold the same one: :func:`kv_head_range`.

    >>> [head_range(rank, 4, num_heads=8, num_kv_heads=2).query_heads for rank in (0, 3)]
    [range(0, 2), range(6, 8)]
    """
    check_int("ranks", ranks, 1)
    if check_int("rank", rank, 0) >= ranks:
        raise bad_value("rank", f"must be below ranks ({ranks})", rank)
    check_int("num_heads", num_heads, 1)
    check_int("num_kv_heads", num_kv_heads, 1)
    if num_heads % ranks:
        raise bad_value("num_heads", f"must be a multiple of ranks ({ranks})", num_heads)
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise bad_value("num_kv_heads", f"must be a multiple of ranks ({ranks}), or divide it", num_kv_heads)
    each = num_heads // ranks
    return HeadRange(rank * each, (rank + 1) * each, num_heads, num_kv_heads)


def kv_head_range(heads: HeadRange) -> range:
    """The global KV heads that these query heads read, an equal number of query heads each.

    >>> kv_head_range(HeadRange(6, 8, num_heads=8, num_kv_heads=2)), kv_head_range(HeadRange(0, 4, num_heads=8, num_kv_heads=4))
    (range(1, 2), range(0, 2))
    """
    if not isinstance(heads, HeadRange):
        raise bad_kind("heads", "must be a HeadRange", heads)
    group = heads.num_heads // heads.num_kv_heads
    first, last = heads.start // group, (heads.end - 1) // group
    whole = heads.start % group == 0 and heads.end % group == 0
    if first != last and not whole:
        rule = f"must be whole groups of {group}, or lie in one group, so that local attention finds the KV head of each"
        raise bad_value("heads", rule, f"({heads.start}, {heads.end})")
    return range(first, last + 1)


def take_heads(x: Tensor, heads: HeadRange, *, kv: bool = False) -> Tensor:
    """The part of ``(..., heads, head_dim)`` with all global heads that belongs to a process; a view.

    Args:
        x: all query heads, or with ``kv`` all KV heads.

    >>> import torch
    >>> take_heads(torch.zeros(1, 5, 2, 4), HeadRange(6, 8, num_heads=8, num_kv_heads=2), kv=True).shape
    torch.Size([1, 5, 1, 4])
    """
    mine = kv_head_range(heads) if kv else heads.query_heads
    total = heads.num_kv_heads if kv else heads.num_heads
    if not isinstance(x, Tensor):
        raise bad_kind("x", "must be a tensor", x)
    if x.dim() < 2 or x.shape[-2] != total:
        raise bad_value("x", f"must have shape (..., {total}, head_dim)", tuple(x.shape))
    return x.narrow(-2, mine.start, len(mine))
