"""Layouts to and from dense masks and padded block tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.layout.entries import Entries, entries_of, index_from
from s2attn.layout.index import BlockIndex, spans_of
from s2attn.layout.tiles import TileTable, classify
from s2attn.patterns import Dense, Shape, View

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


def from_dense(mask: Tensor, *, block: int = 64) -> Layout:
    """See `Layout.from_dense`."""
    from s2attn.layout.layout import Layout

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
    return Layout(block, causal, index, tiles.tensor(), q_spans, k_spans).to(mask.device)


def sorted_entries(line: Tensor, idx: Tensor, number: Tensor) -> Entries:
    order = torch.sort(line * 2 + (number >= 0), stable=True).indices
    return Entries(line[order], idx[order], number[order])


def index_of(heads: list[Entries], lines: int) -> BlockIndex:
    empty = BlockIndex(*(torch.zeros(0, dtype=torch.int64) for _ in range(5)))
    return index_from(heads, list(range(len(heads))), lines, empty)


def to_block_table(layout: Layout) -> tuple[Tensor, Tensor]:
    """The lists as a padded table, for kernels that want one.

    Returns:
        ``table (heads, rows, width)`` int32, the key blocks of each row, ascending, padded with -1 to the longest row; and
        ``counts (heads, rows)`` int32. Mask tiles are not part of it: it is exact to the block, not to the token.
    """
    counts = layout.rows.counts.int()
    width = int(counts.max()) if counts.numel() else 0
    table = torch.full((*counts.shape, width), -1, dtype=torch.int32, device=layout.device)
    for head in range(layout.heads):
        entries = entries_of(layout.rows, head)
        order = torch.sort(entries.line * (len(layout.k_spans) + 1) + entries.idx).indices
        ptr = layout.rows.ptr[head] - layout.rows.ptr[head, 0]
        place = torch.arange(len(order), device=layout.device) - ptr[entries.line]
        table[head, entries.line, place] = entries.idx[order].int()
    return table, counts


def from_block_table(table: Tensor, counts: Tensor, *, seqlen_q: int, seqlen_k: int, block: int = 64, causal: bool = True) -> Layout:
    """A layout from a padded table of key blocks; with ``causal`` the pairs after the query are cut from the listed blocks.

    Args:
        table: ``(heads, rows, width)`` integers; the first ``counts[h, r]`` of a row are key blocks, in any order, without repetition.
        counts: ``(heads, rows)`` integers.
        seqlen_q, seqlen_k: tokens; ``rows`` is their number of query blocks.

    Raises:
        ValueError: shapes that do not fit, a block out of range or listed twice.
        TypeError: not integer tensors.
    """
    from s2attn.layout.layout import Layout

    check_block("block", block)
    for name, tensor in (("table", table), ("counts", counts)):
        if not isinstance(tensor, Tensor):
            raise bad_kind(name, "must be an integer tensor", tensor)
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor; got {tensor.dtype}")
    seqlen_q, seqlen_k = check_int("seqlen_q", seqlen_q, 0), check_int("seqlen_k", seqlen_k, 0)
    rows, cols = -(-seqlen_q // block), -(-seqlen_k // block)
    if table.dim() != 3 or not table.shape[0] or table.shape[1] != rows or counts.shape != table.shape[:2]:
        rule = f"must have shape (heads, {rows}, width) with at least one head, and counts (heads, {rows})"
        raise bad_value("table", rule, (tuple(table.shape), tuple(counts.shape)))
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > table.shape[2]):
        raise bad_value("counts", f"must be in 0 .. {table.shape[2]}", [int(counts.min()), int(counts.max())])
    offset = seqlen_k - seqlen_q
    q_spans, k_spans = spans_of([seqlen_q], block, [offset]), spans_of([seqlen_k], block)
    view = View(q_spans.pos.long().numpy(), (q_spans.pos + q_spans.length - 1).long().numpy(), block, Shape(seqlen_k, causal))
    tiles, heads = TileTable(block), []
    for one, count in zip(table.cpu().long(), counts.cpu().long(), strict=True):
        line, place = (torch.arange(table.shape[2])[None, :] < count[:, None]).nonzero(as_tuple=True)
        idx, order = torch.sort(one[line, place], stable=True)
        line = line[order]
        line, order = torch.sort(line, stable=True)
        idx = idx[order]
        if len(idx) and (int(idx.min()) < 0 or int(idx.max()) >= cols):
            raise bad_value("table", f"must list key blocks in 0 .. {cols - 1}", [int(idx.min()), int(idx.max())])
        if bool(((idx[1:] == idx[:-1]) & (line[1:] == line[:-1])).any()):
            raise bad_value("table", "must list a key block once in a row", "a repetition")
        number = classify(Dense(), view, q_spans.length.long().numpy(), line.numpy(), idx.numpy(), tiles)
        kept = torch.from_numpy(np.asarray(number)) != tiles.EMPTY
        heads.append(sorted_entries(line[kept], idx[kept], torch.from_numpy(number)[kept]))
    return Layout(block, causal, index_of(heads, rows), tiles.tensor(), q_spans, k_spans).to(table.device)
