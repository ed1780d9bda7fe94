"""`hyper_attention`: exact inside buckets, sampled outside of them, merged; composed from `attention` and `merge` alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from s2attn.core import BLOCKS, bad_kind, bad_value, check_int
from s2attn.layout import Layout, build_layout, read_cu_seqlens
from s2attn.ops import attention, merge
from s2attn.ops.checks import check_cu_seqlens, check_scale, check_tensors
from s2attn.patterns import Dense
from s2attn.selectors.lsh import bucket_order, hyperplanes, inverse_of, reorder
from s2attn.selectors.sampling import SAMPLING, Drawn, draw, raise_to_floor, residual_floor, with_log_weights
from s2attn.selectors.stages import stage


def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    num_hashes: int = 7,
    block: int = 256,
    samples: int = 256,
    min_seqlen: int = 4096,
    seed: int = 0,
    sampling: str = "uniform",
    kappa: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """An estimate of dense attention in nearly linear time (HyperAttention, arXiv:2310.05869).

    Queries and keys are sorted by the same random hyperplanes, and each stretch of ``block`` keys is attended exactly by the queries of
    the same stretch. All other keys are represented by ``samples`` of them, drawn anew for each stretch, whose softmax sums are scaled up
    without bias; both parts are joined by `merge`. Causal attention is cut in halves: two causal halves, which are cut again, and a square
    below them that is not causal, and exact where its queries or keys are fewer than ``min_seqlen``.

    Exact, up to rounding, when there are no more than ``min_seqlen`` queries or keys, no more than ``block`` keys, or at least as many
    samples as keys outside of a stretch. Differentiable in q, k and v through both parts, their lse included; the choice of buckets and
    samples, their weights and the floor of ``kappa`` count as constants.

    Args:
        q, k, v: ``(B, T, H, D)``, ``(B, S, G, D)``, ``(B, S, G, Dv)``; any lengths, queries at the end of the keys. Or packed, with
            ``cu_seqlens``: each sequence then gives what it gives alone, whatever lies beside it.
        causal, scale, cu_seqlens_q, cu_seqlens_k, return_lse, backend: as in `attention`.
        num_hashes: hyperplanes, 1 to 62; there are ``2 ** num_hashes`` buckets.
        block: keys of a stretch.
        samples: keys drawn outside of each stretch, with replacement.
        min_seqlen: attention is exact up to this length; the causal halves are cut down to it. The squares below them are
            exact only if shorter, so that a power of two still has squares of this length estimated.
        seed: of hyperplanes and samples; the same seed on the same device gives the same result.
        sampling: "uniform", or "value_norm": half of the probability is uniform, the other half in proportion to ``||v||^2``. The paper
            draws in proportion to ``||v||^2`` alone, but then estimates the denominator apart; one draw serves both here.
        kappa: None, or the paper's floor on sampled softmax sums (algorithm 2): none is taken below the largest exact one among
            ``samples`` random queries, divided by ``kappa``. The floor adds to the denominator alone. The paper's other clamp, on single
            terms of these sums, is not offered.

    Returns:
        out ``(B, T, H, Dv)``; with ``return_lse`` also the estimated lse ``(B, H, T)``. Packed: ``(total_q, H, Dv)`` and ``(H, total_q)``.

    Raises:
        ValueError, TypeError: a bad argument, before any work.
        Unsupported: no backend, or not the named one, can serve the call.

    >>> q, k, v = (torch.randn(1, 1000, heads, 32) for heads in (4, 2, 2))
    >>> hyper_attention(q, k, v, block=64, samples=64, min_seqlen=128).shape
    torch.Size([1, 1000, 4, 32])
    """
    given = check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    check_tensors(q, k, v, packed=bool(given))
    numbers = {"block": check_int("block", block, 1), "samples": check_int("samples", samples, 1)}
    if check_int("num_hashes", num_hashes, 1) > 62:
        raise bad_value("num_hashes", "must be at most 62", num_hashes)
    if sampling not in SAMPLING:
        raise bad_value("sampling", f"must be one of {', '.join(SAMPLING)}", repr(sampling))
    if kappa is not None and (isinstance(kappa, bool) or not isinstance(kappa, (int, float))):
        raise bad_kind("kappa", "must be a number or None", kappa)
    if kappa is not None and not 0 < kappa < float("inf"):
        raise bad_value("kappa", "must be positive and finite", kappa)
    smallest, seed = check_int("min_seqlen", min_seqlen, 0), check_int("seed", seed, 0)
    how = _Estimate(check_scale(scale, q.shape[-1]), **numbers, min_seqlen=smallest, sampling=sampling, kappa=kappa, backend=backend)
    if not given:
        out, lse = _Run.of(how, num_hashes, q, seed).all(q, k, v, causal)
    else:
        parts = [_Run.of(how, num_hashes, q, seed).all(*one, causal) for one in _sequences(q, k, v, given)]
        out, lse = (torch.cat([part[i] for part in parts], dim=1 + i).squeeze(0) for i in range(2))
    return (out, lse) if return_lse else out


def _sequences(q: Tensor, k: Tensor, v: Tensor, given: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The sequences of packed tensors, each with a batch axis of 1; where there are none, one without tokens."""
    bounds = [pairwise(read_cu_seqlens(f"cu_seqlens_{x}", ends, len(of))) for x, ends, of in zip("qk", given, (q, k), strict=True)]
    cut = [(q[None, q_lo:q_hi], k[None, lo:hi], v[None, lo:hi]) for (q_lo, q_hi), (lo, hi) in zip(*bounds, strict=True)]
    return cut or [(q[None], k[None], v[None])]


