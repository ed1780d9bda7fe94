"""The ring: keys go from neighbour to neighbour, every rank attends to what it holds, and partial results are merged by lse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2attn.backends.checks import lse_dtype
from s2attn.distributed.agree import Agreed
from s2attn.distributed.exchange import no_second_derivative, sum_dtype
from s2attn.distributed.plan import RingPlan
from s2attn.layout import Layout
from s2attn.ops import merge
from s2attn.ops.register import attention_op, sink_gradient
from s2attn.ops.source import layout_text


@dataclass(frozen=True, eq=False)
class Circle:
    """The group as a ring, seen from one rank, and how its attention calls are made."""

    plan: RingPlan
    agreed: Agreed
    scale: float
    softcap: float
    backend: str

    @property
    def ranks(self) -> int:
        return len(self.plan.places)

    @property
    def rank(self) -> int:
        return self.agreed.ranks.rank

    def holder(self, turn: int) -> int:
        """Whose keys are here at a turn."""
        return (self.rank - turn) % self.ranks

    def pass_on(self, *tensors: Tensor) -> tuple[list[Tensor], list[Any]]:
        """Start to send contiguous tensors to the next rank, and return where those of the one before will be, with what to wait for."""
        if self.ranks == 1:
            return list(tensors), []
        group = self.agreed.ranks.group
        after, before = (dist.get_global_rank(group, (self.rank + step) % self.ranks) for step in (1, -1))
        arriving = [torch.empty_like(tensor) for tensor in tensors]
        moves = [dist.P2POp(dist.isend, tensor, after, group) for tensor in tensors]
        moves += [dist.P2POp(dist.irecv, tensor, before, group) for tensor in arriving]
        return arriving, dist.batch_isend_irecv(moves)

    def slots(self, chunk: Tensor, holder: int) -> Tensor:
        """A holder's keys ``(B, T, G, width)`` in the slots of its layout."""
        filled = chunk.new_zeros(chunk.shape[0], self.plan.slots[holder], *chunk.shape[2:])
        return filled.index_copy_(1, self.plan.places[holder], chunk)


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


def ring_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, circle: Circle) -> tuple[Tensor, Tensor]:
    """Out and lse of local q over the keys of all ranks; holds two chunks of keys at a time."""
    return _Ring.apply(q, k, v, sinks, circle)


class _Ring(torch.autograd.Function):
    """Each turn attends to one rank's keys. The way back goes round again: gradients of keys travel with them, and end at home."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, circle: Circle) -> tuple[Tensor, Tensor]:
        width, chunk = k.shape[-1], torch.cat([k, v], -1)
        parts_dtype = lse_dtype(q.dtype)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=parts_dtype)
        lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
        if sinks is not None:  # they join the denominator once, as a part without keys
            lse = lse.copy_(sinks[:, None])
        for turn in range(circle.ranks):
            last, holder = turn == circle.ranks - 1, circle.holder(turn)
            arriving, works = ([chunk], []) if last else circle.pass_on(chunk)
            layout = circle.plan.layouts[holder]
            if layout is not None:
                keys = circle.slots(chunk, holder)
                part = attention_op(q, keys[..., :width], keys[..., width:], None, layout.tensors(), *_call(circle, layout))
                out, lse = merge([(out, lse), part])
            _wait(works)
            chunk = arriving[0]
        out = out.to(q.dtype)
        ctx.circle = circle
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dout, dlse = gradients
        if torch.is_grad_enabled():
            raise no_second_derivative()
        ctx.circle.agreed.backward()
        q, k, v, sinks, out, lse = ctx.saved_tensors
        circle, width, chunk = ctx.circle, k.shape[-1], torch.cat([k, v], -1)
        dq = torch.zeros_like(q, dtype=sum_dtype(q.dtype))
        sums = torch.zeros_like(chunk, dtype=dq.dtype)
        dsinks = None if sinks is None else sink_gradient(_or_zeros(dout, out), dlse, out, lse, sinks)
        for turn in range(circle.ranks):
            last, holder = turn == circle.ranks - 1, circle.holder(turn)
            arriving, works = ([chunk], []) if last else circle.pass_on(chunk)
            layout = circle.plan.layouts[holder]
            if layout is not None and not (dout is None and dlse is None):
                keys = circle.slots(chunk, holder)
                call = (q, keys[..., :width], keys[..., width:], None, out, lse, layout.tensors(), *_call(circle, layout))
                part, dk, dv, _ = torch.ops.s2attn.attention_backward(dout, dlse, *call)
                dq += part
                sums += torch.cat([dk, dv], -1).index_select(1, circle.plan.places[holder])
            _wait(works)
            chunk = arriving[0]
            moved, works = circle.pass_on(sums)
            _wait(works)
            sums = moved[0]
        return dq.to(q.dtype), sums[..., :width].to(k.dtype), sums[..., width:].to(v.dtype), dsinks, None


def _call(circle: Circle, layout: Layout) -> tuple[str, float, float, str]:
    return layout_text(layout), circle.scale, circle.softcap, circle.backend


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
