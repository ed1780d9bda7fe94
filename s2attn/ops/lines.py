"""How much of the attention of the last queries lies on vertical lines (one key) and on slashes (one distance)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.checks import exact_arithmetic
from s2attn.core import check_int
from s2attn.ops.checks import autocast, check_scale, check_softcap, check_tensors


@dataclass(frozen=True, eq=False)
class LineMass:
    """Mass of lines, summed over ``queries`` last queries, float32.

    Attributes:
        vertical: ``(B, H, S)``: what key j receives.
        slash: ``(B, H, S)``: what keys at distance d before their query receive.
        queries: how many queries were looked at.
    """

    vertical: Tensor
    slash: Tensor
    queries: int


def last_queries(q: Tensor, k: Tensor, *, n: int = 64, scale: float | None = None, softcap: float | None = None) -> LineMass:
    """Causal attention of the last ``n`` queries, summed along vertical lines and along slashes (MInference, arXiv:2407.02490).

    Args:
        q, k: ``(B, T, H, D)``, ``(B, S, G, D)``; with fewer than ``n`` queries all of them are taken.
        n: queries to look at; memory holds ``n x S`` weights of one KV head.
        scale, softcap: as in `attention`.

    >>> lines = last_queries(torch.randn(1, 100, 4, 16), torch.randn(1, 100, 2, 16), n=10)
    >>> lines.vertical.sum(dim=-1).round().tolist(), lines.slash.sum(dim=-1).round().tolist()
    ([[10.0, 10.0, 10.0, 10.0]], [[10.0, 10.0, 10.0, 10.0]])
    """
    check_tensors(q, k, k, packed=False)
    q, k = autocast(q, k)
    queries = min(check_int("n", n, 1), q.shape[1])
    factor, cap = check_scale(scale, q.shape[-1]), check_softcap(softcap)
    (batch, _, heads, _), seqlen_k, kv_heads = q.shape, k.shape[1], k.shape[2]
    group = heads // kv_heads
    vertical, slash = (torch.zeros(batch, heads, seqlen_k, dtype=torch.float32, device=q.device) for _ in range(2))
    position = torch.arange(seqlen_k - queries, seqlen_k, device=q.device)
    distance = position[:, None] - torch.arange(seqlen_k, device=q.device)
    unseen = distance < 0
    with exact_arithmetic(q.device):
        for b in range(batch):
            for g in range(kv_heads):
                some = slice(g * group, (g + 1) * group)
                logits = torch.einsum("thd,sd->hts", q[b, q.shape[1] - queries :, some].float() * factor, k[b, :, g].float())
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                weights = torch.softmax(logits.masked_fill(unseen, -torch.inf), dim=-1).masked_fill(unseen, 0.0)
                vertical[b, some] = weights.sum(dim=1)
                slash[b, some] = _along_slashes(weights)
    return LineMass(vertical, slash, queries)


def _along_slashes(weights: Tensor) -> Tensor:
    """``(heads, S)``: sums of ``weights (heads, n, S)`` along equal distances; the last query stands at the last key."""
    heads, queries, seqlen_k = weights.shape
    # Last query and last key first: the line of distance d then goes down and right from column d, and a longer step makes it a column.
    turned = pad(weights.flip(1, 2), (0, queries)).contiguous()
    width = seqlen_k + queries
    return turned.as_strided((heads, queries, seqlen_k), (queries * width, width + 1, 1)).sum(dim=1)
