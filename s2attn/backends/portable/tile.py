"""Attention over stacks of gathered keys, forward and backward, in two ways behind one signature.

`StackTile` is the readable twin and runs wherever `torch.bmm` does. `LoopTile` multiplies one item at a time with oneDNN, which on some
CPUs is twice as fast as the products inside torch's own attention. With both, the bits of an item do not depend on its neighbours.

Shapes: N items of M query rows and C keys; q ``(N, M, D)``, out ``(N, M, Dv)``, lse ``(N, M)``. A row whose mask hides every key gets out
0 and an lse that means nothing: the caller knows these rows. Sinks come with the keys, row by row; a scoring here is scale and soft-cap.
The backward takes the out and lse of the whole row; +inf as lse switches a row off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from s2attn.backends.base import Scoring

LOG2_E = 1 / math.log(2)
LOWEST = -1e30
"""Stands for the maximum of a row that sees nothing: any finite number does."""
_SMALL_ROWS = 16
"""With fewer query rows per item (decoding), one product for all items is quicker than one at a time."""


@dataclass(frozen=True, eq=False)
class Keys:
    """What N items attend to.

    Attributes:
        k: ``(N, C, D)``.
        v: ``(N, C, Dv)``.
        mask: None, or ``(kinds, M, hidden)`` of 0 and -inf, to be added to the scores of the last ``hidden`` keys.
        kind: ``(N,)`` int64, which mask an item uses.
        sinks: None, or ``(N, M)`` logits that join the denominators of the forward; the backward finds them in its lse.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    kind: Tensor | None = None
    sinks: Tensor | None = None

    def masks(self) -> Tensor | None:
        """One mask for all items, or one for each."""
        return self.mask if self.mask is None or len(self.mask) == 1 else self.mask[self.kind]

    def each_mask(self) -> Sequence[Tensor | None]:
        """The mask of every item."""
        if self.mask is None or self.kind is None:
            return [None] * len(self.k)
        masks = self.mask.unbind()
        return [masks[kind] for kind in self.kind.tolist()]

    def sinks_log2(self) -> Tensor | None:
        """The sinks ``(N, M, 1)`` in base 2."""
        return None if self.sinks is None else self.sinks[..., None] * LOG2_E


class Tile(Protocol):
    """One way to compute stacks."""

    def scores_held(self, scoring: Scoring) -> int:
        """How many numbers per (query, key) pair of a stack are in memory at once."""
        ...

    def attend(self, q: Tensor, keys: Keys, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """``(out, lse)``."""
        ...

    def attend_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, keys: Keys, out: Tensor, lse: Tensor, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)``."""
        ...


def choose_tile(device: torch.device, rows: int) -> Tile:
    """The quickest tile for items of so many rows."""
    return LoopTile() if device.type == "cpu" and rows >= _SMALL_ROWS else StackTile()


@cache
def has_onednn() -> bool:
    """Whether this build of torch has oneDNN, and the operator that reaches it with plain tensors."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class StackTile:
    """Batched products and a softmax in base 2."""

    def scores_held(self, scoring: Scoring) -> int:
        return 3 if scoring.softcap is None else 4

    def attend(self, q: Tensor, keys: Keys, scoring: Scoring) -> tuple[Tensor, Tensor]:
        scores, sinks = torch.bmm(q * factor(scoring), keys.k.transpose(1, 2)), keys.sinks_log2()
        if scoring.softcap is not None:
            one_by_one(scores, Tensor.tanh_).mul_(scoring.softcap * LOG2_E)
        _hide(scores, keys)
        top = scores.amax(-1, keepdim=True).clamp_(min=LOWEST)
        if sinks is not None:
            torch.maximum(top, sinks, out=top)
        p = one_by_one(scores.sub_(top), Tensor.exp2_)
        return normalize(torch.bmm(p, keys.v), top, p.sum(-1, keepdim=True), sinks)

    def attend_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, keys: Keys, out: Tensor, lse: Tensor, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, bent = torch.bmm(q * factor(scoring), keys.k.transpose(1, 2)), None
        if scoring.softcap is not None:
            bent = one_by_one(scores, Tensor.tanh_)
            scores = bent * (scoring.softcap * LOG2_E)
        _hide(scores, keys)
        p = scores.sub_(lse[..., None] * LOG2_E)
        one_by_one(p, Tensor.exp2_)
        ds = torch.bmm(dout, keys.v.transpose(1, 2)).sub_(_delta(dout, out, dlse)[..., None]).mul_(p)
        if bent is not None:
            ds.mul_(_slope(bent))
        dk = torch.bmm(ds.transpose(1, 2), q).mul_(scoring.scale)
        return torch.bmm(ds, keys.k).mul_(scoring.scale), dk, torch.bmm(p.transpose(1, 2), dout)


