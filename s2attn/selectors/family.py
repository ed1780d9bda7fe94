"""Selectors that differ only in how they estimate the mass of a block: means, bounds of the keys, or a gate of your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.ops.pooled import bound_mass, mean_pool
from s2attn.ops.selector import Call
from s2attn.selectors.base import MassSelector, Threshold, read_threshold, threshold_of
from s2attn.selectors.quest import KeyBounds, choose_pages


@dataclass(frozen=True)
class RuledSelector(MassSelector):
    """A selector whose rule is ``top_k`` blocks or a ``threshold`` of the mass, exactly one of them.

    Attributes:
        top_k: blocks of each row, forced ones included.
        threshold: as in `XAttention`.
    """

    top_k: int | None = field(default=None, kw_only=True)
    threshold: Threshold | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.top_k is None) == (self.threshold is None):
            raise bad_value("top_k, threshold", "must be given one at a time", (self.top_k, self.threshold))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", read_threshold(self.threshold))
        else:
            check_int("top_k", self.top_k, 1)

    def rule(self, call: Call, heads: int) -> dict[str, Any]:
        return {"top_k": self.top_k} if self.threshold is None else {"threshold": threshold_of(self.threshold, call.layer, heads)}


@dataclass(frozen=True)
class MeanPool(RuledSelector):
    """Blocks whose mean key suits the mean query: MoBA (arXiv:2502.13189) without its gate, one choice for a block of queries.

    Args:
        top_k, threshold: the rule, exactly one of them.
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
        top_k, threshold: the rule, exactly one of them.
        block, forced, share: as in `XAttention`; Quest's pages have 16 tokens.

    >>> import s2attn, torch
    >>> q, k = torch.randn(1, 1, 4, 32), torch.randn(1, 512, 2, 32)
    >>> s2attn.attention(q, k, k, PageBounds(top_k=4, block=16)).shape
    torch.Size([1, 1, 4, 32])
    """

    def mass(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        return bound_mass(q, k, block=self.block, causal=call.causal, scale=call.scale, softcap=call.softcap)

    def pages(
        self,
        q: Tensor,
        bounds: KeyBounds,
        *,
        block_table: Tensor,
        seq_lens: Tensor,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> dict[str, Tensor]:
        """The ``top_k`` pages that each KV head reads in a step of decoding, as shorter tables for `s2attn.decode` with `Dense`.

        The pages of the new tokens are always among them, and the first one when "sink" is forced. All new tokens of a sequence, and all
        query heads of a group, read the same pages: those with the greatest mean mass. Nothing waits for the device and no shape depends on
        numbers, so a CUDA graph may capture the choice.

        Args:
            q: ``(B, T, H, D)``, the new tokens, whose keys are stored already.
            bounds: of the pages; ``block`` must be their page_size.
            block_table: ``(B, max_pages)`` or ``(B, G, max_pages)``.
            seq_lens: ``(B,)``, the new tokens included.
            scale, softcap: as in `attention`.

        Returns:
            ``block_table (B, G, min(top_k, max_pages))`` and ``seq_lens (B,)``, arguments of `decode`.

        >>> import s2attn, torch
        >>> k_pages, v_pages = torch.zeros(2, 40, 16, 2, 32)
        >>> bounds, table, slots = KeyBounds.of(k_pages), torch.arange(40)[None], torch.arange(600)
        >>> k, v = torch.randn(2, 600, 2, 32)
        >>> s2attn.store_kv(k, v, k_pages, v_pages, slots)
        >>> bounds.store(k, slots)
        >>> q = torch.randn(1, 1, 8, 32)
        >>> few = PageBounds(top_k=8, block=16).pages(q, bounds, block_table=table, seq_lens=torch.tensor([600]))
        >>> s2attn.decode(q, k_pages, v_pages, s2attn.Dense(), **few).shape, few["seq_lens"].tolist()
        (torch.Size([1, 1, 8, 32]), [120])
        """
        if self.top_k is None:
            raise bad_value("top_k", "must be given: a threshold keeps another number of pages at every step", self.threshold)
        if isinstance(bounds, KeyBounds) and bounds.page_size != self.block:
            raise bad_value("block", f"must be the page_size of the bounds, {bounds.page_size}", self.block)
        rule = {"top_k": self.top_k, "keep_first": "sink" in self.forced}
        return choose_pages(q, bounds, block_table=block_table, seq_lens=seq_lens, scale=scale, softcap=softcap, **rule)


@dataclass(frozen=True)
class Gated(RuledSelector):
    """Blocks by a function of your own, such as the learned gate of SeerAttention (arXiv:2410.13276).

    Args:
        gate: ``gate(q, k, call)`` returns scores ``(B, H, query blocks, key blocks)``, at least 0; its gradients are its own affair.
        top_k, threshold: the rule, exactly one of them.
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
