"""Selectors that differ only in how they estimate the mass of a block: means, bounds of the keys, or a gate of your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.ops.pooled import bound_mass, mean_pool
from s2attn.ops.selector import Call
from s2attn.selectors.base import Coverage, MassSelector, coverage_of, read_coverage


@dataclass(frozen=True)
class RuledSelector(MassSelector):
    """A selector whose rule is ``top_k`` blocks or a ``coverage`` of the mass, exactly one of them.

    Attributes:
        top_k: blocks of each row, forced ones included.
        coverage: as in `XAttention`.
    """

    top_k: int | None = field(default=None, kw_only=True)
    coverage: Coverage | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.top_k is None) == (self.coverage is None):
            raise bad_value("top_k, coverage", "must be given one at a time", (self.top_k, self.coverage))
        if self.coverage is not None:
            object.__setattr__(self, "coverage", read_coverage(self.coverage))
        else:
            check_int("top_k", self.top_k, 1)

    def rule(self, call: Call, heads: int) -> dict[str, Any]:
        return {"top_k": self.top_k} if self.coverage is None else {"coverage": coverage_of(self.coverage, call.layer, heads)}


@dataclass(frozen=True)
class MeanPool(RuledSelector):
    """Blocks whose mean key suits the mean query: MoBA (arXiv:2502.13189) without its gate, one choice for a block of queries.

    Args:
        top_k, coverage: the rule, exactly one of them.
        block, forced, share: as in `XAttention`.

    >>> import s2attn, torch
    >>> q, k = torch.randn(1, 512, 4, 32), torch.randn(1, 512, 2, 32)
    >>> s2attn.attention(q, k, k, MeanPool(top_k=2)).shape
    torch.Size([1, 512, 4, 32])
    """

    def mass(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return mean_pool(q, k, block=self.block, causal=call.causal, scale=call.scale, softcap=call.softcap)


@dataclass(frozen=True)
class PageBounds(RuledSelector):
    """Blocks that could hold the greatest logit, by the bounds of their keys: Quest (arXiv:2406.10774), made for decoding.

    Args:
        top_k, coverage: the rule, exactly one of them.
        block, forced, share: as in `XAttention`; Quest's pages have 16 tokens.

    >>> import s2attn, torch
    >>> q, k = torch.randn(1, 1, 4, 32), torch.randn(1, 512, 2, 32)
    >>> s2attn.attention(q, k, k, PageBounds(top_k=4, block=16)).shape
    torch.Size([1, 1, 4, 32])
    """

    def mass(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return bound_mass(q, k, block=self.block, causal=call.causal, scale=call.scale, softcap=call.softcap)


@dataclass(frozen=True)
class Gated(RuledSelector):
    """Blocks by a function of your own, such as the learned gate of SeerAttention (arXiv:2410.13276).

    Args:
        gate: ``gate(q, k, call)`` returns scores ``(B, H, query blocks, key blocks)``, at least 0; its gradients are its own affair.
        top_k, coverage: the rule, exactly one of them.
        block, forced, share: as in `XAttention`.
    """

    gate: Callable[[Tensor, Tensor, Call], Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.gate):
            raise bad_kind("gate", "must be a function of q, k and the call", self.gate)

    def mass(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        scores = self.gate(q, k, call)
        expected = (q.shape[0], q.shape[2], -(-q.shape[1] // self.block), -(-k.shape[1] // self.block))
        if not isinstance(scores, Tensor) or tuple(scores.shape) != expected:
            came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise bad_value("gate", f"must return a tensor of shape {expected}", came)
        return scores
