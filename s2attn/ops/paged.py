"""The decode op as torch.library knows it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from s2attn.backends import Backend, Pages, Requests, Scoring, pick_paged
from s2attn.backends.checks import exact_arithmetic, lse_dtype
from s2attn.layout import Layout
from s2attn.layout.positions import query_lines, take_lines
from s2attn.ops.looks import Numbers, check_listed, check_sequences, cumulative_keys, may_look, read_lengths
from s2attn.ops.source import CallSizes, block_for, find_layout, keep_captured, layout_of, with_block

MOST_BY_POSITION = 16
"""New tokens of a sequence for which its rows of a square layout are taken one by one; longer prompts merge neighbouring rows."""
LONGEST_BY_POSITION = 1 << 17
"""Beyond so many tokens a square layout costs more than many layouts of a few rows."""

_KEEP_TAKEN = 4
_taken: WeakKeyDictionary[Layout, OrderedDict[tuple[Numbers, Numbers], tuple[Layout, Tensor]]] = WeakKeyDictionary()
_lock = Lock()

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
    prepared = _prepare(chosen, q, pages, requests, index, source)
    if prepared is None:
        out, lse = _empty_results(q, v_pages)
        return out.zero_(), lse.fill_(-torch.inf) if floor is None else lse.copy_(floor[:, None])
    layout, pages = prepared
    keep_captured(layout, q)
    with exact_arithmetic(q.device):
        out, lse = chosen.forward_paged(q, pages, requests, layout, Scoring(scale, softcap or None, floor))
    return out.contiguous(), lse.contiguous()


def _prepare(
    chosen: Backend, q: Tensor, pages: Pages, requests: Requests, index: list[Tensor], source: str
) -> tuple[Layout, Pages] | None:  # fmt: skip
    """The lists of a call and the pages that they are of, after a look at its numbers where that is allowed.

    None when no query sees anything, as far as is known.
    """
    room = pages.table.shape[2] * pages.page_size
    lengths = read_lengths(requests.cu_seqlens_q, requests.seq_lens, q.shape[1], room) if requests.checked else None
    if not room:
        return None
    heads = q.shape[2], pages.kv_heads, q.device
    layout = find_layout(source, index, q, q) if index else None
    if lengths is None:
        return layout or layout_by_position(source, block_for(source, 0), room, *heads), pages
    if layout is not None:
        check_sequences(layout, *lengths)
    elif chosen.by_position:
        layout = layout_by_position(source, block_for(source, 0), room, *heads)
    else:
        layout = _layout_of_lengths(source, *lengths, pages.page_size, *heads)
    owner = lines = None
    if not layout.packed:
        if chosen.by_position:
            lines = query_lines(*lengths, layout.block, q.device)
        else:
            layout, owner = _taken_once(layout, *lengths)
            pages = replace(pages, table=pages.table[owner])
    check_listed(layout, pages, owner, lines)
    return None if layout.packed and not layout.rows.entries else (layout, pages)


def _taken_once(square: Layout, cu_q: Numbers, tokens: Numbers) -> tuple[Layout, Tensor]:
    """The rows of a square layout that queries read as a packed one, and the sequence of each; all layers of a step find the same."""
    with _lock:
        found = _taken.setdefault(square, OrderedDict()).get((cu_q, tokens))
    if found is None:
        lines = query_lines(cu_q, tokens, square.block, square.device)
        found = take_lines(square, lines, cu_q[-1]), lines.seq
        with _lock:
            kept = _taken[square]
            kept[cu_q, tokens] = found
            while len(kept) > _KEEP_TAKEN:
                kept.popitem(last=False)
    return found


def _layout_of_lengths(
    source: str, cu_q: Numbers, tokens: Numbers, page_size: int, num_heads: int, num_kv_heads: int, device: torch.device
) -> Layout:  # fmt: skip
    """Lists for backends that look: by position where a few tokens are decoded, so that the next ones find them again; else packed."""
    block = block_for(source, page_size)
    new = max(after - before for before, after in pairwise(cu_q))
    if new <= MOST_BY_POSITION and 0 < max(tokens) <= LONGEST_BY_POSITION:
        return layout_by_position(source, block, max(tokens), num_heads, num_kv_heads, device)
    numbers = cu_q, cumulative_keys(cu_q, tokens)
    return layout_of(with_block(source, block), CallSizes(cu_q[-1], num_heads, numbers[1][-1], num_kv_heads, device), numbers)


def layout_by_position(source: str, block: int, room: int, num_heads: int, num_kv_heads: int, device: torch.device) -> Layout:
    """The square layout of a pattern's text for every position below ``room``: it serves all lengths, and is made once.

    Its size is rounded up to a power of two of blocks, so that a table that grows finds it again.
    """
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
