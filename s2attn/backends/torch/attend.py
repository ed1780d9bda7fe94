"""Attention of one layout, forward and backward: row blocks over their keys, then key blocks over their rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.checks import lse_dtype
from s2attn.backends.torch.chunks import Chunk, Items, chunks
from s2attn.backends.torch.rows import Hide, Rows, hidden_rows, product, weigh
from s2attn.layout import Layout, Spans

STEP_KEYS = 1024
"""Keys that an item attends to at a time, with a running softmax: memory does not grow with the length of a list."""
NUMBERS = 1 << 21
"""Scores and gathered numbers of a chunk on a CPU, which should stay in its caches."""
NUMBERS_ELSEWHERE = 1 << 26

Fetch = Callable[[int, int], tuple[Tensor, Tensor, Hide]]
"""Keys ``(n, N, D)`` and values ``(n, N, Dv)`` of entries ``low`` to ``high - 1`` of a chunk, and what of them is hidden."""


@dataclass(frozen=True, eq=False)
class Heads:
    """Query heads in units: neighbours that share a KV head and the lists of a layout head.

    Attributes:
        units: number of units, a multiple of the KV heads and of the layout heads.
        per_unit: query heads of a unit.
        per_kv: units of a KV head.
        layout_head: ``(units,)`` which lists a unit reads.
    """

    units: int
    per_unit: int
    per_kv: int
    layout_head: np.ndarray

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, layout_heads: int) -> Heads:
        units = math.lcm(num_kv_heads, layout_heads)
        return cls(units, num_heads // units, units // num_kv_heads, np.arange(units) * layout_heads // units)

    def of_unit(self, unit: Tensor) -> Tensor:
        """The query heads ``(n, per_unit)`` of units ``(n,)``."""
        return unit[:, None] * self.per_unit + torch.arange(self.per_unit, device=unit.device)


def items_of(spans: Spans, batch: int, heads: Heads) -> Items:
    """An item for every batch entry, unit and block of an axis."""
    start, length = (x.cpu().numpy().astype(np.int64) for x in (spans.start, spans.length))
    entry, unit, line = (x.ravel() for x in np.indices((batch, heads.units, len(start))))
    return Items(entry, unit, heads.layout_head[unit], line, np.zeros_like(line), length[line], start[line])


def how_many(device: torch.device, numbers_per_item: int) -> int:
    return (NUMBERS if device.type == "cpu" else NUMBERS_ELSEWHERE) // max(numbers_per_item, 1)


def logits(q: Tensor, k: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Logits ``(n, rows, keys)``, and with a soft-cap their derivative by the uncapped ones.

    Caps beyond what the dtype holds are moved inside: there they change nothing, or leave nothing.
    """
    x = product(q, k.transpose(1, 2)).mul_(scoring.scale)
    if scoring.softcap is None:
        return x, None
    far = 1e30 if x.dtype == torch.float32 else 1e300
    cap = min(max(scoring.softcap, 1 / far), far)
    bent = x.div_(cap).tanh_()
    return bent * cap, 1 - bent * bent


