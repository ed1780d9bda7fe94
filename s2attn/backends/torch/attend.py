"""Attention of row blocks over their lists: in chunks, with a running softmax along a list."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.checks import lse_dtype
from s2attn.backends.torch.chunks import Chunk, Items, chunks
from s2attn.backends.torch.rows import Hide, Rows, product, weigh
from s2attn.layout import BlockIndex, Layout, Spans

STEP = 1024
"""Keys (of a row) or queries (of a key) that are in memory at a time, however long the list is."""
NUMBERS = 1 << 21
"""Scores and gathered numbers of a chunk on a CPU, which should stay in its caches."""
NUMBERS_ELSEWHERE = 1 << 26


class Source(Protocol):
    """Where keys and values lie."""

    def read(self, batch: Tensor, head: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys ``(n, N, D)`` and values ``(n, N, Dv)`` of blocks ``(n, entries)``.

        The third result is True for keys that do not exist, ``(n, N)``, or None where all do.
        """
        ...


@dataclass(frozen=True, eq=False)
class Contiguous:
    """Keys and values ``(B, S, G, D)``; a short block repeats its last key."""

    k: Rows
    v: Rows
    spans: Spans
    inside: Tensor
    dtype: torch.dtype

    def read(self, batch: Tensor, head: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        last = self.spans.length[block].long()[..., None] - 1
        token = self.spans.start[block].long()[..., None] + torch.minimum(self.inside, last)
        where = batch, token.flatten(1), head
        return self.k.take(*where, self.dtype), self.v.take(*where, self.dtype), None


@dataclass(frozen=True, eq=False)
class Problem:
    """Queries and a layout.

    Query heads stand in units: neighbours that share a KV head and the lists of a layout head.
    A table of queries, ``(B * T * H + 1, ...)``, ends with a row for queries that do not exist.

    Attributes:
        q: ``(B, T, H, D)``.
        units: a multiple of the KV heads and of the layout heads.
        per_unit: query heads of a unit.
        per_kv: units of a KV head.
        hidden: mask tiles, ``((tiles + 2) * block, block)``, True where hidden; the last two
            are those of the codes -2, all hidden, and -1, nothing hidden.
        inside: ``arange(block)``.
    """

    q: Tensor
    layout: Layout
    scoring: Scoring
    units: int
    per_unit: int
    per_kv: int
    hidden: Tensor
    inside: Tensor

    @classmethod
    def of(cls, q: Tensor, kv_heads: int, layout: Layout, scoring: Scoring) -> Problem:
        units, tiles = math.lcm(kv_heads, layout.heads), layout.tiles
        square = (1, layout.block, layout.block)
        hidden = torch.cat([~tiles, tiles.new_ones(square), tiles.new_zeros(square)]).flatten(0, 1)
        inside = torch.arange(layout.block, device=q.device)
        return cls(q, layout, scoring, units, q.shape[2] // units, units // kv_heads, hidden, inside)

    @property
    def dtype(self) -> torch.dtype:
        return lse_dtype(self.q.dtype)

    @property
    def queries(self) -> int:
        return self.q.shape[:3].numel()

    def keys(self, k: Tensor, v: Tensor) -> Contiguous:
        return Contiguous(Rows.of(k), Rows.of(v), self.layout.k_spans, self.inside, self.dtype)

    def every_item(self, spans: Spans, tokens: int) -> Items:
        """An item for every batch entry, unit and block of an axis of ``tokens``."""
        start, length = (x.cpu().numpy().astype(np.int64) for x in (spans.start, spans.length))
        batch, unit, line = (x.ravel() for x in np.indices((self.q.shape[0], self.units, len(start))))
        return Items(
            batch, unit, unit * self.layout.heads // self.units, line, np.zeros_like(line), length[line], batch * tokens + start[line]
        )

    def chunks(self, index: BlockIndex, items: Items, rows: int, per_entry: int, width: int) -> Iterator[Chunk]:
        """Items in chunks that fit in memory.

        Args:
            rows: of scores, for each row of an item.
            per_entry: columns of scores of a listed block.
            width: numbers gathered for each column.
        """
        room = NUMBERS if self.q.device.type == "cpu" else NUMBERS_ELSEWHERE

        def most(tokens: int, entries: int) -> int:
            return room // (min(entries * per_entry, max(STEP, per_entry)) * (tokens * rows + width))

        return chunks(index, items, most)

    def row_chunks(self, items: Items, width: int) -> Iterator[Chunk]:
        return self.chunks(self.layout.rows, items, self.per_unit, self.layout.block, width)

    def query_numbers(self, unit: Tensor, token: Tensor, exists: Tensor) -> Tensor:
        """Rows ``(n, per_unit, tokens)`` of a table of queries."""
        head = unit[:, None] * self.per_unit + torch.arange(self.per_unit, device=unit.device)
        number = token[:, None] * self.q.shape[2] + head[..., None]
        return torch.where(exists[:, None], number, self.queries)

    def rows_of(self, chunk: Chunk) -> Tensor:
        """The queries of each item, ``(n, per_unit * tokens)``."""
        return self.query_numbers(chunk.unit, *chunk.row_tokens()).flatten(1)

    def table(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """A table of queries from ``(B, T, H, ...)``; the row that ends it holds ``fill``."""
        flat = x.reshape(self.queries, *x.shape[3:])
        return torch.cat([flat, flat.new_full((1, *flat.shape[1:]), fill)])

    def take(self, table: Tensor, number: Tensor) -> Tensor:
        """Rows of a table of queries, to compute with."""
        rows = table.index_select(0, number.reshape(-1)).to(self.dtype)
        return rows.view(*number.shape, *table.shape[1:])

    def read(self, source: Source, chunk: Chunk, low: int, high: int) -> tuple[Tensor, Tensor, Hide]:
        """Keys and values of entries ``low`` to ``high - 1``, and what of them is hidden."""
        batch, head = chunk.batch[:, None], (chunk.unit // self.per_kv)[:, None]
        k, v, gone = source.read(batch, head, chunk.block[:, low:high])
        first, block = max(low, min(chunk.full, high)), self.layout.block
        row = (chunk.low[:, None] + torch.arange(chunk.tokens, device=self.q.device)).clamp(max=block - 1)
        number = (chunk.code[:, first:high] % (len(self.hidden) // block))[:, None] * block + row[..., None]
        mask = self.hidden.index_select(0, number.flatten()).view(len(batch), 1, chunk.tokens, -1)

        def hide(x: Tensor, fill: float) -> Tensor:
            x = x if gone is None else x.masked_fill_(gone[:, None], fill)
            if first < high:
                x.view(len(x), -1, chunk.tokens, x.shape[2])[..., (first - low) * block :].masked_fill_(mask, fill)
            return x

        return k, v, hide


def steps(entries: int, per_entry: int) -> list[tuple[int, int]]:
    """Ranges of entries that are computed at a time."""
    step = max(1, STEP // per_entry)
    return [(low, min(entries, low + step)) for low in range(0, entries, step)]


def logits(q: Tensor, k: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Logits ``(n, rows, keys)``, and with a soft-cap their derivative by the uncapped ones.

    A cap that the dtype cannot hold is moved inside: there it changes nothing, or leaves nothing.
    """
    x = product(q, k.transpose(1, 2)).mul_(scoring.scale)
    if scoring.softcap is None:
        return x, None
    far = 1e30 if x.dtype == torch.float32 else 1e300
    cap = min(max(scoring.softcap, 1 / far), far)
    bent = x.div_(cap).tanh_()
    return bent * cap, 1 - bent * bent


def attend(p: Problem, source: Source, items: Items, width: int, v_width: int) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the queries of ``items``; ``width``: of a key and its value together."""
    q, sinks = p.table(p.q), p.scoring.sinks
    out = q.new_zeros((len(q), v_width), dtype=p.dtype)
    lse = out.new_full((len(q), 1), -torch.inf)
    if sinks is not None:
        lse[:-1, 0] = sinks.repeat(p.queries // len(sinks))
    for chunk in p.row_chunks(items, width):
        number = p.rows_of(chunk)
        mine, top, sum_v = p.take(q, number), p.take(lse, number), torch.zeros((), dtype=p.dtype, device=q.device)
        total = (top > -torch.inf).to(p.dtype)
        for low, high in steps(chunk.block.shape[1], p.layout.block):
            k, v, hide = p.read(source, chunk, low, high)
            scores = hide(logits(mine, k, p.scoring)[0], -torch.inf)
            above = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = scores.sub_(above.masked_fill(above == -torch.inf, 0.0)).exp_()
            kept = torch.where(top == above, 1.0, (top - above).exp())
            total = total * kept + weights.sum(-1, keepdim=True)
            sum_v = sum_v * kept + weigh(weights, v, hide)
            top = above
        found = sum_v / total.masked_fill(total == 0, 1.0), torch.where(total == 0, -torch.inf, top + total.log())
        for table, result in zip((out, lse), found, strict=True):
            table.index_copy_(0, number.flatten(), result.flatten(0, 1))
    shape = p.q.shape[:3]
    return out[:-1].view(*shape, -1).to(p.q.dtype), lse[:-1].view(shape).transpose(1, 2).contiguous()
