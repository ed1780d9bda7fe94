"""Before any number: is the result right? Sampled rows against float64, in the same run, with a bound measured from plain eager code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.bench.cases import AttentionCase
from s2attn.patterns import Head, Pattern, Shape


@dataclass(frozen=True)
class Inputs:
    """Random normal tensors of a case: q, dout ``(B, S, H, D)``, k, v ``(B, S, G, D)``, float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def of(cls, case: AttentionCase, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
        return cls(*(torch.randn(case.batch, case.seqlen, n, case.head_dim, generator=generator) for n in heads))


@dataclass(frozen=True)
class Error:
    """The largest error of a result, relative to its largest true value, and the bound that it must keep.

    Of several results (out, dq, dk, dv) it is the one that comes closest to its bound, or breaks it most.
    """

    error: float
    bound: float

    @property
    def within(self) -> bool:
        return self.error <= self.bound


def sample_rows(seqlen: int, count: int = 32, seed: int = 0) -> Tensor:
    """Sorted query rows: the first, the last, both sides of some block edges, and random ones."""
    edges = [0, 1, seqlen // 2 - 1, seqlen // 2, seqlen - 65, seqlen - 64, seqlen - 1]
    picked = torch.randint(seqlen, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor(sorted({row for row in [*edges, *picked] if 0 <= row < seqlen}))


def rows_mask(case: AttentionCase, pattern: Pattern, rows: Tensor) -> Tensor:
    """The exact causal predicate for these rows, ``(H, rows, S)`` bool: never more than a few rows of it exist."""
    q_pos, k_pos, shape = rows.numpy()[:, None], torch.arange(case.seqlen).numpy()[None], Shape(case.seqlen)
    heads = [pattern.allowed(q_pos, k_pos, shape, Head(h, case.heads, case.kv_heads)) for h in range(case.heads)]
    return torch.stack([torch.from_numpy(mask) for mask in heads])


def true_rows(case: AttentionCase, inputs: Inputs, rows: Tensor, mask: Tensor) -> list[Tensor]:
    """Attention of some rows in float64: out ``(B, rows, H, D)``, and for a backward case dq (of those rows), dk and dv, by autograd."""
    q, k, v = (x.double().requires_grad_(case.backward) for x in (inputs.q[:, rows], inputs.k, inputs.v))
    group = case.heads // case.kv_heads
    scores = torch.einsum("brhd,bshd->bhrs", q, k.repeat_interleave(group, dim=2)) * case.head_dim**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bhrs,bshd->brhd", weights, v.repeat_interleave(group, dim=2))
    if not case.backward:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout[:, rows].double())]


def eager_rows(case: AttentionCase, inputs: Inputs, rows: Tensor, mask: Tensor) -> list[Tensor]:
    """The same in plain float32 code, the way all compared kernels go backward: weights made again from scores and lse, delta from out."""
    q, k, v, dout = inputs.q[:, rows], inputs.k, inputs.v, inputs.dout[:, rows]
    group, scale = case.heads // case.kv_heads, case.head_dim**-0.5
    keys, values = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = (torch.einsum("brhd,bshd->bhrs", q, keys) * scale).masked_fill(~mask, -torch.inf)
    weights = (scores - scores.logsumexp(-1, keepdim=True)).exp().nan_to_num(0.0)
    out = torch.einsum("bhrs,bshd->brhd", weights, values)
    if not case.backward:
        return [out]
    delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
    dscores = weights * (torch.einsum("brhd,bshd->bhrs", dout, values) - delta) * scale
    dkeys, dvalues = torch.einsum("bhrs,brhd->bshd", dscores, q), torch.einsum("bhrs,brhd->bshd", weights, dout)
    dk, dv = (x.unflatten(2, (case.kv_heads, group)).sum(3) for x in (dkeys, dvalues))
    return [out, torch.einsum("bhrs,bshd->brhd", dscores, keys), dk, dv]


class Oracle:
    """Truth of a case in float64 at some rows, per pattern; a peer is compared to the truth of the pattern that it computes."""

    def __init__(self, case: AttentionCase, inputs: Inputs, rows: Tensor | None = None):
        self.case, self.inputs = case, inputs
        self.rows = sample_rows(case.seqlen) if rows is None else rows
        self._known: dict[Pattern, tuple[list[Tensor], list[float]]] = {}

    def dout(self) -> Tensor:
        """The output gradient of the check: zero outside the rows, so that dk and dv depend on those rows alone."""
        chosen = torch.zeros_like(self.inputs.dout)
        chosen[:, self.rows] = self.inputs.dout[:, self.rows]
        return chosen

    def check(self, pattern: Pattern, results: list[Tensor]) -> Error:
        """Compare out, and perhaps dq, dk, dv, all ``(B, S, heads, D)``, to the truth.

        The bound is twice the error of plain eager float32 code on the same rows, and a rounding step on top.
        """
        truth, bounds = self._truth(pattern)
        whole = [result.double() for result in results]
        rows = [result[:, self.rows] for result in whole[:2]] + whole[2:]
        pairs = [Error(error, bound) for error, bound in zip(_distances(rows, truth), bounds, strict=True)]
        return max(pairs, key=lambda pair: pair.error / pair.bound if pair.error == pair.error else float("inf"))

    def _truth(self, pattern: Pattern) -> tuple[list[Tensor], list[float]]:
        if pattern not in self._known:
            mask = rows_mask(self.case, pattern, self.rows)
            truth = true_rows(self.case, self.inputs, self.rows, mask)
            plain = eager_rows(self.case, self.inputs, self.rows, mask)
            bounds = [2 * error + 2 * torch.finfo(torch.float32).eps for error in _distances([part.double() for part in plain], truth)]
            self._known[pattern] = truth, bounds
        return self._known[pattern]


def _distances(results: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(results, truth, strict=True)]
