"""Layouts to and from padded tables of key blocks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.layout.convert import index_of, sorted_entries
from s2attn.layout.entries import entries_of
from s2attn.layout.index import spans_of
from s2attn.layout.layout import Layout
from s2attn.layout.tiles import TileTable, classify
from s2attn.patterns import Dense, Shape, View


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
