"""Attention over stacks of gathered keys, forward and backward, in two ways behind one signature.

`StackTile` is the readable twin and runs wherever `torch.bmm` does. `LoopTile` takes one item at a time, a few keys at a time, with oneDNN,
which on some CPUs is twice as fast as the products inside torch's own attention. With both, the bits of an item do not depend on its
neighbours.

Shapes: N items of M query rows and C keys; q ``(N, M, D)``, out ``(N, M, Dv)``, lse ``(N, M)``. A row whose mask hides every key gets out
0 and an lse that means nothing: the caller knows these rows. Sinks come with the keys, row by row; a scoring here is scale and soft-cap.
The backward takes the out and lse of the whole row; +inf as lse switches a row off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.portable.loops import LOWEST, attend_items, differentiate_items, step_keys, without_lock

LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the keys, or the values, of N items lie.

    Attributes:
        table: ``(any, width)``, in any floating dtype.
        rows: ``(N, C)`` int64, which of its rows they are.
    """

    table: Tensor
    rows: Tensor

    @classmethod
    def whole(cls, x: Tensor) -> Places:
        """``(N, C, width)`` that lie one after another."""
        return cls(x.flatten(0, 1), torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2]))

    def gathered(self, dtype: torch.dtype) -> Tensor:
        """``(N, C, width)`` in that dtype."""
        return self.table.index_select(0, self.rows.flatten()).view(*self.rows.shape, -1).to(dtype)


@dataclass(frozen=True, eq=False)
class Keys:
    """What N items attend to.

    Attributes:
        k: places of C keys of each.
        v: of their values.
        mask: None, or ``(kinds, M, hidden)`` of 0 and -inf, to be added to the scores of the last ``hidden`` keys.
        kind: ``(N,)`` int64, which mask an item uses.
        sinks: None, or ``(N, M)`` logits that join the denominators of the forward; the backward finds them in its lse.
    """

    k: Places
    v: Places
    mask: Tensor | None = None
    kind: Tensor | None = None
    sinks: Tensor | None = None

    def masks(self) -> Tensor | None:
        """One mask for all items, or one for each."""
        return self.mask if self.mask is None or len(self.mask) == 1 else self.mask[self.kind]

    def kinds(self) -> list[int]:
        """Which mask each item uses, where there are some."""
        return [0] * len(self.k.rows) if self.mask is None or self.kind is None else self.kind.tolist()

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


def choose_tile(device: torch.device) -> Tile:
    """The quickest tile."""
    return LoopTile() if device.type == "cpu" else StackTile()


@cache
def has_onednn() -> bool:
    """Whether this build of torch has oneDNN, and the operator that reaches it with plain tensors."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class StackTile:
    """Batched products and a softmax in base 2."""

    def scores_held(self, scoring: Scoring) -> int:
        return 3 if scoring.softcap is None else 4

    def attend(self, q: Tensor, keys: Keys, scoring: Scoring) -> tuple[Tensor, Tensor]:
        k, v = (places.gathered(q.dtype) for places in (keys.k, keys.v))
        scores, sinks = torch.bmm(q * factor(scoring), k.transpose(1, 2)), keys.sinks_log2()
        if scoring.softcap is not None:
            one_by_one(scores, Tensor.tanh_).mul_(scoring.softcap * LOG2_E)
        _hide(scores, keys)
        top = scores.amax(-1, keepdim=True).clamp_(min=LOWEST)
        if sinks is not None:
            torch.maximum(top, sinks, out=top)
        p = one_by_one(scores.sub_(top), Tensor.exp2_)
        return normalize(torch.bmm(p, v), top, p.sum(-1, keepdim=True), sinks)

    def attend_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, keys: Keys, out: Tensor, lse: Tensor, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (places.gathered(q.dtype) for places in (keys.k, keys.v))
        scores, bent = torch.bmm(q * factor(scoring), k.transpose(1, 2)), None
        if scoring.softcap is not None:
            bent = one_by_one(scores, Tensor.tanh_)
            scores = bent * (scoring.softcap * LOG2_E)
        _hide(scores, keys)
        p = scores.sub_(lse[..., None] * LOG2_E)
        one_by_one(p, Tensor.exp2_)
        ds = torch.bmm(dout, v.transpose(1, 2)).sub_(_delta(dout, out, dlse)[..., None]).mul_(p)
        if bent is not None:
            ds.mul_(_slope(bent))
        dk = torch.bmm(ds.transpose(1, 2), q).mul_(scoring.scale)
        return torch.bmm(ds, k).mul_(scoring.scale), dk, torch.bmm(p.transpose(1, 2), dout)


class LoopTile:
    """One item at a time, gathered as it goes, float32 products by oneDNN; all in one call that does not hold Python's lock."""

    def __init__(self) -> None:
        self._attend, self._differentiate = without_lock(attend_items), without_lock(differentiate_items)

    def scores_held(self, scoring: Scoring) -> int:
        return 0

    def attend(self, q: Tensor, keys: Keys, scoring: Scoring) -> tuple[Tensor, Tensor]:
        sinks, softcap = keys.sinks_log2(), 0.0 if scoring.softcap is None else scoring.softcap * LOG2_E
        places = keys.k.table, keys.k.rows, keys.v.table, keys.v.rows
        how = softcap, step_keys(q.shape[1]), has_onednn()
        return self._attend(q * factor(scoring), *places, keys.mask, keys.kinds(), sinks, *how)

    def attend_backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, keys: Keys, out: Tensor, lse: Tensor, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        places = keys.k.table, keys.k.rows, keys.v.table, keys.v.rows
        how = scoring.scale, scoring.softcap or 0.0, step_keys(q.shape[1]), has_onednn()
        rows = dout, q, _delta(dout, out, dlse), lse * LOG2_E
        return self._differentiate(*rows, *places, keys.mask, keys.kinds(), *how)


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
