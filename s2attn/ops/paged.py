"""The decode op as torch.library knows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2attn.backends import Backend, Pages, Requests, Scoring, pick_paged
from s2attn.backends.checks import exact_arithmetic, lse_dtype
from s2attn.layout import Layout
from s2attn.ops.looks import check_listed, check_sequences, cumulative_keys, may_look, read_lengths
from s2attn.ops.source import CallSizes, block_for, find_layout, layout_of, with_block

_library = torch.library.Library("s2attn", "FRAGMENT")
_library.define(
    "decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, "
    "Tensor block_table, Tensor seq_lens, Tensor? cu_seqlens_q, Tensor[] index, "
    "str source, float scale, float softcap, str backend, bool validate, bool batch_invariant) -> (Tensor, Tensor)"
)


def _decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    index: list[Tensor],
    source: str,
    scale: float,
    softcap: float,
    backend: str,
    validate: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    table = block_table.unsqueeze(1) if block_table.dim() == 2 else block_table
    pages = Pages(k_pages, v_pages, table, k_scale, v_scale)
    chosen = pick_paged(backend, q, pages)
    floor = None if sinks is None else sinks.detach().to(lse_dtype(q.dtype))
    if not q.numel():
        return _empty_results(q, v_pages)
    looks = may_look(validate, q) or not chosen.by_position
    cu = None if cu_seqlens_q is None else cu_seqlens_q.to(q.device)
    requests = Requests(seq_lens.to(q.device), cu, looks, batch_invariant)
    layout = _layout(chosen, q, pages, requests, index, source)
    if layout is None:
        out, lse = _empty_results(q, v_pages)
        return out.zero_(), lse.fill_(-torch.inf) if floor is None else lse.copy_(floor[:, None])
    with exact_arithmetic(q.device):
        out, lse = chosen.forward_paged(q, pages, requests, layout, Scoring(scale, softcap or None, floor))
    return out.contiguous(), lse.contiguous()


def _layout(chosen: Backend, q: Tensor, pages: Pages, requests: Requests, index: list[Tensor], source: str) -> Layout | None:
    """The lists of a call, after a look at its numbers where that is allowed; None when no query sees anything, as far as is known."""
    room = pages.table.shape[2] * pages.page_size
    sizes = q.shape[2], pages.kv_heads, q.device
    lengths = read_lengths(requests.cu_seqlens_q, requests.seq_lens, q.shape[1], room) if requests.checked else None
    if not room:
        return None
    if index:
        layout = find_layout(source, index, q, q)
        if lengths:
            check_sequences(layout, *lengths)
    elif chosen.by_position:
        layout = layout_by_position(source, room, *sizes)
    else:
        assert lengths is not None
        numbers = lengths[0], cumulative_keys(*lengths)
        text = with_block(source, block_for(source, pages.page_size))
        layout = layout_of(text, CallSizes(q.shape[1], sizes[0], numbers[1][-1], *sizes[1:]), numbers)
    if lengths:
        check_listed(layout, pages, *lengths)
        if layout.packed and not layout.rows.entries:
            return None
    return layout


def layout_by_position(source: str, room: int, num_heads: int, num_kv_heads: int, device: torch.device) -> Layout:
    """The square layout of a pattern's text for every position below ``room``: it serves all lengths, and is made once.

    Its size is rounded up to a power of two of blocks, so that a table that grows finds it again.
    """
    block = block_for(source, 0)
    capacity = block << (-(-room // block) - 1).bit_length()
    return layout_of(with_block(source, block), CallSizes(capacity, num_heads, capacity, num_kv_heads, device))


def _fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v_pages)


def _empty_results(q: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v_pages.shape[-1]))
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype(q.dtype))


_library.impl("decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("s2attn::decode", _fake, lib=_library)
decode_op = torch.ops.s2attn.decode.default
