"""Estimates of block mass from one or two vectors for each block of keys: means, and bounds of every coordinate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.checks import exact_arithmetic
from s2attn.core import check_block
from s2attn.ops.checks import autocast, check_scale, check_softcap, check_tensors

_AT_ONCE = 1 << 22  # logits of one sample that are in memory together


def mean_pool(
    q: Tensor, k: Tensor, *, block: int = 64, causal: bool = True, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Block mass from means: a softmax over ``scale * mean(q block).mean(k block)`` (MoBA, arXiv:2502.13189, section 2.2).

    Means are taken over the tokens that exist. When causal, a row reads the blocks that begin at or before its last query.

    Args:
        q, k: ``(B, T, H, D)``, ``(B, S, G, D)``.
        block, causal, scale, softcap: as in `antidiagonal`.

    Returns:
        ``(B, H, query blocks, key blocks)`` float32; rows that see a key sum to 1.
    """
    check_tensors(q, k, k, packed=False)
    q, k = autocast(q, k)
    check_block("block", block)
    factor, cap = check_scale(scale, q.shape[-1]), check_softcap(softcap)
    with exact_arithmetic(q.device):
        rows, columns = _means(q, block), _means(k, block)
        logits = _group_products(rows * factor, columns)
        last = torch.arange(1, rows.shape[1] + 1, device=q.device) * block - 1 + k.shape[1] - q.shape[1]
        return _softmax(_capped(logits, cap), last if causal else None, block)


def key_bounds(k: Tensor, *, block: int = 16) -> tuple[Tensor, Tensor]:
    """The least and the greatest number of every coordinate in each block of keys (Quest, arXiv:2406.10774, section 3.3).

    Args:
        k: ``(B, S, G, D)``.
        block: tokens per block.

    Returns:
        Two tensors ``(B, key blocks, G, D)`` in the dtype of k.
    """
    check_tensors(k, k, k, packed=False)
    check_block("block", block)
    missing = (0, 0, 0, 0, 0, -k.shape[1] % block)
    low, high = pad(k.detach(), missing, value=torch.inf), pad(k.detach(), missing, value=-torch.inf)
    return low.unflatten(1, (-1, block)).amin(dim=2), high.unflatten(1, (-1, block)).amax(dim=2)


def bound_mass(
    q: Tensor,
    k: Tensor,
    *,
    block: int = 16,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Block mass from bounds: a softmax over the greatest logit that any key within a block's bounds could have (Quest).

    Args:
        q, k: ``(B, T, H, D)``, ``(B, S, G, D)``; of k only the shape is used when ``bounds`` are given.
        block, causal, scale, softcap: as in `antidiagonal`.
        bounds: what `key_bounds` gave for k, so that a cache need not be read again.

    Returns:
        ``(B, H, query blocks, key blocks)`` float32: the sum over the queries of a block, each of whose rows sums to 1.
    """
    check_tensors(q, k, k, packed=False)
    q, k = autocast(q, k)
    check_block("block", block)
    factor, cap = check_scale(scale, q.shape[-1]), check_softcap(softcap)
    low, high = key_bounds(k, block=block) if bounds is None else bounds
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    mass = torch.zeros(batch, heads, -(-seqlen_q // block), low.shape[1], dtype=torch.float32, device=q.device)
    step = max(1, _AT_ONCE // max(1, heads * low.shape[1] * block)) * block
    with exact_arithmetic(q.device):
        low, high = low.float(), high.float()
        for b in range(batch if mass.numel() else 0):
            for at in range(0, seqlen_q, step):
                some = q[b : b + 1, at : at + step].float() * factor
                logits = bound_logits(some, low[b : b + 1], high[b : b + 1], cap)
                position = torch.arange(at, at + some.shape[1], device=q.device) + seqlen_k - seqlen_q
                weights = _softmax(logits, position if causal else None, block)
                weights = pad(weights, (0, 0, 0, -some.shape[1] % block)).unflatten(2, (-1, block)).sum(dim=3)
                mass[b, :, at // block : at // block + weights.shape[2]] = weights[0]
    return mass


def bound_logits(q: Tensor, low: Tensor, high: Tensor, softcap: float | None) -> Tensor:
    """The greatest logit ``(B, H, T, blocks)`` that a key within the bounds of its block could have.

    Args:
        q: ``(B, T, H, D)``, scaled already.
        low, high: ``(B, blocks, G, D)``; a block without keys, with bounds of inf and -inf, gives no number that means anything.
        softcap: as in `attention`.
    """
    # max(x * low, x * high) is x * high where x > 0, and x * low elsewhere.
    return _capped(_group_products(q.clamp(min=0), high) + _group_products(q.clamp(max=0), low), softcap)


def _means(x: Tensor, block: int) -> Tensor:
    """``(B, blocks, heads, D)`` float32."""
    seqlen, blocks = x.shape[1], -(-x.shape[1] // block)
    sums = pad(x.float(), (0, 0, 0, 0, 0, blocks * block - seqlen)).unflatten(1, (blocks, block)).sum(dim=2)
    count = torch.full((blocks, 1, 1), float(block), dtype=torch.float32, device=x.device)
    count[-1:] -= blocks * block - seqlen
    return sums / count


def _group_products(rows: Tensor, columns: Tensor) -> Tensor:
    """``(B, H, rows, columns)`` of ``(B, rows, H, D)`` and ``(B, columns, G, D)``, no key repeated."""
    kv_heads = columns.shape[2]
    return torch.einsum("brghd,bcgd->bghrc", rows.unflatten(2, (kv_heads, -1)), columns).flatten(1, 2)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _softmax(logits: Tensor, last: Tensor | None, block: int) -> Tensor:
    """Over the blocks that begin at or before key ``last[row]``; all of them when it is None. Rows that see nothing are 0."""
    if last is None:
        return torch.softmax(logits, dim=-1)
    unseen = torch.arange(logits.shape[-1], device=logits.device) * block > last[:, None]
    return torch.softmax(logits.masked_fill(unseen, -torch.inf), dim=-1).masked_fill(unseen, 0.0)
