"""Keys brought to the ranks that read them, and their gradients brought home: by needed blocks, or all of them to everyone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2attn.core import Unsupported
from s2attn.distributed.agree import Agreed, all_gather
from s2attn.distributed.plan import ExchangePlan, GatherPlan


def bring(k: Tensor, v: Tensor, plan: ExchangePlan | GatherPlan, agreed: Agreed) -> tuple[Tensor, Tensor]:
    """Local k, v ``(B, T, G, D)`` to slots ``(B, slots, G, D)`` of the plan's layout; differentiable once, by the same ways back."""
    way = _Exchange if isinstance(plan, ExchangePlan) else _Gather
    return way.apply(k, v, plan, agreed)


def reduce_scatter(total: Tensor, parts: Tensor, group: dist.ProcessGroup) -> None:
    """`torch.distributed.reduce_scatter_tensor`, which torch 2.13 renamed."""
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(total, parts, group=group)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients are summed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_second_derivative() -> Unsupported:
    return Unsupported("attention has no second derivative", {"autograd": ["the backward of context_attention is not differentiable"]})


class _Exchange(torch.autograd.Function):
    """Only needed blocks travel, with split sizes that the plan knows; a row of K and one of V side by side."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, plan: ExchangePlan, agreed: Agreed) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.agreed, ctx.shape = plan, agreed, k.shape
        k_rows, v_rows = k.flatten(1, 2), v.flatten(1, 2)
        taken = torch.cat([k_rows.index_select(1, plan.send), v_rows.index_select(1, plan.send)], -1)
        got = _travel(taken, plan.place_splits, plan.send_splits, agreed.ranks.group)
        slots = plan.layout.seqlen_k * k.shape[2]
        made = []
        for rows, part in ((k_rows, got[..., : k.shape[-1]]), (v_rows, got[..., k.shape[-1] :])):
            filled = rows.new_zeros(rows.shape[0], slots, rows.shape[-1])
            filled.index_copy_(1, plan.place, part)
            filled.index_copy_(1, plan.own_place, rows.index_select(1, plan.own))
            made.append(filled.unflatten(1, (plan.layout.seqlen_k, k.shape[2])))
        return made[0], made[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dk, dv = gradients
        if torch.is_grad_enabled():
            raise no_second_derivative()
        ctx.agreed.backward()
        plan, k_shape = ctx.plan, ctx.shape
        slots = torch.cat([dk, dv], -1).flatten(1, 2)
        got = _travel(slots.index_select(1, plan.place), plan.send_splits, plan.place_splits, ctx.agreed.ranks.group)
        total = slots.new_zeros(slots.shape[0], plan.rows, slots.shape[-1], dtype=sum_dtype(slots.dtype))
        total.index_copy_(1, plan.own, slots.index_select(1, plan.own_place).to(total.dtype))
        # Rank after rank, and no row twice from one rank: the same order of sums, so the same bits, every time.
        for row, part in zip(plan.send.split(plan.send_splits), got.split(plan.send_splits, 1), strict=True):
            total.index_add_(1, row, part.to(total.dtype))
        total = total.to(slots.dtype).unflatten(1, k_shape[1:3])
        return total[..., : k_shape[-1]].contiguous(), total[..., k_shape[-1] :].contiguous(), None, None


def _travel(rows: Tensor, get: Sequence[int], give: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send the rows ``(B, give, width)``, cut by receiver, and return those that arrive, ``(B, get, width)``, by sender."""
    batch, _, width = rows.shape
    outgoing = rows.transpose(0, 1).reshape(rows.shape[1], batch * width)
    arrived = rows.new_empty(sum(get), batch * width)
    dist.all_to_all_single(arrived, outgoing, list(get), list(give), group=group)
    return arrived.view(-1, batch, width).transpose(0, 1)


class _Gather(torch.autograd.Function):
    """All keys to everyone, and the sums of their gradients to who holds them."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, plan: GatherPlan, agreed: Agreed) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.agreed, ctx.shape = plan, agreed, k.shape
        local = torch.cat([k, v], -1).transpose(0, 1).contiguous()  # tokens first: the ranks' parts then follow each other as tokens
        whole = local.new_empty(len(plan.place), *local.shape[1:])
        all_gather(whole, local, agreed.ranks.group)
        made = []
        for part in (whole[..., : k.shape[-1]], whole[..., k.shape[-1] :]):
            filled = part.new_zeros(k.shape[0], plan.layout.seqlen_k, *part.shape[2:])
            made.append(filled.index_copy_(1, plan.place, part.transpose(0, 1)))
        return made[0], made[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dk, dv = gradients
        if torch.is_grad_enabled():
            raise no_second_derivative()
        ctx.agreed.backward()
        plan, k_shape = ctx.plan, ctx.shape
        parts = torch.cat([dk, dv], -1).index_select(1, plan.place).transpose(0, 1).to(sum_dtype(dk.dtype)).contiguous()
        total = parts.new_empty(k_shape[1], *parts.shape[1:])
        reduce_scatter(total, parts, ctx.agreed.ranks.group)
        total = total.transpose(0, 1).to(dk.dtype)
        return total[..., : k_shape[-1]].contiguous(), total[..., k_shape[-1] :].contiguous(), None, None