@dataclass(frozen=True)
class _Estimate:
    """The numbers of a call; see `hyper_attention`."""

    scale: float
    block: int
    samples: int
    min_seqlen: int
    sampling: str
    kappa: float | None
    backend: str


@dataclass(frozen=True, eq=False)
class _Run:
    """One call: its numbers, its hyperplanes ``(num_hashes, D)``, and where its random numbers come from."""

    how: _Estimate
    planes: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, how: _Estimate, num_hashes: int, q: Tensor, seed: int) -> _Run:
        generator = torch.Generator(q.device).manual_seed(seed)
        return cls(how, hyperplanes(num_hashes, q.shape[-1], generator), generator)

    def all(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """The whole call."""
        if causal:
            return self.causal(q, k, v)
        if min(q.shape[1], k.shape[1]) <= self.how.min_seqlen:
            return self.exact(q, k, v, causal=False)
        return self.square(q, k, v)

    def exact(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        with stage("exact"):
            return attention(q, k, v, Dense(), causal=causal, scale=self.how.scale, return_lse=True, backend=self.how.backend)

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Halves; the queries may also be fewer, or more, than the keys."""
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        if min(seqlen_q, seqlen_k) <= max(self.how.min_seqlen, self.how.block):
            return self.exact(q, k, v, causal=True)
        if seqlen_q > seqlen_k:  # the first queries see nothing
            blind = seqlen_q - seqlen_k
            return _stack(self.exact(q[:, :blind], k[:, :0], v[:, :0], causal=True), self.causal(q[:, blind:], k, v))
        if seqlen_q < seqlen_k:  # all queries see the first keys
            past = seqlen_k - seqlen_q
            return _joined(self.square(q, k[:, :past], v[:, :past]), self.causal(q, k[:, past:], v[:, past:]))
        half = seqlen_q // 2
        upper = self.causal(q[:, :half], k[:, :half], v[:, :half])
        below = self.square(q[:, half:], k[:, :half], v[:, :half])
        return _stack(upper, _joined(self.causal(q[:, half:], k[:, half:], v[:, half:]), below))

    def square(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Every query sees every key; shorter squares than ``min_seqlen`` are exact, as in the authors' code."""
        cut = _Stretches.of(q.shape[1], k.shape[1], self.how.block)
        short = min(q.shape[1], k.shape[1]) < self.how.min_seqlen
        if short or not q.shape[0] or len(cut.k_lengths) <= 1 or max(cut.outside) <= self.how.samples:
            return self.exact(q, k, v, causal=False)
        order_q, order_k = bucket_order(q.detach(), self.planes), bucket_order(k.detach(), self.planes)
        with stage("sort"):
            q_sorted, k_sorted, v_sorted = reorder(q, order_q), reorder(k, order_k), reorder(v, order_k)
        with stage("blocks"):
            inside = self._stretch_by_stretch(q_sorted, k_sorted, v_sorted, cut, cut.k_lengths, self.how.scale)
        with stage("samples"):
            outside = self._sampled(q_sorted, k_sorted, v_sorted, cut, inside[1])
        out, lse = _joined(inside, outside)
        with stage("sort"):
            back = inverse_of(order_q)
            return reorder(out, back), lse.gather(2, back.transpose(1, 2))

    def _sampled(self, q: Tensor, k: Tensor, v: Tensor, cut: _Stretches, inside_lse: Tensor) -> tuple[Tensor, Tensor]:
        """The keys outside of each query's stretch, estimated from samples: out, and the lse scaled up to all of them."""
        how = self.how
        drawn: Drawn = draw(v.detach(), cut.k_lengths, how.samples, how.sampling, self.generator)
        k_drawn, v_drawn = drawn.take(k), drawn.take(v)
        lengths = (how.samples,) * len(cut.k_lengths)
        q_here, scale = q, how.scale
        if drawn.log_weight is not None:
            q_here, k_drawn, scale = *with_log_weights(q * scale, k_drawn, drawn.log_weight), 1.0
        out, lse = self._stretch_by_stretch(q_here, k_drawn, v_drawn, cut, lengths, scale)
        if drawn.log_weight is None:
            shift = torch.tensor(cut.outside, dtype=torch.float64).div(how.samples).log()
            lengths_q = torch.tensor(cut.q_lengths)
            lse = lse + torch.repeat_interleave(shift, lengths_q).to(lse)
        if how.kappa is None:
            return out, lse
        rows = torch.randint(q.shape[1], (how.samples,), generator=self.generator, device=q.device)
        with torch.no_grad():
            _, all_lse = self.exact(q[:, rows], k, v, causal=False)
            floor = residual_floor(all_lse, inside_lse[..., rows], how.kappa)
        return raise_to_floor(out, lse, floor)

    def _stretch_by_stretch(
        self, q: Tensor, k: Tensor, v: Tensor, cut: _Stretches, k_lengths: tuple[int, ...], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Dense attention of stretch j of the queries over stretch j of the keys, ``k_lengths[j]`` long, for every j and sample."""
        batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
        layout, *cu = _diagonal_layout(cut.q_lengths * batch, k_lengths * batch, heads, kv_heads, q.device)
        flat_q, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        shared: dict[str, Any] = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "return_lse": True, "backend": self.how.backend}
        out, lse = attention(flat_q, flat_k, flat_v, layout, causal=False, scale=scale, **shared)
        return out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)


@dataclass(frozen=True)
class _Stretches:
    """Sorted queries and keys cut into as many stretches: lengths, and how many keys lie outside of each stretch."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    outside: tuple[int, ...]

    @classmethod
    def of(cls, seqlen_q: int, seqlen_k: int, block: int) -> _Stretches:
        """Stretches of ``block`` keys, the last one shorter; the queries are cut at the same shares of their number."""
        ends = [0, *range(block, seqlen_k, block), seqlen_k]
        k_lengths = tuple(hi - lo for lo, hi in pairwise(ends))
        q_lengths = tuple(seqlen_q * hi // seqlen_k - seqlen_q * lo // seqlen_k for lo, hi in pairwise(ends)) if seqlen_k else (seqlen_q,)
        return cls(q_lengths, k_lengths, tuple(seqlen_k - length for length in k_lengths))


@lru_cache(maxsize=64)
def _diagonal_layout(
    q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], heads: int, kv_heads: int, device: torch.device
) -> tuple[Layout, Tensor, Tensor]:
    """Sequence j of the queries over sequence j of the keys, nothing else; and the cumulative lengths."""
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths))
    block = min((size for size in BLOCKS if size >= max(k_lengths)), default=BLOCKS[-1])
    layout = build_layout(Dense(), heads, kv_heads, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, block=block, causal=False, device=device)
    return layout, cu_q, cu_k


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Results over different keys as one."""
    with stage("merge"):
        return merge([first, second])


def _stack(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Results of earlier and of later queries as one."""
    with stage("merge"):
        return torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]], dim=2)
