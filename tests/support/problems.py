"""Random problems for backends, and the comparison that every one of them must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from s2attn.backends import Backend, Scoring
from s2attn.backends.checks import lse_dtype
from s2attn.layout import Layout
from s2attn.ops.register import sink_gradient
from tests.support.oracle import assert_close, eager, oracle


@dataclass(frozen=True)
class Problem:
    """Inputs, gradients of both outputs, a layout, the bool mask ``(H, T, S)`` that it stands for, soft-cap and sinks ``(H,)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    layout: Layout
    mask: Tensor
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def scoring(self) -> Scoring:
        """With the usual scale, ``D ** -0.5``."""
        return Scoring(self.q.shape[-1] ** -0.5, self.softcap, self.sinks)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Layout, Scoring]:
        """What `Backend.forward` takes."""
        return self.q, self.k, self.v, self.layout, self.scoring

    def to(self, dtype: torch.dtype) -> Problem:
        dlse, sinks = (None if x is None else x.to(lse_dtype(dtype)) for x in (self.dlse, self.sinks))
        return replace(self, **{n: getattr(self, n).to(dtype) for n in ("q", "k", "v", "dout")}, dlse=dlse, sinks=sinks)

    def on(self, device: torch.device) -> Problem:
        """The same problem on another device."""
        names = ("q", "k", "v", "dout", "dlse", "mask", "sinks")
        return replace(self, layout=self.layout.to(device), **{n: x.to(device) for n in names if (x := getattr(self, n)) is not None})


@dataclass(frozen=True)
class Results:
    """Outputs and gradients; dsinks is None without sinks."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None


def random_mask(heads: int, seqlen_q: int, seqlen_k: int, block: int, *, causal: bool = False) -> Tensor:
    """Full, partial and absent blocks, some rows of nothing, in about equal parts."""
    shape = heads, -(-seqlen_q // block), -(-seqlen_k // block)

    def spread(blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :seqlen_q, :seqlen_k]

    kind = torch.rand(shape)
    mask = spread(kind < 0.35) | (spread(kind < 0.6) & (torch.rand(heads, seqlen_q, seqlen_k) < 0.4))
    mask &= (torch.rand(heads, seqlen_q) > 0.1)[..., None]
    return mask.tril(seqlen_k - seqlen_q) if causal else mask


def make_problem(
    layout: Layout,
    mask: Tensor,
    *,
    heads: int,
    kv_heads: int,
    batch: int = 1,
    width: int = 32,
    v_width: int | None = None,
    dlse: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Problem:
    """Normal numbers in float64; ``mask`` is ``(layout heads, T, S)``, and ``sinks`` ``(heads,)`` if there shall be any."""
    seqlen_q, seqlen_k = mask.shape[-2:]
    q, k = torch.randn(batch, seqlen_q, heads, width), torch.randn(batch, seqlen_k, kv_heads, width)
    v = torch.randn(batch, seqlen_k, kv_heads, v_width or width)
    dout, dl = torch.randn(batch, seqlen_q, heads, v_width or width), torch.randn(batch, heads, seqlen_q)
    mask = mask.repeat_interleave(heads // mask.shape[0], 0)
    numbers = q.double(), k.double(), v.double(), dout.double(), dl.double() if dlse else None
    return Problem(*numbers, layout, mask, softcap, None if sinks is None else sinks.double())


def random_problem(
    heads: int, kv_heads: int, layout_heads: int, seqlen_q: int, seqlen_k: int, block: int, *, causal: bool = False, **shape: Any
) -> Problem:
    """A layout of a random mask, with random numbers."""
    mask = random_mask(layout_heads, seqlen_q, seqlen_k, block, causal=causal)
    return make_problem(Layout.from_dense(mask, block=block), mask, heads=heads, kv_heads=kv_heads, **shape)


def run(backend: Backend, p: Problem) -> Results:
    """Forward and backward of one backend."""
    out, lse = backend.forward(*p.arguments)
    dsinks = None if p.sinks is None else sink_gradient(p.dout, p.dlse, out, lse, p.sinks)
    return Results(out, lse, *backend.backward(p.dout, p.dlse, p.q, p.k, p.v, out, lse, p.layout, p.scoring), dsinks)


def by_autograd(formula: Callable[..., tuple[Tensor, Tensor]], p: Problem) -> Results:
    """Outputs of a differentiable formula, and what autograd makes of it."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v))
    sinks = None if p.sinks is None else p.sinks.detach().clone().requires_grad_()
    out, lse = formula(q, k, v, p.mask, p.scoring.scale, softcap=p.softcap, sinks=sinks)
    loss = (out * p.dout).sum()
    if p.dlse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * p.dlse).sum()
    loss.backward()
    dq, dk, dv = (x.grad if x.grad is not None else torch.zeros_like(x) for x in (q, k, v))
    return Results(out.detach(), lse.detach(), dq, dk, dv, None if sinks is None else sinks.grad)


def check_backend(backend: Backend, problem: Problem, dtype: torch.dtype = torch.float32) -> None:
    """Outputs and gradients err at most twice what eager code in this dtype errs against float64."""
    p = problem.to(dtype)
    got = run(backend, p)
    exact, plain = by_autograd(oracle, p.to(torch.float64)), by_autograd(eager, p)
    expected = {"out": p.dout, "lse": plain.lse.to(lse_dtype(dtype)), "dq": p.q, "dk": p.k, "dv": p.v}
    if p.sinks is not None:
        expected["dsinks"] = p.sinks
    for name, like in expected.items():
        value = getattr(got, name)
        if value.shape != like.shape or value.dtype != like.dtype:
            raise AssertionError(f"{name}: {value.dtype} {tuple(value.shape)}, expected {like.dtype} {tuple(like.shape)}")
    for name in expected:
        value = getattr(exact, name)
        terms = 4 * max(1.0, value[torch.isfinite(value)].abs().max().item() if torch.isfinite(value).any() else 1.0)
        assert_close(name, getattr(got, name), getattr(plain, name), value, terms=terms)
