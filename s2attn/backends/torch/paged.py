"""Attention over pages of a cache, and writing into them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.base import Pages, Requests, Writes
from s2attn.backends.torch.attend import STEP_KEYS, Fetch, Problem, attend, hide_keys, how_many, take
from s2attn.backends.torch.chunks import Array, Chunk, Items, chunks
from s2attn.backends.torch.rows import Hide, Rows
from s2attn.patterns.runs import ranges


def attend_paged(p: Problem, pages: Pages, requests: Requests) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of packed queries whose keys lie in pages; ``p.k`` and ``p.v`` are the pages."""
    batch, tokens = requests.batch, p.q.shape[1]
    lines = _lines_of_spans(p, batch) if p.layout.packed else _lines_by_position(p, pages, requests)
    lines = lines[:, lines[4] + lines[3] - 1 < tokens]
    units = p.heads.units
    seq, row, low, count, query = (np.tile(x, units) for x in lines)
    unit = np.repeat(np.arange(units), lines.shape[1])
    items = Items(seq, unit, p.heads.layout_head[unit], row, low, count, query)
    return _run(p, pages, items)


def _lines_of_spans(p: Problem, batch: int) -> Array:
    """``(5, lines)``: sequence, row block, first row of it, rows, and first query of each line of a packed layout."""
    spans = p.layout.q_spans
    start, length, seq = (x.cpu().numpy().astype(np.int64) for x in (spans.start, spans.length, spans.seq))
    lines = np.stack([seq, np.arange(len(seq)), np.zeros_like(seq), length, start])
    return lines[:, seq < batch]


def _lines_by_position(p: Problem, pages: Pages, requests: Requests) -> Array:
    """The same of a square layout, by the positions of the queries; numbers that make no sense are clamped."""
    block, total, room = p.layout.block, p.q.shape[1], pages.table.shape[2] * pages.page_size
    length = requests.seq_lens.cpu().numpy().astype(np.int64).clip(0, room)
    if requests.cu_seqlens_q is None:
        cu = np.arange(len(length) + 1) * (total // max(len(length), 1))
    else:
        cu = np.maximum.accumulate(requests.cu_seqlens_q.cpu().numpy().astype(np.int64).clip(0, total))
    begin = length - np.diff(cu)  # position of the first query
    first = np.maximum(begin, 0) // block
    rows = np.where((np.diff(cu) > 0) & (length > 0), np.minimum(-(-length // block), p.layout.rows.lines) - first, 0)
    rows = rows.clip(0)
    seq, row = np.repeat(np.arange(len(length)), rows), ranges(first, rows)
    low = np.maximum(begin[seq] - row * block, 0)
    high = np.minimum(length[seq] - row * block, block)
    return np.stack([seq, row, low, high - low, cu[seq] + row * block + low - begin[seq]])


def _run(p: Problem, pages: Pages, items: Items) -> tuple[Tensor, Tensor]:
    block, q = p.layout.block, p.padded(p.q)
    keys = PagedKeys(pages, Rows.of(pages.k), Rows.of(pages.v))
    sinks = p.scoring.sinks
    out = q.new_zeros((len(q), pages.v.shape[3]), dtype=p.dtype)
    lse = out.new_full((len(q),), -torch.inf)
    if sinks is not None:
        lse[:-1] = sinks.repeat(p.queries // len(sinks))

    def most(tokens: int, entries: int) -> int:
        width = pages.k.shape[3] + pages.v.shape[3] + tokens * p.heads.per_unit
        return how_many(q.device, min(entries * block, max(STEP_KEYS, block)) * width)

    for chunk in chunks(p.layout.rows, items, most):
        token, exists = chunk.row_tokens()
        number = p.query_numbers(torch.zeros_like(chunk.batch), chunk.unit, token, exists).flatten(1)
        floor = None if sinks is None else lse[number][..., None]
        fetch, steps = keys.fetch(p, chunk), p.steps(chunk, block)
        results = attend(take(q, number, p.dtype), steps, fetch, p.scoring, floor)
        for table, result in ((out, results[0]), (lse, results[1][..., 0])):
            table.index_copy_(0, number.flatten(), result.flatten(0, 1))
    return p.results(out, lse)


@dataclass(frozen=True, eq=False)
class PagedKeys:
    """Pages of a cache as tables of vectors."""

    pages: Pages
    k: Rows
    v: Rows

    def fetch(self, p: Problem, chunk: Chunk) -> Fetch:
        """What row blocks read; keys in pages that are not there are hidden."""
        pages, block, n = self.pages, p.layout.block, len(chunk.line)
        inside = torch.arange(block, device=p.q.device)
        head = (chunk.unit // p.heads.per_kv)[:, None]
        of_table = chunk.batch[:, None], head if pages.table.shape[1] > 1 else torch.zeros_like(head)

        def fetch(low: int, high: int) -> tuple[Tensor, Tensor, Hide]:
            first = p.layout.k_spans.pos[chunk.block[:, low:high]].long()
            token = (first[..., None] + inside).view(n, -1)
            entry = (token // pages.page_size).clamp(max=pages.table.shape[2] - 1)
            page = pages.table[(*of_table, entry)].long()
            there = (page >= 0) & (page < len(pages.k))
            where = torch.where(there, page, 0), token % pages.page_size, head
            k, v = (x.take(*where, p.dtype) for x in (self.k, self.v))
            for x, factor in ((k, pages.k_scale), (v, pages.v_scale)):
                if factor is not None:
                    x *= factor.to(p.dtype)[head][..., None]
            by_tile = hide_keys(chunk, low, high, p.hidden, block, p.heads.per_unit)
            gone = ~there[:, None]

            def hide(x: Tensor, fill: float) -> Tensor:
                return by_tile(x.masked_fill_(gone, fill), fill)

            return k, v, hide

        return fetch


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
