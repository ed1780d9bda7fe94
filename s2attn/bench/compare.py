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
    """Largest error over all results, each relative to the largest value of its truth, and the bound that it must keep."""

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


def eager_rows(case: AttentionCase, inputs: Inputs, rows: Tensor, mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Plain attention of some rows in ``dtype``: out ``(B, rows, H, D)``, and for a backward case dq (of those rows), dk and dv."""
    q, k, v = (x.to(dtype).requires_grad_(case.backward) for x in (inputs.q[:, rows], inputs.k, inputs.v))
    group = case.heads // case.kv_heads
    scores = torch.einsum("brhd,bshd->bhrs", q, k.repeat_interleave(group, dim=2)) * case.head_dim**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bhrs,bshd->brhd", weights, v.repeat_interleave(group, dim=2))
    if not case.backward:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout[:, rows].to(dtype))]


class Oracle:
    """Truth of a case in float64 at some rows, per pattern; a peer is compared to the truth of the pattern that it computes."""

    def __init__(self, case: AttentionCase, inputs: Inputs, rows: Tensor | None = None):
        self.case, self.inputs = case, inputs
        self.rows = sample_rows(case.seqlen) if rows is None else rows
        self._known: dict[Pattern, tuple[list[Tensor], float]] = {}

    def dout(self) -> Tensor:
        """The output gradient of the check: zero outside the rows, so that dk and dv depend on those rows alone."""
        chosen = torch.zeros_like(self.inputs.dout)
        chosen[:, self.rows] = self.inputs.dout[:, self.rows]
        return chosen

    def check(self, pattern: Pattern, results: list[Tensor]) -> Error:
        """Compare out, and perhaps dq, dk, dv, all ``(B, S, heads, D)``, to the truth.

        The bound is twice the error of plain eager float32 code on the same rows, and a rounding step on top.
        """
        truth, eager = self._truth(pattern)
        whole = [result.double() for result in results]
        rows = [result[:, self.rows] for result in whole[:2]] + whole[2:]
        return Error(_distance(rows, truth), 2 * eager + 2 * torch.finfo(torch.float32).eps)

    def _truth(self, pattern: Pattern) -> tuple[list[Tensor], float]:
        if pattern not in self._known:
            mask = rows_mask(self.case, pattern, self.rows)
            truth = eager_rows(self.case, self.inputs, self.rows, mask, torch.float64)
            plain = eager_rows(self.case, self.inputs, self.rows, mask, torch.float32)
            self._known[pattern] = truth, _distance([part.double() for part in plain], truth)
        return self._known[pattern]


def _distance(results: list[Tensor], truth: list[Tensor]) -> float:
    ratios = [(a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in zip(results, truth, strict=True)]
    return float(torch.stack(ratios).max())  # NaN stays NaN, and no bound holds it
