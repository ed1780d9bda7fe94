"""`attention` under the transforms of `torch.func`: grad, vjp and vmap have rules, forward-mode AD is refused.

torch.library knows no rules for these transforms, so they meet autograd functions around the same ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from s2attn.core import Unsupported
from s2attn.ops.register import attention_op
from s2attn.ops.source import LAYOUT_TEXT

_backward_op = torch.ops.s2attn.attention_backward.default


@dataclass(frozen=True)
class _Call:
    """The arguments of the op that are no tensors."""

    source: str
    scale: float
    softcap: float
    backend: str

    @property
    def rest(self) -> tuple[str, float, float, str]:
        return self.source, self.scale, self.softcap, self.backend

    def is_packed(self, tensors: int) -> bool:
        """Whether the batch axis stands for packed sequences, whose index has so many tensors."""
        return self.source.endswith(";1") if self.source.startswith(LAYOUT_TEXT) else tensors > 0


def call_attention(
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
    """The op, or where a transform of `torch.func` or forward-mode AD is on, a function with rules for them."""
    if not _transformed():
        return attention_op(q, k, v, sinks, index, source, scale, softcap, backend)
    _refuse_tangents("attention", q, k, v, sinks)
    return _Attention.apply(q, k, v, sinks, _Call(source, scale, softcap, backend), *index)


def refuse_transforms(what: str, *tensors: Tensor | None) -> None:
    """Refuse tensors with tangents, whose derivative would be lost, and those of `torch.func.vmap`."""
    if not _transformed():
        return
    _refuse_tangents(what, *tensors)
    if any(x is not None and _is_batched(x) for x in tensors):
        why = f"{what} takes a batch of sequences: call it once, with all of them"
        raise Unsupported(f"{what} has no rule for torch.func.vmap", {"torch.func": [why]})


def _refuse_tangents(what: str, *tensors: Tensor | None) -> None:
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise _no_forward_mode(what)


def _is_batched(x: Tensor) -> bool:
    """Whether `torch.func.vmap` maps over a tensor, at any level of its transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _no_forward_mode(what: str) -> Unsupported:
    why = f"the forward derivative of s2attn.{what} is not implemented (torch.func.jvp, jacfwd): use reverse mode, grad or vjp"
    return Unsupported(f"{what} has no forward-mode derivative", {"autograd": [why]})


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call, *index: Tensor) -> tuple[Tensor, Tensor]:
        return attention_op(q, k, v, sinks, list(index), *call.rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, sinks, call, *index = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, *output, *index)
        ctx.call, ctx.others = call, 1 + len(index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, sinks, out, lse, *index = ctx.saved_tensors
        dout, dlse = grads
        if dout is None and dlse is None:
            return (None,) * (4 + ctx.others)
        dq, dk, dv, dsinks = _Backward.apply(dout, dlse, q, k, v, sinks, out, lse, ctx.call, *index)
        return dq, dk, dv, None if sinks is None else dsinks, *(None,) * ctx.others

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("attention")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _over_samples(_Attention, 4, info.batch_size, in_dims, arguments)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, call = arguments[:9]
        return _backward_op(*tensors, list(arguments[9:]), *call.rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise Unsupported("attention has no second derivative", {"autograd": ["the backward of s2attn.attention is not differentiable"]})

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode("attention")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _over_samples(_Backward, 8, info.batch_size, in_dims, arguments)


def _over_samples(function: Any, tensors: int, samples: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Apply a function to all samples of a vmap: as one batch, or one by one where they share no call.

    Sinks and packed sequences belong to a whole call. The first ``tensors`` arguments are q, k, v, sinks (and results and
    gradients), then come the call and its index.
    """
    call, index, sinks = arguments[tensors], arguments[tensors + 1 :], arguments[tensors - 1 if tensors == 4 else 5]
    if sinks is None and not call.is_packed(len(index)):
        few = [None if x is None else _as_batch(x, dim, samples) for x, dim in zip(arguments[:tensors], in_dims, strict=False)]
        results = function.apply(*few, call, *index)
        # Without sinks the last of the gradients is empty, and has no batch.
        return tuple(x.unflatten(0, (samples, -1)) if x.dim() > 1 else x for x in results), tuple(
            0 if x.dim() > 1 else None for x in results
        )
    parts = [
        function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True))) for i in range(samples)
    ]
    return tuple(torch.stack(each) for each in zip(*parts, strict=True)), (0,) * len(parts[0])


def _as_batch(x: Tensor, dim: int | None, samples: int) -> Tensor:
    """``(B, ...)`` of every sample as ``(samples * B, ...)``."""
    every = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
    return every.flatten(0, 1)
