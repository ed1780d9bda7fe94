"""`decode`: attention over a paged cache, for one new token per sequence or many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2attn.core import Unsupported, bad_kind, bad_value, check_int
from s2attn.layout import HeadRange, Layout
from s2attn.ops.checks import check_heads, check_layout_place, check_scale, check_sinks, check_softcap
from s2attn.ops.paged import decode_op
from s2attn.ops.selector import Selector
from s2attn.ops.source import layout_text, pattern_text
from s2attn.patterns import Pattern, Recipe


def decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pattern: Pattern | Layout,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    layer: int = 0,
    heads: HeadRange | None = None,
    backend: str = "auto",
    validate: bool = True,
    batch_invariant: bool = False,
) -> Any:
    """Causal attention of new queries over keys and values that lie in pages; only pages that the pattern lists are read.

    The queries of a sequence are the last of its ``seq_lens`` tokens: query i of T has position ``i + seq_len - T``. So one call serves
    decoding, several tokens at a time, chunks of a prefill, prompts behind a cached prefix, and all of these side by side. The result is
    that of `attention` on the same keys and values laid out one after another. There is no gradient.

    Args:
        q: ``(B, T, H, D)``, or packed ``(total_q, H, D)`` with ``cu_seqlens_q``; any strides.
        k_pages, v_pages: ``(num_pages, page_size, G, D)`` and ``(num_pages, page_size, G, Dv)``, any strides (pages that are stored heads
            first are passed as ``pages.transpose(1, 2)``); page_size is a multiple of 16. The dtype of q, or float8_e4m3fn.
        pattern: which keys are seen: a `Pattern`; or a `Layout` whose block divides page_size (``layer`` and ``heads`` then do not apply),
            packed, of the very sequences of the call, or square, where a query at position p reads row ``p // block``.
        block_table: ``(B, max_pages)`` int32 or int64, the page of each ``page_size`` tokens of a sequence; or ``(B, G, max_pages)``, for
            each KV head its own. Entries that the pattern does not read may be anything: -1 marks an evicted page.
        seq_lens: ``(B,)`` int32 or int64, tokens of each sequence, the new ones included, whose keys and values are in their pages.
        cu_seqlens_q: ``(B + 1,)`` cumulative numbers of queries, where q is packed. A sequence may have none.
        k_scale, v_scale: ``(G,)`` float32: what float8 pages are multiplied by; 1 by default.
        scale, softcap, sinks, return_lse, layer, heads, backend: as in `attention`.
        validate: look at lengths and tables first, and wait for the device to do so. Without it, and always during the capture of a CUDA
            graph, kernels clamp what makes no sense: lengths to the table, ``cu_seqlens_q`` to a rising walk inside q (a query of no
            sequence gives 0 and -inf), and keys in pages that do not exist count as unseen. Nothing outside of the tensors is read or
            written. The torch backend reads sizes on the host, and cannot be captured.
        batch_invariant: the bits of a sequence's result depend on that sequence alone, at some cost in speed.

    Returns:
        out in the shape of q with v's width, in q's dtype; with ``return_lse`` also lse ``(B, H, T)`` or ``(H, total_q)``. A query that
        sees no key (as the padding of a batch, with a ``seq_len`` of 0) gives 0, and -inf or its head's sink.

    Raises:
        ValueError, TypeError: a bad argument, named with its rule, before anything is read: also a block table that points outside of the
            cache where the pattern reads, if numbers are looked at.
        Unsupported: no backend, or not the named one, can serve the call; or a gradient is wanted.

    >>> import torch, s2attn
    >>> k_pages, v_pages = torch.randn(2, 10, 64, 2, 32)
    >>> q, table = torch.randn(1, 1, 8, 32), torch.tensor([[7, 3, 9]])
    >>> s2attn.decode(q, k_pages, v_pages, s2attn.Window(64), block_table=table, seq_lens=torch.tensor([150])).shape
    torch.Size([1, 1, 8, 32])
    """
    check_paged_tensors(q, k_pages, v_pages, packed=cu_seqlens_q is not None)
    check_tables(q, k_pages, block_table, seq_lens, cu_seqlens_q)
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_page_scale(name, factor, k_pages if name == "k_scale" else v_pages)
    scale, softcap = check_scale(scale, q.shape[-1]), check_softcap(softcap)
    check_sinks(sinks, q)
    if not isinstance(backend, str):
        raise bad_kind("backend", "must be a string", backend)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_pages, v_pages, sinks)):
        raise Unsupported("decode has no gradient", {"autograd": ["call it under torch.no_grad(), or train with s2attn.attention"]})
    source, index = _source(pattern, q, k_pages, layer, heads)
    flat = q.unsqueeze(0) if cu_seqlens_q is not None else q.reshape(1, -1, *q.shape[2:])
    scales, how = (k_scale, v_scale), (backend, bool(validate), bool(batch_invariant))
    where = block_table, seq_lens, cu_seqlens_q, index, source
    out, lse = decode_op(flat, k_pages, v_pages, sinks, *scales, *where, scale, softcap or 0.0, *how)
    if cu_seqlens_q is None:
        out, lse = out.view(*q.shape[:-1], out.shape[-1]), lse[0].unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    else:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _source(pattern: Pattern | Layout, q: Tensor, k_pages: Tensor, layer: int, heads: HeadRange | None) -> tuple[str, list[Tensor]]:
    """What the op is told of the pattern, checked: text, and the tensors of a layout."""
    page_size = k_pages.shape[1]
    if isinstance(pattern, Layout):
        if layer or heads is not None:
            raise bad_value("layer and heads", "must be left out when a Layout is given", (layer, heads))
        if not pattern.causal or not (pattern.packed or pattern.seqlen_q == pattern.seqlen_k):
            rule = "must be causal, and square or of packed sequences, one for each line of block_table"
            raise bad_value("layout", rule, pattern)
        if page_size % pattern.block:
            raise bad_value("layout", f"must have a block that divides page_size ({page_size})", pattern.block)
        check_layout_place(pattern, q)
        return layout_text(pattern), pattern.tensors()
    if not isinstance(pattern, Pattern):
        hint = "; take recipe.pattern(layer)" if isinstance(pattern, Recipe) else ""
        if isinstance(pattern, Selector):
            hint = "; a selector has no pages to look at (PageBounds.pages chooses pages, for the pattern Dense)"
        raise bad_kind("pattern", f"must be a Pattern or a Layout{hint}", pattern)
    check_heads(heads, q)
    return pattern_text(pattern, None, True, check_int("layer", layer, 0), heads), []


def check_paged_tensors(q: Tensor, k_pages: Tensor, v_pages: Tensor, packed: bool) -> None:
    for name, tensor in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if not isinstance(tensor, Tensor):
            raise bad_kind(name, "must be a tensor", tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating point dtype; got {tensor.dtype}")
        if tensor.device != q.device:
            raise bad_value(name, f"must lie on the device of q, {q.device}", tensor.device)
    if q.dim() != (3 if packed else 4):
        axes = "(total_q, heads, head_dim) with cu_seqlens_q" if packed else "(batch, q_len, heads, head_dim)"
        raise bad_value("q", f"must have shape {axes}", tuple(q.shape))
    check_pages(k_pages, v_pages)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dtype not in (q.dtype, torch.float8_e4m3fn):
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, or float8_e4m3fn; got {pages.dtype}")
    if k_pages.shape[-1] != q.shape[-1]:
        raise bad_value("k_pages", f"must have the head_dim of q, {q.shape[-1]}", k_pages.shape[-1])
    if not q.shape[-2] or q.shape[-2] % k_pages.shape[2]:
        raise bad_value("q", f"must have a multiple of the {k_pages.shape[2]} heads of k_pages", q.shape[-2])


def check_pages(k_pages: Tensor, v_pages: Tensor) -> None:
    """Shapes of the pages of a cache."""
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.dim() != 4 or 0 in pages.shape[1:]:
            raise bad_value(name, "must have shape (num_pages, page_size, kv_heads, head_dim)", tuple(pages.shape))
    if k_pages.shape[:3] != v_pages.shape[:3]:
        raise bad_value(
            "v_pages", f"must have the shape of k_pages but for the last axis, {tuple(k_pages.shape[:3])}", tuple(v_pages.shape[:3])
        )
    if k_pages.shape[1] % 16:
        raise bad_value("k_pages", "must have a page_size that is a multiple of 16", k_pages.shape[1])


def check_page_scale(name: str, factor: Tensor | None, pages: Tensor) -> None:
    """A factor for each KV head of float8 pages, or None."""
    if factor is None:
        return
    if not isinstance(factor, Tensor) or factor.dtype != torch.float32:
        raise bad_kind(name, "must be a float32 tensor or None", factor)
    if pages.dtype != torch.float8_e4m3fn:
        raise bad_value(name, "must be left out unless the pages are float8_e4m3fn", pages.dtype)
    if factor.shape != (pages.shape[2],) or factor.device != pages.device:
        raise bad_value(name, f"must have shape ({pages.shape[2]},), one number for each KV head, on {pages.device}", tuple(factor.shape))


def check_tables(q: Tensor, k_pages: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor | None) -> None:
    for name, numbers in (("block_table", block_table), ("seq_lens", seq_lens), ("cu_seqlens_q", cu_seqlens_q)):
        if numbers is None:
            continue
        if not isinstance(numbers, Tensor):
            raise bad_kind(name, "must be an int32 or int64 tensor", numbers)
        if numbers.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor; got {numbers.dtype}")
    if block_table.device != q.device:
        raise bad_value("block_table", f"must lie on the device of q, {q.device}", block_table.device)
    if block_table.dim() not in (2, 3) or (block_table.dim() == 3 and block_table.shape[1] != k_pages.shape[2]):
        rule = f"must have shape (batch, max_pages), or (batch, {k_pages.shape[2]}, max_pages) with a table for each KV head"
        raise bad_value("block_table", rule, tuple(block_table.shape))
    batch = block_table.shape[0] if cu_seqlens_q is not None else q.shape[0]
    if block_table.shape[0] != batch:
        raise bad_value("block_table", f"must have a line for each sequence of q, {batch}", tuple(block_table.shape))
    if seq_lens.shape != (batch,):
        raise bad_value("seq_lens", f"must have shape ({batch},), one number for each sequence", tuple(seq_lens.shape))
    if cu_seqlens_q is not None and cu_seqlens_q.shape != (batch + 1,):
        raise bad_value(
            "cu_seqlens_q", f"must have shape ({batch + 1},), one number more than block_table has lines", tuple(cu_seqlens_q.shape)
        )
