"""Attention over pages of a cache, and writing into them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.base import Pages, Requests, Writes
from s2attn.backends.torch.attend import Problem, attend
from s2attn.backends.torch.chunks import Items
from s2attn.backends.torch.rows import Rows
from s2attn.patterns.runs import ranges


def attend_paged(p: Problem, pages: Pages, requests: Requests) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the packed queries ``p.q``, whose keys lie in pages."""
    lines = _lines_of_spans(p, requests) if p.layout.packed else _lines_by_position(p, pages, requests)
    seq, row, low, rows, first = np.tile(np.stack(lines), p.units)
    unit = np.repeat(np.arange(p.units), len(lines[0]))
    items = Items(seq, unit, unit * p.layout.heads // p.units, row, low, rows, first)
    source = Paged(pages, Rows.of(pages.k), Rows.of(pages.v), p.layout.k_spans.pos, p.inside, p.dtype)
    return attend(p, source, items, pages.k.shape[3] + pages.v.shape[3], pages.v.shape[3])


def _lines_of_spans(p: Problem, requests: Requests) -> list[np.ndarray]:
    """Sequence, row block, its first row, number of rows, and first query: of a packed layout."""
    start, length, seq = (x.cpu().numpy().astype(np.int64) for x in p.layout.q_spans.tensors()[:3])
    kept = (seq < requests.batch) & (start + length <= p.q.shape[1])
    row = np.flatnonzero(kept)
    return [seq[row], row, np.zeros_like(row), length[row], start[row]]


def _lines_by_position(p: Problem, pages: Pages, requests: Requests) -> list[np.ndarray]:
    """The same of a square layout, by the positions of the queries; bad numbers are clamped."""
    block, total, room = p.layout.block, p.q.shape[1], pages.table.shape[2] * pages.page_size
    length = requests.seq_lens.cpu().numpy().astype(np.int64).clip(0, room)
    if requests.cu_seqlens_q is None:
        cu = np.arange(len(length) + 1) * (total // max(len(length), 1))
    else:
        cu = np.maximum.accumulate(requests.cu_seqlens_q.cpu().numpy().astype(np.int64).clip(0, total))
    begin = length - np.diff(cu)  # position of the first query
    first = np.maximum(begin, 0) // block
    end = np.minimum(-(-length // block), p.layout.rows.lines)
    rows = np.where(np.diff(cu) > 0, end - first, 0).clip(0)
    seq, row = np.repeat(np.arange(len(length)), rows), ranges(first, rows)
    low = np.maximum(begin[seq] - row * block, 0)
    high = np.minimum(length[seq] - row * block, block)
    return [seq, row, low, high - low, cu[seq] + row * block + low - begin[seq]]


@dataclass(frozen=True, eq=False)
class Paged:
    """Keys and values in pages: those of pages that are not there do not exist."""

    pages: Pages
    k: Rows
    v: Rows
    position: Tensor
    inside: Tensor
    dtype: torch.dtype

    def read(self, batch: Tensor, head: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        pages, token = self.pages, (self.position[block].long()[..., None] + self.inside).flatten(1)
        entry = (token // pages.page_size).clamp(max=pages.table.shape[2] - 1)
        page = pages.table[batch, head if pages.table.shape[1] > 1 else 0, entry].long()
        gone = (page < 0) | (page >= len(pages.k))
        where = page.masked_fill(gone, 0), token % pages.page_size, head
        k, v = self.k.take(*where, self.dtype), self.v.take(*where, self.dtype)
        for x, factor in ((k, pages.k_scale), (v, pages.v_scale)):
            if factor is not None:
                x *= factor.to(self.dtype)[head][..., None]
        return k, v, gone


def write(new: Writes) -> None:
    """Write new keys and values into the slots of pages that are there."""
    size = new.k_pages.shape[1]
    slots = new.slots.long()
    kept = ((slots >= 0) & (slots < new.k_pages.shape[0] * size)).nonzero()[:, 0]
    slots = slots[kept]
    for rows, pages, factor in ((new.k, new.k_pages, new.k_scale), (new.v, new.v_pages, new.v_scale)):
        numbers = rows[kept]
        if pages.dtype == torch.float8_e4m3fn:
            numbers = numbers.float() if factor is None else numbers.float() / factor[:, None]
            most = torch.finfo(pages.dtype).max
            numbers = numbers.clamp(-most, most)
        with torch.no_grad():
            pages[slots // size, slots % size] = numbers.to(pages.dtype)
