"""Dense attention in float64 from a bool mask: what every result is compared with, and how far plain eager code errs."""

from __future__ import annotations

import torch
from torch import Tensor


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a bool mask, written out in float64 and differentiable.

    Args:
        q, k, v: ``(B, T, H, D)``, ``(B, S, G, D)``, ``(B, S, G, Dv)``.
        mask: ``(T, S)``, ``(H, T, S)`` or ``(B, H, T, S)``, True where seen.
        scale, softcap, sinks: as in `s2attn.attention`.

    Returns:
        out ``(B, T, H, Dv)`` and lse ``(B, H, T)``, float64; 0, and -inf or the sink, for rows that see nothing.
    """
    return eager(q.double(), k.double(), v.double(), mask, scale, softcap=softcap, sinks=sinks)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same formulas in the dtype of the inputs: the yardstick for what a dtype can give."""
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = mask.expand(scores.shape)
    if sinks is not None:  # one more key for every query, whose value is 0
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores, mask = torch.cat([scores, column], dim=-1), torch.cat([mask, column > -torch.inf], dim=-1)
    scores = scores.masked_fill(~mask, -torch.inf)
    seen = mask.any(dim=-1, keepdim=True)
    safe = torch.where(seen, scores, torch.zeros_like(scores))
    lse = torch.where(seen.squeeze(-1), torch.logsumexp(safe, dim=-1), torch.full_like(safe[..., 0], -torch.inf))
    probabilities = torch.where(seen, torch.softmax(safe, dim=-1), torch.zeros_like(safe))
    return torch.einsum("bhts,bshd->bthd", probabilities[..., : v.shape[1]], v), lse


def assert_close(name: str, got: Tensor, eager_value: Tensor, exact: Tensor, terms: float = 1.0) -> None:
    """Fail when ``got`` errs more than twice what eager code in the same dtype errs against float64.

    Errors are largest absolute differences. Beside them, two roundings of the largest exact number to the dtype are allowed, and a few
    float32 roundings of ``terms``, the size of the numbers that were summed: where these cancel, their rounding stays.
    """
    finite = torch.isfinite(exact)
    if not torch.equal(torch.isfinite(got), finite) or not torch.equal(got.double()[~finite], exact[~finite]):
        raise AssertionError(f"{name}: infinities or NaN differ from the exact result")
    if not finite.any():
        return
    error, plain = (((value.double() - exact)[finite]).abs().max().item() for value in (got, eager_value))
    allowed = 2 * plain + 2 * torch.finfo(got.dtype).eps * exact[finite].abs().max().item() + 8 * torch.finfo(torch.float32).eps * terms
    if error > allowed:
        raise AssertionError(f"{name}: error {error:.3e}, allowed {allowed:.3e} (eager {eager_value.dtype} errs {plain:.3e})")
