"""Layouts to and from dense masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_block
from s2attn.layout.entries import Entries, entries_of, index_from
from s2attn.layout.index import BlockIndex, spans_of
from s2attn.layout.tiles import TileTable

if TYPE_CHECKING:
    from s2attn.layout.layout import Layout

_AT_ONCE = 1 << 24


def to_dense(layout: Layout, head: int | None = None) -> Tensor:
    """See `Layout.to_dense`."""
    if head is None:
        return torch.stack([to_dense(layout, h) for h in range(layout.heads)])
    if not 0 <= head < layout.heads:
        raise bad_value("head", f"must be in 0 .. {layout.heads - 1}", head)
    block, mask = layout.block, torch.zeros(layout.seqlen_q, layout.seqlen_k, dtype=torch.bool, device=layout.device)
    entries, token = entries_of(layout.rows, head), torch.arange(block, device=layout.device)
    step = max(1, _AT_ONCE // (block * block))
    for at in range(0, len(entries.idx), step):
        line, idx, tile = (part[at : at + step] for part in (entries.line, entries.idx, entries.tile))
        seen = torch.ones(len(line), block, block, dtype=torch.bool, device=layout.device)
        seen[tile >= 0] = layout.tiles[tile[tile >= 0]]
        seen &= (token < layout.q_spans.length[line][:, None])[:, :, None] & (token < layout.k_spans.length[idx][:, None])[:, None, :]
        entry, i, j = seen.nonzero(as_tuple=True)
        mask[layout.q_spans.start[line].long()[entry] + i, layout.k_spans.start[idx].long()[entry] + j] = True
    return mask


def from_dense(make: type[Layout], mask: Tensor, *, block: int = 64) -> Layout:
    """See `Layout.from_dense`; ``make`` is `Layout`, which imports this module."""
    if not isinstance(mask, Tensor):
        raise bad_kind("mask", "must be a bool tensor", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor; got {mask.dtype}")
    if mask.dim() not in (2, 3) or (mask.dim() == 3 and not mask.shape[0]):
        raise bad_value("mask", "must have shape (T, S) or (heads, T, S) with at least one head", tuple(mask.shape))
    check_block("block", block)
    masks = (mask[None] if mask.dim() == 2 else mask).detach().cpu()
    seqlen_q, seqlen_k = masks.shape[1:]
    q_spans, k_spans = spans_of([seqlen_q], block, [seqlen_k - seqlen_q]), spans_of([seqlen_k], block)
    tiles, heads = TileTable(block), []
    for one in masks:
        padded = torch.zeros(len(q_spans) * block, len(k_spans) * block, dtype=torch.bool)
        padded[:seqlen_q, :seqlen_k] = one
        blocks = padded.view(len(q_spans), block, len(k_spans), block).permute(0, 2, 1, 3)
        line, idx = blocks.any(dim=3).any(dim=2).nonzero(as_tuple=True)
        exists = torch.arange(block)[None, :, None] < q_spans.length[line][:, None, None]
        number = tiles.number(blocks[line, idx].numpy(), exists.expand(-1, block, block).numpy())
        heads.append(sorted_entries(line, idx, torch.from_numpy(number)))
    index = index_of(heads, len(q_spans))
    causal = not bool(torch.triu(masks, diagonal=seqlen_k - seqlen_q + 1).any())
    return make(block, causal, index, tiles.tensor(), q_spans, k_spans).to(mask.device)


def sorted_entries(line: Tensor, idx: Tensor, number: Tensor) -> Entries:
    order = torch.sort(line * 2 + (number >= 0), stable=True).indices
    return Entries(line[order], idx[order], number[order])


def index_of(heads: list[Entries], lines: int) -> BlockIndex:
    empty = BlockIndex(*(torch.zeros(0, dtype=torch.int64) for _ in range(5)))
    return index_from(heads, list(range(len(heads))), lines, empty)
