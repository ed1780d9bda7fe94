"""Backward: dq over row blocks, then dk and dv over the columns of the same index."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.backends.torch.attend import Contiguous, Problem, logits, steps
from s2attn.backends.torch.chunks import Chunk
from s2attn.backends.torch.rows import Hide, product, weigh


def gradients(
    p: Problem, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``; probabilities are computed twice: no sum depends on an order of writes."""
    q, dout = p.table(p.q), p.table(dout)
    # Of a row that sees one key, dP - delta is what rounding leaves: delta is summed in float64.
    wide = p.dtype if q.device.type == "mps" else torch.float64
    delta = (dout.to(wide) * p.table(out).to(wide)).sum(-1).to(p.dtype)
    if dlse is not None:
        delta -= p.table(dlse.transpose(1, 2))
    # A query that sees nothing, or does not exist, has weights exp(x - inf) = 0.
    lse = p.table(lse.transpose(1, 2), torch.inf)
    tables = q, dout, lse.masked_fill_(lse == -torch.inf, torch.inf), delta
    source, width = p.keys(k, v), k.shape[3] + v.shape[3]
    dk, dv = _of_keys(p, source, k, v, *tables)
    return _of_queries(p, source, width, *tables), dk, dv


def _of_queries(p: Problem, source: Contiguous, width: int, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    dq = torch.zeros_like(q, dtype=p.dtype)
    for chunk in p.row_chunks(p.every_item(p.layout.q_spans, p.q.shape[1]), width):
        number = p.rows_of(chunk)
        mine, dmine, log, less = (p.take(x, number) for x in (q, dout, lse, delta))
        total = torch.zeros_like(mine)
        for low, high in steps(chunk.block.shape[1], p.layout.block):
            k, v, hide = p.read(source, chunk, low, high)
            scores, slope = logits(mine, k, p.scoring)
            ds = product(dmine, v.transpose(1, 2)).sub_(less[..., None]).mul_(scores.sub_(log[..., None]).exp_())
            total += weigh(hide(ds if slope is None else ds.mul_(slope), 0.0), k, hide)
        dq.index_copy_(0, number.flatten(), total.mul_(p.scoring.scale).flatten(0, 1))
    return dq[:-1].view(p.q.shape).to(p.q.dtype)


def _of_keys(
    p: Problem, source: Contiguous, k: Tensor, v: Tensor, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    batch, keys, kv_heads, _ = k.shape
    per_entry, width = p.layout.block * p.per_unit, k.shape[3] + v.shape[3]
    dk, dv = (q.new_zeros((batch * keys * p.units + 1, x.shape[3]), dtype=p.dtype) for x in (k, v))
    for chunk in p.chunks(p.layout.columns, p.every_item(p.layout.k_spans, keys), 1, per_entry, width):
        token, exists = chunk.row_tokens()
        where = chunk.batch[:, None], token - chunk.batch[:, None] * keys, (chunk.unit // p.per_kv)[:, None]
        mine_k, mine_v = (x.take(*where, p.dtype) for x in (source.k, source.v))
        total_k, total_v = torch.zeros_like(mine_k), torch.zeros_like(mine_v)
        for low, high in steps(chunk.block.shape[1], per_entry):
            number, hide = _readers(p, chunk, low, high)
            theirs, dtheirs, log, less = (p.take(x, number) for x in (q, dout, lse, delta))
            scores, slope = logits(mine_k, theirs, p.scoring)
            weights = hide(scores.sub_(log[:, None]).exp_(), 0.0)
            ds = product(mine_v, dtheirs.transpose(1, 2)).sub_(less[:, None]).mul_(weights)
            total_k += weigh(hide(ds if slope is None else ds.mul_(slope), 0.0), theirs, hide)
            total_v += weigh(weights, dtheirs, hide)
        row = torch.where(exists, token * p.units + chunk.unit[:, None], len(dk) - 1).flatten()
        dk.index_copy_(0, row, total_k.mul_(p.scoring.scale).flatten(0, 1))
        dv.index_copy_(0, row, total_v.flatten(0, 1))
    of_units = batch, keys, kv_heads, p.per_kv
    return dk[:-1].view(*of_units, -1).sum(3).to(k.dtype), dv[:-1].view(*of_units, -1).sum(3).to(v.dtype)


def _readers(p: Problem, chunk: Chunk, low: int, high: int) -> tuple[Tensor, Hide]:
    """The queries ``(n, N)`` of entries of key blocks, by block and head; and what is hidden."""
    block, n, entries, spans = p.layout.block, len(chunk.line), high - low, p.layout.q_spans
    listed = chunk.block[:, low:high].flatten()
    token = spans.start[listed].long()[:, None] + p.inside
    exists = p.inside < spans.length[listed][:, None]
    batch, unit = (x.repeat_interleave(entries) for x in (chunk.batch, chunk.unit))
    number = p.query_numbers(unit, batch[:, None] * p.q.shape[1] + token, exists).view(n, -1)
    first = max(low, min(chunk.full, high))
    code = chunk.code[:, first:high, None] % (len(p.hidden) // block)
    mask = p.hidden.index_select(0, (code * block + p.inside).flatten()).view(n, high - first, block, block)
    mask = mask[..., : chunk.tokens].permute(0, 3, 1, 2).unsqueeze(3)

    def hide(x: Tensor, fill: float) -> Tensor:
        x.view(n, -1, entries, p.per_unit, block)[:, :, first - low :].masked_fill_(mask, fill)
        return x

    return number, hide
