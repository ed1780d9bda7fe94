"""`merge`: partial attention results over disjoint keys become the result over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join partial results ``(out, lse)`` of the same queries over disjoint sets of keys.

    ``lse = log(sum(exp(lse_i)))`` and ``out = sum(exp(lse_i - lse) * out_i)``, in float32 (float64 for float64), as in FlashDecoding and
    LeanAttention (arXiv:2405.10480, section 4). Associative, commutative, with the identity ``(0, -inf)``, and differentiable in
    every ``out`` and ``lse``. A part whose lse is -inf counts for nothing, whatever its out holds. Attention with sinks: give them to
    exactly one part, since a sink counts once in the denominator.

    Args:
        parts: one or more pairs of out ``(B, T, H, D)`` and lse ``(B, H, T)``, or packed out ``(total, H, D)`` and lse ``(H, total)``.

    Returns:
        ``(out, lse)`` with the shapes and dtypes of the first part.

    Raises:
        ValueError: no parts, or shapes that do not fit.
        TypeError: parts that are not pairs of tensors.

    >>> out, lse = merge([(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)), (torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1))])
    >>> out.flatten().tolist(), round(lse.item(), 4)
    ([0.5, 0.5], 0.6931)
    """
    outs, lses = _checked(parts)
    dtype = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    # The shift may be any number: it is taken out of the graph, and 0 where nothing was seen.
    top = stacked.detach().amax(dim=0)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    weights = torch.exp(stacked - top)
    total = weights.sum(dim=0)
    seen = total > 0
    safe = torch.where(seen, total, torch.ones_like(total))
    lse = torch.where(seen, top + torch.log(safe), torch.full_like(total, -torch.inf))
    share = (weights / safe).transpose(-1, -2).unsqueeze(-1)
    out = torch.zeros_like(outs[0], dtype=dtype)
    for part, out_i in zip(share, outs, strict=True):
        out = out + part * torch.where(part > 0, out_i.to(dtype), torch.zeros_like(out_i, dtype=dtype))
    return out.to(outs[0].dtype), lse.to(lses[0].dtype)


def _checked(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    if not isinstance(parts, (list, tuple)) or not parts:
        raise bad_value("parts", "must be a non-empty list of (out, lse)", parts)
    outs, lses = [], []
    for part in parts:
        if not isinstance(part, (list, tuple)) or len(part) != 2 or not all(isinstance(t, Tensor) for t in part):
            raise bad_kind("parts", "must hold pairs of tensors (out, lse)", part)
        out, lse = part
        if out.dim() not in (3, 4) or out.shape != parts[0][0].shape:
            raise bad_value("out", "must have shape (B, T, H, D) or (total, H, D), the same in all parts", tuple(out.shape))
        expected = (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if lse.shape != expected:
            raise bad_value("lse", f"must have shape {tuple(expected)} beside out {tuple(out.shape)}", tuple(lse.shape))
        outs.append(out)
        lses.append(lse)
    return outs, lses
