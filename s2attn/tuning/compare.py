"""Before any number: is the result right? Sampled rows against float64, in the same run, with a bound measured from plain eager code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.patterns import Head, Pattern, Shape
from s2attn.tuning.cases import AttentionCase

SUM_ROUNDINGS = 8
LINE_TOKENS = 64  # keys whose gradients are judged together


@dataclass(frozen=True)
class Inputs:
    """Random normal tensors of a case: q, dout ``(B, S, H, D)``, k, v ``(B, S, G, D)``, in its dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def of(cls, case: AttentionCase, seed: int = 0, device: str = "cpu") -> Inputs:
        generator, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, case.dtype)
        heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
        shape = (case.batch, case.seqlen)
        return cls(*(torch.randn(*shape, n, case.head_dim, generator=generator, device=device, dtype=dtype) for n in heads))


@dataclass(frozen=True)
class Error:
    """The largest error of a result, and the bound that it must keep.

    An error is the length of the difference of one row of one head, over the root of the sum of the squares of all that was added up in
    that row: small rows are judged as strictly as large ones, and what cancels is not. The gradients of keys and values are judged so 64
    tokens at a time. Of several results (out, dq, dk, dv) it is the one that comes closest to its bound, or breaks it most.
    """

    error: float
    bound: float

    @property
    def within(self) -> bool:
        return self.error <= self.bound


def worst_of(found: Sequence[Error]) -> Error:
    """The one that comes closest to its bound, or breaks it most."""
    return max(found, key=lambda one: one.error / one.bound if one.error == one.error else float("inf"))


def bound_of(plain: float, dtype: torch.dtype) -> float:
    """What an error may be where plain eager code makes ``plain``: twice that, a rounding step of the dtype, and a few of float32."""
    return 2 * plain + 2 * torch.finfo(dtype).eps + SUM_ROUNDINGS * torch.finfo(torch.float32).eps


