"""`Reference`: the dense float64 oracle that the other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.base import Backend, Reduction, Scoring
from s2attn.backends.checks import exact_arithmetic, lse_dtype, plain_objections
from s2attn.layout import Layout


class Reference(Backend):
    """Exact attention through the dense ``(H, T, S)`` mask, computed in float64 and rounded once at the end.

    Memory grows with T x S: this is for tests and for small problems. It reads every key, but a masked key never reaches a result,
    not even when it holds NaN; a query that sees a value holding NaN or infinity gets NaN.
    """

    name = "reference"

    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        return plain_objections(q, k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        with exact_arithmetic(q.device):
            mask = _mask(layout, q.shape[2])
            logits = _logits(q, k, mask, scoring)
            lse = _lse(logits, scoring)
            out = _weigh(_weights(logits, scoring), v, mask)
        return out.to(q.dtype), lse.to(lse_dtype(q.dtype))

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        with exact_arithmetic(q.device):
            return _gradients(dout, dlse, q, k, v, layout, scoring)

    def mass_objections(self, q: Tensor, k: Tensor) -> list[str]:
        return plain_objections(q, k, k)

    def antidiagonal(self, q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
        """Every logit ``q.k``, the means over antidiagonals gathered from them, and the whole reduced grid in memory."""
        means = _antidiagonal_means(_by_head(q) @ _grouped(k, q.shape[2]).transpose(-1, -2) * reduction.scale, reduction.stride)
        if reduction.softcap is not None:
            means = reduction.softcap * torch.tanh(means / reduction.softcap)
        rows, columns = (torch.arange(n, device=q.device) for n in means.shape[-2:])
        unseen = columns > rows[:, None] + reduction.reach(q.shape[1], k.shape[1])
        weights = torch.softmax(means.masked_fill(unseen, -torch.inf), -1).masked_fill(unseen, 0.0)
        per_block = reduction.block // reduction.stride
        padded = pad(weights, (0, -len(columns) % per_block, 0, -len(rows) % per_block))
        return padded.unflatten(-1, (-1, per_block)).sum(-1).unflatten(-2, (-1, per_block)).sum(-2).float()


def _antidiagonal_means(logits: Tensor, stride: int) -> Tensor:
    """``(..., T, S)`` to ``(..., query groups, key groups)``: from the last query and the first key of each tile on."""
    seqlen_q, seqlen_k = logits.shape[-2:]
    query, key = (torch.arange(0, n, stride, device=logits.device) for n in (seqlen_q, seqlen_k))
    total = logits.new_zeros((*logits.shape[:-2], len(query), len(key)))
    pairs = total.new_zeros(len(query), len(key))
    for s in range(stride):
        row, column = (query + stride).clamp(max=seqlen_q) - 1 - s, key + s
        exists = (row >= query)[:, None] & (column < seqlen_k)
        pair = logits[..., row.clamp(min=0)[:, None], column.clamp(max=seqlen_k - 1)]
        total, pairs = total + torch.where(exists, pair, 0.0), pairs + exists
    return total / pairs


def _gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(layout, q.shape[2])
    logits = _logits(q, k, mask, scoring)
    p = _weights(logits, scoring)
    heads_do, values = _by_head(dout), _grouped(v, q.shape[2])
    dp = (heads_do @ values.transpose(-1, -2)).masked_fill(~mask, 0.0)
    delta = (p * dp).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.double()[..., None]
    ds = (p * (dp - delta)).masked_fill(~mask, 0.0) * scoring.scale
    if scoring.softcap is not None:
        ds = ds * (1 - (logits / scoring.softcap) ** 2).masked_fill(~mask, 0.0)
    dq = ds @ _grouped(k, q.shape[2]).nan_to_num(0.0, 0.0, 0.0)
    dk = _ungrouped(ds.transpose(-1, -2) @ _by_head(q), k.shape[2])
    dv = _ungrouped(p.transpose(-1, -2) @ heads_do, v.shape[2])
    return dq.transpose(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _mask(layout: Layout, heads: int) -> Tensor:
    """The bool mask ``(H, T, S)``: layout head ``h * heads // H`` serves query head h."""
    return layout.to_dense().repeat_interleave(heads // layout.heads, 0)


def _by_head(x: Tensor) -> Tensor:
    return x.double().transpose(1, 2)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Keys or values ``(B, S, G, D)`` as ``(B, H, S, D)``."""
    return _by_head(x).repeat_interleave(heads // x.shape[2], 1)


def _ungrouped(x: Tensor, kv_heads: int) -> Tensor:
    """Gradients ``(B, H, S, D)`` added up over the query heads of a group: ``(B, S, G, D)``."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads)).sum(2).transpose(1, 2)


def _logits(q: Tensor, k: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Logits ``(B, H, T, S)``, -inf where masked."""
    x = _by_head(q) @ _grouped(k, q.shape[2]).transpose(-1, -2) * scoring.scale
    if scoring.softcap is not None:
        x = scoring.softcap * torch.tanh(x / scoring.softcap)
    return x.masked_fill(~mask, -torch.inf)


def _lse(logits: Tensor, scoring: Scoring) -> Tensor:
    lse = torch.logsumexp(logits, -1)
    return lse if scoring.sinks is None else torch.logaddexp(lse, scoring.sinks.double()[:, None])


def _weights(logits: Tensor, scoring: Scoring) -> Tensor:
    """Shares in the denominator; all zeros in a row that sees nothing."""
    sinks = logits.new_full((1,), -torch.inf) if scoring.sinks is None else scoring.sinks.double()
    column = sinks[:, None, None].expand(*logits.shape[:-1], 1)
    most = torch.finfo(logits.dtype).max
    above = torch.maximum(logits.amax(-1, keepdim=True), column).clamp(-most, most)
    weights = torch.exp(torch.cat([logits, column], -1) - above)  # not of lse, which huge logits round
    total = weights.sum(-1, keepdim=True)
    return weights[..., :-1] / total.masked_fill(total == 0, 1.0)


def _weigh(p: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``P @ V`` as ``(B, T, H, Dv)``, where 0 times NaN is 0 for a masked key."""
    values = _grouped(v, p.shape[1])
    out = p @ values.nan_to_num(0.0, 0.0, 0.0)
    broken = ~values.isfinite().all(-1)
    if broken.any():
        out = out.masked_fill((mask & broken[..., None, :]).any(-1, keepdim=True), torch.nan)
    return out.transpose(1, 2)
