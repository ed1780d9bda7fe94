"""Backward: gradients of queries over row blocks, then those of keys and values over the columns of the same index."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.backends.torch.attend import Problem, logits, take
from s2attn.backends.torch.chunks import Chunk
from s2attn.backends.torch.rows import Hide, Rows, product, weigh


def gradients(p: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``; probabilities are computed twice, so that no sum depends on an order of writes."""
    q, dout = p.padded(p.q), p.padded(dout)
    wide = p.dtype if dout.device.type == "mps" else torch.float64  # rows of one key: dP - delta is what rounding leaves
    delta = (dout.to(wide) * p.padded(out).to(wide)).sum(-1).to(p.dtype)
    if dlse is not None:
        delta -= p.padded(dlse.transpose(1, 2))
    # A query that sees nothing, or does not exist, has weights exp(x - inf) = 0.
    lse = lse.transpose(1, 2).masked_fill(lse.transpose(1, 2) == -torch.inf, torch.inf)
    tables = q, dout, p.padded(lse, torch.inf), delta
    return _of_queries(p, *tables), *_of_keys(p, *tables)


def _of_queries(p: Problem, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    rows = Rows.of(p.k), Rows.of(p.v)
    dq = q.new_zeros(q.shape, dtype=p.dtype)
    for chunk in p.row_chunks():
        number = p.query_numbers(chunk.batch, chunk.unit, *chunk.row_tokens()).flatten(1)
        mine, dmine, log, less = (take(x, number, p.dtype) for x in (q, dout, lse, delta))
        fetch, total = p.key_rows(chunk, rows), torch.zeros_like(mine)
        for low, high in p.steps(chunk, p.layout.block):
            k, v, hide = fetch(low, high)
            weights, slope = _weights(p, mine, k, log[..., None])
            ds = product(dmine, v.transpose(1, 2)).sub_(less[..., None]).mul_(weights)
            total += weigh(hide(ds if slope is None else ds.mul_(slope), 0.0), k, hide)
        dq.index_copy_(0, number.flatten(), total.mul_(p.scoring.scale).flatten(0, 1))
    return dq[:-1].view(p.q.shape).to(p.q.dtype)


def _of_keys(p: Problem, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    rows, units = (Rows.of(p.k), Rows.of(p.v)), p.heads.units
    batch, keys, kv_heads, _ = p.k.shape
    dk, dv = (q.new_zeros((batch * keys * units + 1, x.shape[3]), dtype=p.dtype) for x in (p.k, p.v))
    for chunk in p.column_chunks():
        token, exists = chunk.row_tokens()
        where = chunk.batch[:, None], token, (chunk.unit // p.heads.per_kv)[:, None]
        k, v = (x.take(*where, p.dtype) for x in rows)
        total_k, total_v = torch.zeros_like(k), torch.zeros_like(v)
        for low, high in p.steps(chunk, p.layout.block * p.heads.per_unit):
            number, hide = _readers(p, chunk, low, high)
            theirs, dtheirs, log, less = (take(x, number, p.dtype) for x in (q, dout, lse, delta))
            weights, slope = _weights(p, k, theirs, log[:, None])
            weights = hide(weights, 0.0)
            ds = product(v, dtheirs.transpose(1, 2)).sub_(less[:, None]).mul_(weights)
            total_k += weigh(hide(ds if slope is None else ds.mul_(slope), 0.0), theirs, hide)
            total_v += weigh(weights, dtheirs, hide)
        row = (chunk.batch[:, None] * keys + token) * units + chunk.unit[:, None]
        row = torch.where(exists, row, len(dk) - 1).flatten()
        dk.index_copy_(0, row, total_k.mul_(p.scoring.scale).flatten(0, 1))
        dv.index_copy_(0, row, total_v.flatten(0, 1))
    shape = batch, keys, kv_heads, p.heads.per_kv
    return tuple(x[:-1].view(*shape, -1).sum(3).to(p.k.dtype) for x in (dk, dv))


def _weights(p: Problem, a: Tensor, b: Tensor, lse: Tensor) -> tuple[Tensor, Tensor | None]:
    """``exp(logit - lse)``, of hidden pairs anything, and the slope of the soft-cap."""
    scores, slope = logits(a, b, p.scoring)
    return scores.sub_(lse).exp_(), slope


def _readers(p: Problem, chunk: Chunk, low: int, high: int) -> tuple[Tensor, Hide]:
    """The queries ``(n, N)`` of entries of key blocks, unit head by unit head in each block, and what of them is hidden."""
    block, n, per_unit = p.layout.block, len(chunk.line), p.heads.per_unit
    inside = torch.arange(block, device=p.q.device)
    listed, spans = chunk.block[:, low:high], p.layout.q_spans
    length = spans.length[listed].long()[..., None]
    exists = (inside < length).view(-1, block)
    token = (spans.start[listed].long()[..., None] + inside).view(-1, block)
    entries = high - low
    batch, unit = (x.repeat_interleave(entries) for x in (chunk.batch, chunk.unit))
    number = p.query_numbers(batch, unit, token, exists).view(n, -1)
    first = max(low, min(chunk.full, high))
    if first == high:
        return number, lambda x, fill: x
    code = chunk.code[:, first:high] % (len(p.hidden) // block)
    mask = p.hidden.index_select(0, (code[..., None] * block + inside).flatten()).view(n, -1, block, block)
    mask = mask[..., : chunk.tokens].permute(0, 3, 1, 2).unsqueeze(3)

    def hide(x: Tensor, fill: float) -> Tensor:
        x.view(n, -1, entries, per_unit, block)[:, :, first - low :].masked_fill_(mask, fill)
        return x

    return number, hide
