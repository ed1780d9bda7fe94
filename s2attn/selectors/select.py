"""`select`: from the mass of blocks to the blocks that are kept, in float32 and on the device, for all selectors alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_int

SHARING = ("none", "union", "mean", "majority")
_AT_ONCE = 1 << 24  # blocks that are sorted together


def select(
    mass: Tensor,
    *,
    top_k: int | None = None,
    threshold: float | Sequence[float] | None = None,
    min_share: float | None = None,
    forced: Tensor | None = None,
    share: str = "none",
    kv_heads: int | None = None,
) -> Tensor:
    """Keep the blocks of every row that its rule asks for.

    The blocks of a row stand in one order: forced ones first, then by falling mass, the earlier block first where masses are equal.

    * ``threshold``: blocks are kept while the mass before them is below ``threshold`` times the mass of the row. The block that crosses is
      kept, so this is the smallest set that reaches it (XAttention, arXiv:2503.16428, section 2.2; FlexPrefill's cumulative choice).
    * ``top_k``: the first ``top_k`` of the order (MoBA, Quest).
    * ``min_share``: blocks that hold at least this share of the mass of the row.

    Forced blocks are kept under every rule. Blocks without mass are kept only when forced. A row whose mass is not finite keeps every
    block, so that a NaN in q or k shows up in the result as it does in dense attention.

    Args:
        mass: ``(B, H, query blocks, key blocks)``, at least 0; taken to float32.
        top_k, threshold, min_share: exactly one of them; ``threshold`` may be a number for each of the H heads.
        forced: bool, broadcast to ``mass``.
        share: for the heads of one KV head: "none", every head has its own set; "union" of their sets; "majority", the blocks that more
            than half of the heads keep, and the block of highest mean share; "mean", one set by the mean of the heads' shares, and by the
            highest threshold among them.
        kv_heads: G, when ``share`` is not "none".

    Returns:
        bool ``(B, H, query blocks, key blocks)``; G in place of H when heads share.

    >>> select(torch.tensor([[[[5.0, 1.0, 3.0, 1.0]]]]), threshold=0.8)
    tensor([[[[ True, False,  True, False]]]])
    """
    mass = _checked_mass(mass)
    limits = _limits(top_k, threshold, min_share, mass.shape[1])
    if share not in SHARING:
        raise bad_value("share", f"must be one of {', '.join(SHARING)}", repr(share))
    if share == "none":
        return _kept(mass, _spread(forced, mass), top_k, limits, min_share)
    group = _group(mass.shape[1], kv_heads)
    total = mass.sum(dim=-1, keepdim=True)
    mean = torch.where(total > 0, mass / total, mass).unflatten(1, (-1, group)).mean(dim=2)
    if share == "mean":
        of_group = None if limits is None else limits.view(-1, group).amax(dim=1)
        return _kept(mean, _spread(forced, mean, group), top_k, of_group, min_share)
    votes = _kept(mass, _spread(forced, mass), top_k, limits, min_share).unflatten(1, (-1, group))
    if share == "union":
        return votes.any(dim=2)
    best = torch.zeros_like(mean, dtype=torch.bool)
    if best.numel():
        best.scatter_(-1, mean.argmax(dim=-1, keepdim=True), mean.amax(dim=-1, keepdim=True) > 0)
    return (2 * votes.sum(dim=2) > group) | best


def _checked_mass(mass: Tensor) -> Tensor:
    if not isinstance(mass, Tensor):
        raise bad_kind("mass", "must be a tensor", mass)
    if mass.dim() != 4 or not mass.is_floating_point():
        raise bad_value("mass", "must be floating point of shape (B, H, query blocks, key blocks)", (mass.dtype, tuple(mass.shape)))
    return mass.detach().float()


def _limits(top_k: int | None, threshold: float | Sequence[float] | None, min_share: float | None, heads: int) -> Tensor | None:
    """Check the rule; the threshold of every head, if that is it."""
    rules = {"top_k": top_k, "threshold": threshold, "min_share": min_share}
    asked = [name for name, value in rules.items() if value is not None]
    if len(asked) != 1:
        raise bad_value("top_k, threshold, min_share", "must be given one at a time", ", ".join(asked) or "none of them")
    if top_k is not None:
        check_int("top_k", top_k, 1)
    if min_share is not None:
        check_share("min_share", min_share)
    if threshold is None:
        return None
    numbers = list(threshold) if isinstance(threshold, Sequence) else [threshold] * heads
    if len(numbers) != heads:
        raise bad_value("threshold", f"must be one number, or one for each of the {heads} heads", f"{len(numbers)} numbers")
    return torch.tensor([check_share("threshold", number) for number in numbers], dtype=torch.float32)


def check_share(name: str, value: object) -> float:
    """Return ``value`` as a number in (0, 1], or raise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_kind(name, "must be a number in (0, 1]", value)
    if not 0 < value <= 1:
        raise bad_value(name, "must be in (0, 1]", value)
    return float(value)


def _group(heads: int, kv_heads: int | None) -> int:
    number = check_int("kv_heads", kv_heads, 1)
    if heads % number:
        raise bad_value("kv_heads", f"must divide the {heads} heads of mass", number)
    return heads // number


def _spread(forced: Tensor | None, mass: Tensor, group: int = 1) -> Tensor:
    """``forced`` for every row of ``mass``; when heads share, what is forced for one of them is forced for all."""
    if forced is None:
        return torch.zeros(1, dtype=torch.bool, device=mass.device).expand(mass.shape)
    if not isinstance(forced, Tensor) or forced.dtype != torch.bool:
        raise bad_kind("forced", "must be a bool tensor or None", forced)
    full = (mass.shape[0], mass.shape[1] * group, *mass.shape[2:])
    try:
        spread = forced.expand(full)
    except RuntimeError:
        raise bad_value("forced", f"must broadcast to {full}", tuple(forced.shape)) from None
    return spread.unflatten(1, (-1, group)).any(dim=2) if group > 1 else spread


def _kept(mass: Tensor, forced: Tensor, top_k: int | None, limits: Tensor | None, min_share: float | None) -> Tensor:
    kept = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    if not mass.numel():
        return kept
    step = max(1, _AT_ONCE // (mass.shape[-1] * mass.shape[1] * mass.shape[0]))
    limit = None if limits is None else limits.to(mass.device)[:, None, None]
    for at in range(0, mass.shape[2], step):
        rows = slice(at, at + step)
        kept[:, :, rows] = _rows(mass[:, :, rows], forced[:, :, rows], top_k, limit, min_share)
    return kept


def _rows(mass: Tensor, forced: Tensor, top_k: int | None, limit: Tensor | None, min_share: float | None) -> Tensor:
    total = mass.sum(dim=-1, keepdim=True)
    if min_share is not None:
        kept = (mass >= min_share * total) & (mass > 0)
    else:
        order = torch.sort(mass.masked_fill(forced, torch.inf), dim=-1, descending=True, stable=True).indices
        ordered = mass.gather(-1, order)
        if limit is None:
            take = torch.arange(mass.shape[-1], device=mass.device) < (top_k or 0)
        else:
            sums = ordered.cumsum(dim=-1)
            # The sum before a block, as it was summed: subtracting the block again would round differently.
            before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], dim=-1)
            take = before < limit * sums[..., -1:]
        kept = torch.zeros_like(forced, memory_format=torch.contiguous_format).scatter_(-1, order, take & (ordered > 0))
    return kept | forced | ~torch.isfinite(total)
