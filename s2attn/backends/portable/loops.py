"""The loops over items that `LoopTile` runs, written so that torch's own interpreter can run them.

Python's lock goes from thread to thread at every operation, and items are so small that the waiting took as long as the work: two threads
were hardly faster than one. Under `torch.jit.script` a whole loop is one call that holds no lock. Where that is missing or fails, the same
functions run as the plain Python that they are, with the same bits.

Shapes as in `s2attn.backends.portable.tile`; keys and values are rows of tables, gathered a few at a time while they are in the cache.
"""

# No `from __future__ import annotations`: torch.jit reads the annotations themselves, in the names of `typing`.
import warnings
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, List, Optional, Tuple, Union

import torch
from torch import Tensor

LOWEST = -1e30
"""Stands for the maximum of a row that sees nothing: any finite number does."""
STEP_SCORES = 1 << 17
"""Scores that are in memory at a time: half a megabyte in float32, which a core's own cache holds."""
STEP_KEYS = 4096
"""Keys that are gathered at a time at most."""


def step_keys(rows: int) -> int:
    """Keys that an item of so many rows attends to at a time."""
    return min(max(STEP_SCORES // rows // 64 * 64, 64), STEP_KEYS)


def product(a: Tensor, b: Tensor, bias: Optional[Tensor], onednn: bool) -> Tensor:
    """``a @ b.T + bias``."""
    if onednn and a.dtype == torch.float32:
        nothing: List[Optional[Union[int, float, complex]]] = []
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", nothing, "")
    if bias is None:
        return torch.mm(a, b.t())
    return torch.addmm(bias, a, b.t())


def logits(q: Tensor, k: Tensor, softcap: float, onednn: bool) -> Tensor:
    """``(M, C)`` in base 2; ``softcap`` 0 is none."""
    if q.size(0) < 16:  # the other way round is quicker
        scores = torch.mm(k, q.t()).t().contiguous()
    else:
        scores = product(q, k, None, onednn)
    if softcap != 0.0:
        scores = scores.tanh_().mul_(softcap)
    return scores


def rows_of(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows in that dtype."""
    some = table.index_select(0, rows)
    if some.dtype != dtype:
        some = some.to(dtype)
    return some


def attend_items(
    q: Tensor,
    k_table: Tensor,
    k_rows: Tensor,
    v_table: Tensor,
    v_rows: Tensor,
    mask: Optional[Tensor],
    kind: List[int],
    sinks: Optional[Tensor],
    softcap: float,
    step: int,
    onednn: bool,
) -> Tuple[Tensor, Tensor]:
    """``out (N, M, Dv)`` and ``lse (N, M)``.

    Args:
        q: ``(N, M, D)``, with the scale in it.
        k_table, v_table: ``(any, D)`` and ``(any, Dv)``.
        k_rows, v_rows: ``(N, C)`` int64 rows of them.
        mask: None, or ``(kinds, M, hidden)``, added to the logits of the last keys.
        kind: of each item, which mask.
        sinks: None, or ``(N, M, 1)`` logits in base 2.
        softcap: in base 2, 0 for none; ``q`` is then divided by it.
        step: keys that are attended to at a time.
    """
    items, rows, keys = q.size(0), q.size(1), k_rows.size(1)
    out, lse = q.new_empty([items, rows, v_table.size(1)]), q.new_empty([items, rows, 1])
    nothing = torch.empty([0, 1], dtype=q.dtype)
    for i in range(items):
        best, total, sums = nothing, nothing, nothing  # torch's interpreter wants them known here
        if sinks is not None:
            best = sinks[i].clamp(min=-1e30)  # `LOWEST`: the interpreter knows no globals
        for low in range(0, keys, step):
            high = min(low + step, keys)
            scores = logits(q[i], rows_of(k_table, k_rows[i, low:high], q.dtype), softcap, onednn)
            if mask is not None:
                seen = keys - mask.size(2)  # keys before those that are masked
                if high > seen:
                    scores[:, max(seen - low, 0) :] += mask[kind[i], :, max(low - seen, 0) : high - seen]
            new = torch.amax(scores, [-1], True)
            if low == 0 and sinks is None:
                new.clamp_(min=-1e30)
            else:
                new = torch.maximum(new, best)
            p = scores.sub_(new).exp2_()
            values = product(p, rows_of(v_table, v_rows[i, low:high], q.dtype).t(), None, onednn)
            if low == 0:
                total, sums = p.sum([-1], True), values
            else:
                scale = (best - new).exp2_()
                total.mul_(scale).add_(p.sum([-1], True))
                sums.mul_(scale).add_(values)
            best = new
        if sinks is not None:
            total.add_((sinks[i] - best).exp2_())
        total.clamp_(min=1e-30)
        torch.div(sums, total, out=out[i])
        lse[i].copy_(total.log2_().add_(best).mul_(0.6931471805599453))  # ln 2
    return out, lse[:, :, 0]


def differentiate_items(
    dout: Tensor,
    q: Tensor,
    delta: Tensor,
    lse: Tensor,
    k_table: Tensor,
    k_rows: Tensor,
    v_table: Tensor,
    v_rows: Tensor,
    mask: Optional[Tensor],
    kind: List[int],
    scale: float,
    softcap: float,
    step: int,
    onednn: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of items; logits are transposed, so that row numbers become a product's bias.

    Args:
        dout, q: ``(N, M, Dv)``, and ``(N, M, D)`` without the scale.
        delta, lse: ``(N, M)``: sums of ``dout * out`` less dlse; and log2 of the denominators.
        scale, softcap: of logits in base e, 0 for no softcap.
        others: as of `attend_items`; the mask lies key by key.
    """
    log2_e = 1.4426950408889634
    items, keys = q.size(0), k_rows.size(1)
    dq = torch.empty_like(q)
    dk, dv = q.new_empty([items, keys, q.size(2)]), q.new_empty([items, keys, dout.size(2)])
    factor = scale * log2_e
    if softcap != 0.0:
        factor = scale / softcap
    for i in range(items):
        my_q, scaled_t, dout_t = q[i] * factor, (q[i] * scale).t(), dout[i].t()
        shift, minus_delta = lse[i].neg(), delta[i].neg()
        for low in range(0, keys, step):
            high = min(low + step, keys)
            k = rows_of(k_table, k_rows[i, low:high], q.dtype)
            bent: Optional[Tensor] = None
            if softcap == 0.0:
                p = product(k, my_q, shift, onednn)  # (C, M)
            else:
                bent = product(k, my_q, None, onednn).tanh_()
                p = (bent * (softcap * log2_e)).add_(shift)
            if mask is not None:
                seen = keys - mask.size(2)
                if high > seen:
                    p[max(seen - low, 0) :] += mask[kind[i], :, max(low - seen, 0) : high - seen].t()
            p.exp2_()
            ds = product(rows_of(v_table, v_rows[i, low:high], q.dtype), dout[i], minus_delta, onednn).mul_(p)
            if bent is not None:
                ds.mul_(bent.square_().neg_().add_(1.0))
            dv[i, low:high].copy_(product(p, dout_t, None, onednn))
            dk[i, low:high].copy_(product(ds, scaled_t, None, onednn))
            part = product((k * scale).t().contiguous(), ds.t(), None, onednn).t()
            if low == 0:
                dq[i].copy_(part)
            else:
                dq[i].add_(part)
    return dq, dk, dv


_lock = Lock()


@cache
def without_lock(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as torch's interpreter runs it, or itself where this torch has no such thing. Call it before threads start."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.script(function)
        except (AttributeError, RuntimeError):
            return function
