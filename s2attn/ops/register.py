"""The op as torch.library knows it: schema, implementations by backend, fakes, autograd.

``s2attn::attention`` is opaque to compilers: it takes tensors, text and numbers (see `s2attn.ops.source`), and shapes of its results
follow from shapes of its inputs. The backward is an op of its own, so compiled autograd holds it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2attn.backends import pick
from s2attn.core import Unsupported
from s2attn.ops.source import find_layout

_library = torch.library.Library("s2attn", "DEF")
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor[] index, str source, float scale, str backend) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor[] index, str source, float scale, str backend) -> (Tensor, Tensor, Tensor)"
)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)


def _forward(q: Tensor, k: Tensor, v: Tensor, index: list[Tensor], source: str, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    chosen = pick(backend, q, k, v)
    layout = find_layout(source, index, q, k)
    if not q.numel() or not k.numel() or not v.numel():
        out, lse = _empty_results(q, v)
        return out.zero_(), lse.fill_(-torch.inf)
    out, lse = chosen.forward(q, k, v, layout, scale)
    return out.contiguous(), lse.contiguous()


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: list[Tensor],
    source: str,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel() or not k.numel() or not v.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    layout = find_layout(source, index, q, k)
    dout = torch.zeros_like(out) if dout is None else dout
    grads = pick(backend, q, k, v).backward(dout, dlse, q, k, v, out, lse, layout, scale)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    return dq, dk, dv


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, index: list[Tensor], source: str, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v)


def _backward_fake(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, source, scale, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *index)
    ctx.call = (source, scale, backend)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *index = ctx.saved_tensors
    grads = (None, None, None)
    if dout is not None or dlse is not None:
        grads = torch.ops.s2attn.attention_backward(dout, dlse, q, k, v, out, lse, index, *ctx.call)
    return (*grads, [None] * len(index), None, None, None)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise Unsupported("attention has no second derivative", {"autograd": ["the backward of s2attn.attention is not differentiable"]})


for _name, _impl, _fake in (("attention", _forward, _forward_fake), ("attention_backward", _backward, _backward_fake)):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s2attn::{_name}", _fake, lib=_library)
torch.library.register_autograd("s2attn::attention", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("s2attn::attention_backward", _no_second_derivative, lib=_library)
attention_op = torch.ops.s2attn.attention.default
