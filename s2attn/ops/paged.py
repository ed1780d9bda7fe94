"""The decode op as torch.library knows it, and the checks that need to look at numbers: lengths and block tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from s2attn.backends import Pages, Scoring, pick_paged
from s2attn.backends.checks import exact_arithmetic, lse_dtype
from s2attn.core import bad_value
from s2attn.layout import Layout, read_cu_seqlens
from s2attn.ops.source import CallSizes, find_layout, layout_of

_library = torch.library.Library("s2attn", "FRAGMENT")
_library.define(
    "decode(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, "
    "Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, Tensor[] index, "
    "str source, float scale, float softcap, str backend) -> (Tensor, Tensor)"
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
    cu_seqlens_q: Tensor,
    index: list[Tensor],
    source: str,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    table = block_table.unsqueeze(1) if block_table.dim() == 2 else block_table
    pages = Pages(k_pages, v_pages, table, k_scale, v_scale)
    chosen = pick_paged(backend, q, pages)
    if not q.numel():
        return _empty_results(q, v_pages)
    lengths = read_lengths(cu_seqlens_q, seq_lens, q.shape[1], table.shape[2] * pages.page_size)
    if index:
        layout = find_layout(source, index, q, q)
        _check_lengths(layout, cu_seqlens_q, seq_lens)
    else:
        layout = layout_of(source, CallSizes(q.shape[1], q.shape[2], lengths[1][-1], pages.kv_heads, q.device), lengths)
    check_listed(layout, pages)
    floor = None if sinks is None else sinks.detach().to(lse_dtype(q.dtype))
    if not layout.rows.entries:
        out, lse = _empty_results(q, v_pages)
        return out.zero_(), lse.fill_(-torch.inf) if floor is None else lse.copy_(floor[:, None])
    with exact_arithmetic(q.device):
        out, lse = chosen.forward_paged(q, pages, layout, Scoring(scale, softcap or None, floor))
    return out.contiguous(), lse.contiguous()


def _fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v_pages)


def _empty_results(q: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v_pages.shape[-1]))
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype(q.dtype))


def read_lengths(cu_seqlens_q: Tensor, seq_lens: Tensor, total_q: int, room: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cumulative lengths of queries and of keys as numbers, checked: no sequence is longer than its table, which has ``room`` tokens."""
    cu_q, cu_k = read_cu_seqlens("cu_seqlens_q", cu_seqlens_q, total_q), [0]
    for sequence, ((before, after), tokens) in enumerate(zip(pairwise(cu_q), seq_lens.tolist(), strict=True)):
        if not 0 <= tokens <= room:
            raise bad_value(
                "seq_lens", f"must be 0 to {room}, the tokens that block_table has room for", f"{tokens} for sequence {sequence}"
            )
        # A sequence without new queries reads nothing, so none of its keys need a place in the layout.
        cu_k.append(cu_k[-1] + (tokens if after > before else 0))
    return tuple(cu_q), tuple(cu_k)


def _check_lengths(layout: Layout, cu_seqlens_q: Tensor, seq_lens: Tensor) -> None:
    """A layout that was handed in is of the very sequences of the call."""
    queries, keys = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).tolist(), seq_lens.tolist()
    for name, spans, expected in (("queries", layout.q_spans, queries), ("keys", layout.k_spans, keys)):
        found = torch.zeros(max(len(expected), int(spans.seq.max()) + 1 if len(spans) else 0), dtype=torch.int64, device=layout.device)
        found.index_add_(0, spans.seq.long(), spans.length.long())
        if found.tolist() != expected:
            raise bad_value("layout", f"must have sequences of {expected} {name}, by seq_lens and cu_seqlens_q or q", found.tolist())


def check_listed(layout: Layout, pages: Pages) -> None:
    """Refuse a block table that points outside of the cache, or to an evicted page, where the layout lists a block."""
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    corners = torch.stack([layout.rows.ptr[:, 0], layout.rows.ptr[:, -1]], dim=1).tolist()
    for head, (low, high) in enumerate(corners):
        if (low, high) not in seen:
            block = torch.unique(layout.rows.idx[low:high]).long()
            seen[low, high] = layout.k_spans.seq[block].long(), layout.k_spans.pos[block].long() // pages.page_size
        sequence, number = seen[low, high]
        kv_head = head * pages.kv_heads // layout.heads
        page = pages.table[sequence, kv_head if pages.table.shape[1] > 1 else 0, number]
        wrong = (page < 0) | (page >= pages.k.shape[0])
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            where = f"sequence {int(sequence[first])}, KV head {kv_head}, entry {int(number[first])}"
            rule = f"must name one of the {pages.k.shape[0]} pages wherever the pattern reads (-1 is an evicted page)"
            raise bad_value("block_table", rule, f"{int(page[first])} for {where}")


_library.impl("decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("s2attn::decode", _fake, lib=_library)
decode_op = torch.ops.s2attn.decode.default
