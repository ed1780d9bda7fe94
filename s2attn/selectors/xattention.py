"""`XAttention`: blocks by strided antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from s2attn.core import bad_value, check_int
from s2attn.ops.score import antidiagonal
from s2attn.ops.selector import Call
from s2attn.selectors.base import MassSelector, Threshold, read_threshold, threshold_of


@dataclass(frozen=True)
class XAttention(MassSelector):
    """The fewest blocks whose strided antidiagonals hold ``threshold`` of the mass (arXiv:2503.16428).

    Scoring costs ``1 / stride`` of a dense ``q.k``. The first key block and the diagonal are kept in any case.

    Args:
        stride: tokens per group of the reduced grid, usually 4, 8 or 16; divides ``block``.
        threshold: share of each row's mass to keep, in (0, 1]; or a table ``threshold[layer][query head]``.
        block: tokens per block of the layout, 16 to 256; the paper's is 128.
        forced: what is kept whatever its mass: ``("sink", "diagonal")``, one of them, or ``()``.
        share: how the heads of one KV head agree: "none", "union", "mean" or "majority"; see `select`.

    >>> import s2attn, torch
    >>> q, k, v = torch.randn(1, 512, 4, 32), torch.randn(1, 512, 2, 32), torch.randn(1, 512, 2, 32)
    >>> s2attn.attention(q, k, v, XAttention(stride=8, threshold=0.9)).shape
    torch.Size([1, 512, 4, 32])
    """

    stride: int = 16
    threshold: Threshold = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % check_int("stride", self.stride, 1):
            raise bad_value("stride", f"must divide block ({self.block})", self.stride)
        object.__setattr__(self, "threshold", read_threshold(self.threshold))

    def mass(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        scoring: dict[str, Any] = {"causal": call.causal, "scale": call.scale, "softcap": call.softcap, "backend": call.backend}
        return antidiagonal(q, k, stride=self.stride, block=self.block, **scoring)

    def rule(self, call: Call, heads: int) -> dict[str, Any]:
        return {"threshold": threshold_of(self.threshold, call.layer, heads)}