def sample_rows(seqlen: int, count: int = 32, seed: int = 0, first: int = 0) -> Tensor:
    """Sorted query rows from ``first`` on: the first, the last, both sides of some block edges, and random ones."""
    edges = [first, first + 1, seqlen // 2 - 1, seqlen // 2, seqlen - 65, seqlen - 64, seqlen - 1]
    picked = (first + torch.randint(seqlen - first, (count,), generator=torch.Generator().manual_seed(seed))).tolist()
    return torch.tensor(sorted({row for row in [*edges, *picked] if first <= row < seqlen}))


@dataclass(frozen=True)
class Group:
    """The sampled rows of one KV head and its query heads: q, dout ``(B, rows, g, D)``, k, v ``(B, S, D)``, mask ``(g, rows, S)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor
    scale: float
    backward: bool


@dataclass(frozen=True)
class Truth:
    """What is right for a group, and the sizes that errors are compared with; out and dq by row and head, dk and dv by 64 tokens."""

    values: list[Tensor]
    sizes: list[Tensor]


def exact(group: Group) -> Truth:
    """Attention of a group in float64, and its gradients by their formulas: out, dq ``(B, rows, g, D)``, dk, dv ``(B, S, D)``."""
    q, k, v, dout = (x.double() for x in (group.q, group.k, group.v, group.dout))
    scores = (torch.einsum("brgd,bsd->bgrs", q, k) * group.scale).masked_fill(~group.mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    del scores
    out = torch.einsum("bgrs,bsd->brgd", weights, v)
    squares = weights.square()
    values, sizes = [out], [torch.einsum("bgrs,bs->brg", squares, v.square().sum(-1))]
    if group.backward:
        dweights = torch.einsum("brgd,bsd->bgrs", dout, v)
        delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
        dscores = weights * (dweights - delta) * group.scale
        values.append(torch.einsum("bgrs,bsd->brgd", dscores, k))
        values.append(torch.einsum("bgrs,brgd->bsd", dscores, q))
        values.append(torch.einsum("bgrs,brgd->bsd", weights, dout))
        # dP and delta are sums over the width, which may cancel, and in a row of one key their difference does: what counts is what was
        # added up.
        added = torch.einsum("brgd,bsd->bgrs", dout.square(), v.square()) + (dout * out).square().sum(-1).transpose(1, 2)[..., None]
        dsquares = squares * ((dweights.abs() + delta.abs()).square() + added) * group.scale**2
        sizes.append(torch.einsum("bgrs,bs->brg", dsquares, k.square().sum(-1)))
        sizes.append(_lines(torch.einsum("bgrs,brg->bs", dsquares, q.square().sum(-1))[..., None]))
        sizes.append(_lines(torch.einsum("bgrs,brg->bs", squares, dout.square().sum(-1))[..., None]))
    return Truth(values, [size.sqrt() for size in sizes])


def eager(group: Group) -> list[Tensor]:
    """The same in plain code in the dtype of the inputs, the way all compared kernels go backward: delta from out."""
    q, k, v, dout = group.q, group.k, group.v, group.dout
    scores = (torch.einsum("brgd,bsd->bgrs", q, k) * group.scale).masked_fill(~group.mask, -torch.inf)
    if q.dtype == torch.float32:  # weights made again from scores and lse, as the kernels do
        weights = (scores - scores.logsumexp(-1, keepdim=True)).exp().nan_to_num(0.0)
    else:  # in 16 bits the lse itself would be rounded, which no kernel does
        weights = scores.softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bgrs,bsd->brgd", weights, v)
    if not group.backward:
        return [out]
    delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
    dscores = weights * (torch.einsum("brgd,bsd->bgrs", dout, v) - delta) * group.scale
    dk, dv = torch.einsum("bgrs,brgd->bsd", dscores, q), torch.einsum("bgrs,brgd->bsd", weights, dout)
    return [out, torch.einsum("bgrs,bsd->brgd", dscores, k), dk, dv]


def _lines(squares: Tensor) -> Tensor:
    """Sums of ``(B, S, n)`` over 64 tokens and the last axis, ``(B, lines)``."""
    padded = torch.nn.functional.pad(squares, (0, 0, 0, -squares.shape[1] % LINE_TOKENS))
    return padded.unflatten(1, (-1, LINE_TOKENS)).sum((2, 3))


def errors(results: list[Tensor], truth: Truth) -> list[float]:
    """The largest error of each result of a group; infinite where something is not 0 that must be."""
    found = []
    for i, (result, value, size) in enumerate(zip(results, truth.values, truth.sizes, strict=True)):
        squares = (result.double() - value).square()
        far = (squares.sum(-1) if i < 2 else _lines(squares)).sqrt()
        nothing = torch.where(far > 0, torch.inf, far)
        found.append(float(torch.where(size > 0, far / size.clamp_min(1e-300), nothing).max()))
    return found


class Oracle:
    """Truth of a case in float64 at some rows, per pattern; a peer is compared to the truth of the pattern that it computes.

    Works head by head, so that no more than the sampled rows of one KV head is held in float64 at a time, on whatever device.
    """

    def __init__(self, case: AttentionCase, inputs: Inputs, rows: Tensor | None = None, layer: int = 0):
        self.case, self.inputs, self.layer = case, inputs, layer
        self.rows = (sample_rows(case.seqlen) if rows is None else rows).to(inputs.q.device)
        self._bounds: dict[Pattern, list[float]] = {}
        self._masks: dict[Pattern, Tensor] = {}

    def dout(self) -> Tensor:
        """The output gradient of the check: zero outside the rows, so that dk and dv depend on those rows alone."""
        chosen = torch.zeros_like(self.inputs.dout)
        chosen[:, self.rows] = self.inputs.dout[:, self.rows]
        return chosen

    def check(self, pattern: Pattern, results: list[Tensor]) -> Error:
        """Compare out, and perhaps dq, dk, dv, all ``(B, S, heads, D)``, to the truth.

        The bound is twice the error of plain eager code in the same dtype on the same rows; on top, a rounding step of the dtype, and a
        few of float32 for adding up tile by tile.
        """
        group = self.case.heads // self.case.kv_heads
        worst = [0.0] * len(results)
        plain = None if pattern in self._bounds else [0.0] * len(results)
        for kv_head, part in enumerate(self._groups(pattern)):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            own = [result[:, self.rows, heads] for result in results[:2]] + [result[:, :, kv_head] for result in results[2:]]
            truth = exact(part)
            worst = _larger(worst, errors(own, truth))
            plain = None if plain is None else _larger(plain, errors(eager(part), truth))
        if plain is not None:
            self._bounds[pattern] = [bound_of(error, self.inputs.q.dtype) for error in plain]
        return worst_of([Error(error, bound) for error, bound in zip(worst, self._bounds[pattern], strict=True)])

    def _groups(self, pattern: Pattern) -> Iterator[Group]:
        case, inputs = self.case, self.inputs
        group, scale = case.heads // case.kv_heads, case.head_dim**-0.5
        for kv_head in range(case.kv_heads):
            heads = range(kv_head * group, (kv_head + 1) * group)
            mask = torch.stack([self._mask(pattern.at(Head(h, case.heads, case.kv_heads, self.layer))) for h in heads])
            q, dout = (x[:, self.rows, heads.start : heads.stop] for x in (inputs.q, inputs.dout))
            yield Group(q, inputs.k[:, :, kv_head], inputs.v[:, :, kv_head], dout, mask, scale, case.backward)

    def _mask(self, resolved: Pattern) -> Tensor:
        """The exact causal predicate of a head's pattern for the rows, ``(rows, S)`` bool: never more than a few rows of it exist."""
        if resolved not in self._masks:
            rows = self.rows.cpu().numpy()[:, None]
            seen = resolved.allowed(rows, torch.arange(self.case.seqlen).numpy()[None], Shape(self.case.seqlen))
            self._masks[resolved] = torch.from_numpy(seen).to(self.rows.device)
        return self._masks[resolved]


def _larger(a: list[float], b: list[float]) -> list[float]:
    """The larger ones; NaN where either is."""
    return [x if x != x or x > y else y for x, y in zip(a, b, strict=True)]
