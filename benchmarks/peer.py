"""What takes part in a comparison: a way to compute a case, and what it says of itself once it is ready."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s2attn.backends import pick
from s2attn.layout import Layout, build_layout
from s2attn.patterns import Pattern
from s2attn.tuning.cases import AttentionCase

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A peer that is ready for one case.

    Attributes:
        attend: out of q, k, v, all in the peer's own order of axes.
        heads_first: that order is ``(B, H, T, D)`` instead of ``(B, T, H, D)``.
        metadata_s: seconds spent on block lists and masks.
        metadata_bytes: what they hold, where it is known.
        pattern: what the peer computes, which is what it is checked against.
        pairs: (query, key) pairs that it lists, all heads and batch entries.
        executed: pairs in the blocks that it computes, masked ones included, where that is known.
        facts: more for the row: what was chosen, and how.
    """

    attend: Attend
    heads_first: bool
    metadata_s: float
    metadata_bytes: int
    pattern: Pattern
    pairs: int
    executed: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


NO_CUDA = "needs a CUDA device"


class Peer(ABC):
    """One way to compute a case on ``device`` (``"cpu"`` or ``"cuda"``).

    Attributes:
        dense: it is dense attention, so that efficiency may be told against it.
        slow: it takes long to prepare, and so takes part only in cases that ask for all peers.
    """

    name: str
    dense = False
    slow = False

    def __init__(self, device: str = "cpu"):
        self.device = device

    def absence(self) -> str | None:
        """Why the peer cannot take part in any case here."""
        return None

    @abstractmethod
    def prepare(self, case: AttentionCase) -> Prepared:
        """Everything that is done once per mask; raises `s2attn.tuning.rows.Skip` where the peer cannot serve the case."""


def default_backend(device: str) -> str:
    """The backend of s2attn that a benchmark times where none is named: Triton's kernels on a GPU, else what `auto` takes."""
    if device == "cuda":
        return "triton"
    x = torch.zeros(1, 1, 1, 16, device=device)
    return pick("auto", x, x, x).name


def case_layout(case: AttentionCase, device: str, block: int | None = None) -> Layout:
    """The layout of a case, at the case's block or another one."""
    return build_layout(case.pattern, case.heads, case.kv_heads, seqlen_q=case.seqlen, block=block or case.block, device=device)


def listed_pairs(case: AttentionCase, layout: Layout) -> tuple[int, int]:
    """Pairs that a case's layout lists, and pairs in its listed blocks; all heads and batch entries."""
    each = case.batch * case.heads // layout.heads
    return each * int(layout.pairs.sum()), each * int(layout.rows.counts.sum()) * layout.block**2