def attend(q: Tensor, steps: list[tuple[int, int]], fetch: Fetch, scoring: Scoring, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """``out (n, rows, Dv)`` and ``lse (n, rows, 1)`` of queries ``(n, rows, D)``; ``sinks (n, rows, 1)`` begin the softmax."""
    top = q.new_full((*q.shape[:2], 1), -torch.inf) if sinks is None else sinks
    total = (top > -torch.inf).to(q.dtype)
    out: Tensor | float = 0.0
    for low, high in steps:
        k, v, hide = fetch(low, high)
        scores = hide(logits(q, k, scoring)[0], -torch.inf)
        above = torch.maximum(top, scores.amax(-1, keepdim=True))
        p = scores.sub_(above.masked_fill(above == -torch.inf, 0.0)).exp_()
        kept = torch.where(top == above, 1.0, (top - above).exp())
        total = total * kept + p.sum(-1, keepdim=True)
        out = out * kept + weigh(p, v, hide)
        top = above
    lse = torch.where(total == 0, -torch.inf, top + total.log())
    return out / total.masked_fill(total == 0, 1.0), lse


@dataclass(frozen=True, eq=False)
class Problem:
    """Tensors and a layout, seen as tables of vectors.

    Tables of queries, ``(B * T * H + 1, ...)``, end with a row of zeros for queries that do not exist.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    scoring: Scoring
    heads: Heads
    hidden: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> Problem:
        heads = Heads.of(q.shape[2], k.shape[2], layout.heads)
        return cls(q, k, v, layout, scoring, heads, hidden_rows(layout.tiles))

    @property
    def dtype(self) -> torch.dtype:
        return lse_dtype(self.q.dtype)

    @property
    def queries(self) -> int:
        return self.q.shape[:3].numel()

    def row_chunks(self):
        """Row blocks with their keys."""
        block, width = self.layout.block, self.k.shape[3] + self.v.shape[3]

        def most(tokens: int, entries: int) -> int:
            keys = min(entries * block, max(STEP_KEYS, block))
            return how_many(self.q.device, keys * (tokens * self.heads.per_unit + width))

        return chunks(self.layout.rows, items_of(self.layout.q_spans, self.q.shape[0], self.heads), most)

    def column_chunks(self):
        """Key blocks with the rows that read them."""
        block, rows = self.layout.block, self.layout.block * self.heads.per_unit
        width = self.k.shape[3] + self.v.shape[3]

        def most(tokens: int, entries: int) -> int:
            return how_many(self.q.device, min(entries * rows, max(STEP_KEYS, rows)) * (block + width))

        return chunks(self.layout.columns, items_of(self.layout.k_spans, self.q.shape[0], self.heads), most)

    def steps(self, chunk: Chunk, rows_per_entry: int) -> list[tuple[int, int]]:
        """Ranges of entries that are computed at a time."""
        entries, step = chunk.block.shape[1], max(1, STEP_KEYS // rows_per_entry)
        return [(low, min(entries, low + step)) for low in range(0, entries, step)]

    def query_numbers(self, batch: Tensor, unit: Tensor, token: Tensor, exists: Tensor) -> Tensor:
        """Rows ``(n, per_unit, tokens)`` of a table of queries; the last row for those that do not exist."""
        head = self.heads.of_unit(unit)[:, :, None]
        number = (batch[:, None, None] * self.q.shape[1] + token[:, None]) * self.q.shape[2] + head
        return torch.where(exists[:, None], number, self.queries)

    def padded(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """A table of queries from ``(B, T, H, ...)``."""
        flat = x.reshape(self.queries, *x.shape[3:])
        return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), fill)])

    def key_rows(self, chunk: Chunk, rows: tuple[Rows, Rows]) -> Fetch:
        """What row blocks read."""
        spans, block, n = self.layout.k_spans, self.layout.block, len(chunk.line)
        inside = torch.arange(block, device=self.q.device)
        where = chunk.batch[:, None], (chunk.unit // self.heads.per_kv)[:, None]

        def fetch(low: int, high: int) -> tuple[Tensor, Tensor, Hide]:
            listed = chunk.block[:, low:high]
            within = torch.minimum(inside, spans.length[listed].long()[..., None] - 1)
            token = (spans.start[listed].long()[..., None] + within).view(n, -1)
            k, v = (x.take(where[0], token, where[1], self.dtype) for x in rows)
            return k, v, hide_keys(chunk, low, high, self.hidden, block, self.heads.per_unit)

        return fetch

    def forward(self) -> tuple[Tensor, Tensor]:
        """``(out, lse)``."""
        q, rows = self.padded(self.q), (Rows.of(self.k), Rows.of(self.v))
        sinks = self.scoring.sinks
        out = q.new_zeros((len(q), self.v.shape[3]), dtype=self.dtype)
        lse = out.new_full((len(q),), -torch.inf)
        if sinks is not None:
            lse[:-1] = sinks.repeat(self.queries // len(sinks))
        for chunk in self.row_chunks():
            number = self.query_numbers(chunk.batch, chunk.unit, *chunk.row_tokens()).flatten(1)
            floor = None if sinks is None else lse[number][..., None]
            mine = take(q, number, self.dtype)
            fetch, steps = self.key_rows(chunk, rows), self.steps(chunk, self.layout.block)
            results = attend(mine, steps, fetch, self.scoring, floor)
            for table, result in ((out, results[0]), (lse, results[1][..., 0])):
                table.index_copy_(0, number.flatten(), result.flatten(0, 1))
        return self.results(out, lse)

    def results(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of queries in the shape of the call."""
        shape = self.q.shape[:3]
        return out[:-1].view(*shape, -1).to(self.q.dtype), lse[:-1].view(shape).transpose(1, 2).contiguous()


def take(table: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table of queries."""
    return table.index_select(0, number.reshape(-1)).to(dtype).view(*number.shape, *table.shape[1:])


def hide_keys(chunk: Chunk, low: int, high: int, hidden: Tensor, block: int, per_unit: int) -> Hide:
    """The mask tiles of entries ``low`` to ``high - 1`` over scores ``(n, per_unit * tokens, keys)``."""
    first, n = max(low, min(chunk.full, high)), len(chunk.line)
    if first == high:
        return lambda x, fill: x
    row = (chunk.low[:, None] + torch.arange(chunk.tokens, device=hidden.device)).clamp(max=block - 1)
    number = (chunk.code[:, first:high] % (len(hidden) // block))[:, None] * block + row[..., None]
    mask = hidden.index_select(0, number.flatten()).view(n, 1, chunk.tokens, -1)

    def hide(x: Tensor, fill: float) -> Tensor:
        x.view(n, per_unit, chunk.tokens, -1)[..., (first - low) * block :].masked_fill_(mask, fill)
        return x

    return hide