class LoopTile:
    """One item at a time, float32 products by oneDNN; the backward works on transposed scores, so that row numbers become its bias."""

    def scores_held(self, scoring: Scoring) -> int:
        return 0

    def attend(self, q: Tensor, keys: Keys, scoring: Scoring) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:2], keys.v.shape[-1])
        top, total = q.new_empty(2, *q.shape[:2], 1)
        sinks = keys.sinks_log2()
        floors = [None] * len(q) if sinks is None else sinks.unbind()
        rows = ((q * factor(scoring)).unbind(), keys.k.unbind(), keys.v.mT.unbind(), out, top, total)
        for my_q, k, v_t, my_out, my_top, my_total, floor, mask in zip(*rows, floors, keys.each_mask(), strict=True):
            scores = _product(my_q, k)
            if scoring.softcap is not None:
                scores.tanh_().mul_(scoring.softcap * LOG2_E)
            if mask is not None:
                scores[:, -mask.shape[1] :] += mask
            torch.amax(scores, -1, keepdim=True, out=my_top)
            my_top.clamp_(min=LOWEST)
            if floor is not None:
                torch.maximum(my_top, floor, out=my_top)
            p = scores.sub_(my_top).exp2_()
            torch.sum(p, -1, keepdim=True, out=my_total)
            my_out.copy_(_product(p, v_t))
        return normalize(out, top, total, sinks)

    def attend_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, keys: Keys, out: Tensor, lse: Tensor, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x) for x in (q, keys.k, keys.v))
        scaled, by_column, softcap = q * scoring.scale, (keys.k * scoring.scale).mT.contiguous(), scoring.softcap
        factored = scaled * (LOG2_E if softcap is None else 1 / softcap)
        rows = (factored, lse * -LOG2_E, scaled.mT, dout, _delta(dout, out, dlse).neg_(), dout.mT, dq.mT)
        for my_q, shift, q_t, my_dout, delta, dout_t, dq_t, k, v, k_t, my_dk, my_dv, mask in zip(
            *(x.unbind() for x in (*rows, keys.k, keys.v, by_column, dk, dv)), keys.each_mask(), strict=True
        ):
            bent = None
            if softcap is None:
                p = _product(k, my_q, shift)  # (C, M)
            else:
                bent = _product(k, my_q).tanh_()
                p = (bent * (softcap * LOG2_E)).add_(shift)
            if mask is not None:
                p[-mask.shape[1] :] += mask.t()
            p.exp2_()
            ds = _product(v, my_dout, delta).mul_(p)
            if bent is not None:
                ds.mul_(_slope(bent))
            my_dv.copy_(_product(p, dout_t))
            my_dk.copy_(_product(ds, q_t))
            dq_t.copy_(_product(k_t, ds.t()))
        return dq, dk, dv


def factor(scoring: Scoring) -> float:
    """What turns q.k into logits in base 2, or, where there is a soft-cap, into what its tanh takes."""
    return scoring.scale * LOG2_E if scoring.softcap is None else scoring.scale / scoring.softcap


def _slope(bent: Tensor) -> Tensor:
    """The derivative of a soft-cap, in place of its tanh."""
    return bent.square_().neg_().add_(1)


def _hide(scores: Tensor, keys: Keys) -> None:
    """Add the masks to scores in place."""
    masks = keys.masks()
    if masks is not None:
        scores[..., -masks.shape[-1] :] += masks


def normalize(out: Tensor, top: Tensor, total: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` from weighted values, the largest log2 score of each row, the sum of its weights, and its sink, all ``(N, M, 1)``."""
    if sinks is not None:
        total.add_(one_by_one(sinks - top, Tensor.exp2_))
    total.clamp_(min=-1 / LOWEST)
    out.div_(total)
    return out, one_by_one(total, Tensor.log2_).add_(top).mul_(math.log(2))[..., 0]


def one_by_one(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply an exponential or logarithm in place. On a CPU its bits depend on the place in memory (vectors, then a rest): item by item."""
    for item in x.unbind() if x.device.type == "cpu" and x.dim() == 3 else [x]:
        function(item)
    return x


def _delta(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    delta = (dout * out).sum(-1)
    return delta if dlse is None else delta - dlse


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias``."""
    if a.dtype == torch.float32 and has_onednn():
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())
