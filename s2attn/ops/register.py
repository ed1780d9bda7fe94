"""The op as torch.library knows it: schema, implementations by backend, fakes, autograd.

``s2attn::attention`` is opaque to compilers: it takes tensors, text and numbers (see `s2attn.ops.source`), and shapes of its results
follow from shapes of its inputs. The backward is an op of its own, so compiled autograd holds it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2attn.backends import Scoring, pick
from s2attn.backends.checks import exact_arithmetic, lse_dtype
from s2attn.core import Unsupported
from s2attn.ops.source import find_layout, keep_captured

_library = torch.library.Library("s2attn", "DEF")
# A softcap of 0 stands for none, and so does an empty gradient of sinks that were not given.
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, "
    "Tensor[] index, str source, float scale, float softcap, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, "
    "Tensor[] index, str source, float scale, float softcap, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _scoring(q: Tensor, sinks: Tensor | None, scale: float, softcap: float) -> Scoring:
    return Scoring(scale, softcap or None, None if sinks is None else sinks.detach().to(lse_dtype(q.dtype)))


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype(q.dtype))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    index: list[Tensor],
    source: str,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = pick(backend, q, k, v)
    layout = find_layout(source, index, q, k)
    if not q.numel() or not k.numel() or not v.numel():
        out, lse = _empty_results(q, v)
        return out.zero_(), lse.fill_(-torch.inf) if sinks is None else lse.copy_(sinks[:, None])
    keep_captured(layout, q)
    out, lse = chosen.forward(q, k, v, layout, _scoring(q, sinks, scale, softcap))
    return out.contiguous(), lse.contiguous()


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    index: list[Tensor],
    source: str,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout = torch.zeros_like(out) if dout is None else dout
    dsinks = lse.new_empty(0) if sinks is None else sink_gradient(dout, dlse, out, lse, sinks)
    if not q.numel() or not k.numel() or not v.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dsinks
    layout = find_layout(source, index, q, k)
    keep_captured(layout, q)
    scoring = _scoring(q, sinks, scale, softcap)
    grads = pick(backend, q, k, v).backward(dout, dlse, q, k, v, out, lse, layout, scoring)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    return dq, dk, dv, dsinks


def sink_gradient(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """``dsinks[h] = -sum(exp(sinks[h] - lse) * delta)`` over batch and queries, in the dtype of the sinks; the same for every backend.

    A sink is a logit whose value is 0, so that ``dP`` of it is 0 and ``delta = sum(dout * out) - dlse`` is all that it needs. A row whose
    lse is -inf has neither keys nor sink, and counts for nothing.
    """
    with exact_arithmetic(out.device):
        delta = (dout.to(lse.dtype) * out).sum(-1).transpose(1, 2)
        if dlse is not None:
            delta = delta - dlse
        share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
        return torch.where(lse == -torch.inf, 0.0, share * delta).sum((0, 2)).neg_().to(sinks.dtype)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


def _backward_fake(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, index, *call = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, *output, *index)
    ctx.call = call


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sinks, out, lse, *index = ctx.saved_tensors
    dq = dk = dv = dsinks = None
    if dout is not None or dlse is not None:
        dq, dk, dv, dsinks = torch.ops.s2attn.attention_backward(dout, dlse, q, k, v, sinks, out, lse, index, *ctx.call)
    return dq, dk, dv, None if sinks is None else dsinks, [None] * len(index), None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise Unsupported("attention has no second derivative", {"autograd": ["the backward of s2attn.attention is not differentiable"]})


for _name, _impl, _fake in (("attention", _forward, _forward_fake), ("attention_backward", _backward, _backward_fake)):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s2attn::{_name}", _fake, lib=_library)
torch.library.register_autograd("s2attn::attention", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("s2attn::attention_backward", _no_second_derivative, lib=_library)
attention_op = torch.ops.s2attn.attention.default
