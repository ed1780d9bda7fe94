"""`VerticalSlash` and `FlexPrefill`: single keys, and single distances, that the last queries read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from s2attn.core import check_int
from s2attn.ops.lines import LineMass, last_queries
from s2attn.ops.pooled import mean_pool
from s2attn.ops.score import antidiagonal
from s2attn.ops.selector import Call, Selector
from s2attn.selectors.base import FORCED, Threshold, forced_blocks, read_threshold, threshold_of
from s2attn.selectors.select import check_share, select


@dataclass(frozen=True)
class VerticalSlash(Selector):
    """The keys and the distances that the last queries read most, for all queries (MInference, arXiv:2407.02490).

    The layout lists every block that a line crosses, whole; the first block and the diagonal are always listed.

    Args:
        verticals: keys.
        slashes: distances.
        last: how many of the last queries are looked at.
        block: tokens per block of the layout; MInference's is 64.

    >>> import s2attn, torch
    >>> q, k = torch.randn(1, 512, 4, 32), torch.randn(1, 512, 2, 32)
    >>> s2attn.attention(q, k, k, VerticalSlash(verticals=4, slashes=2, block=64)).shape
    torch.Size([1, 512, 4, 32])
    """

    causal_only: ClassVar[bool] = True
    verticals: int = 1000
    slashes: int = 200
    last: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("verticals", "slashes", "last"):
            check_int(name, getattr(self, name), 1)

    def choose(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        lines = last_queries(q, k, n=self.last, scale=call.scale, softcap=call.softcap)
        keys = select(lines.vertical.unsqueeze(2), top_k=self.verticals).squeeze(2)
        distances = select(lines.slash.unsqueeze(2), top_k=self.slashes).squeeze(2)
        blocks = blocks_of_lines(keys, distances, q.shape[1], self.block)
        return blocks | forced_blocks(FORCED, q.shape[1], k.shape[1], self.block, q.device)


@dataclass(frozen=True)
class FlexPrefill(Selector):
    """Each head by the rule that suits it (FlexPrefill, arXiv:2502.20766).

    Where means of blocks predict how the last block of queries really attends (root of the Jensen-Shannon divergence below ``tau``), the
    head keeps the fewest blocks that hold ``threshold`` of the mass by means, over all rows together; elsewhere the fewest keys, and the
    fewest distances, that hold ``threshold`` of the attention of the last queries. The first block and the diagonal are always kept.

    Args:
        threshold: share of the mass, in (0, 1]; or a table ``threshold[layer][query head]``. The paper's gamma.
        tau: in (0, 1].
        block: tokens per block; as many of the last queries are looked at.
    """

    causal_only: ClassVar[bool] = True
    threshold: Threshold = 0.95
    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("tau", self.tau)
        object.__setattr__(self, "threshold", read_threshold(self.threshold))

    def choose(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        threshold = threshold_of(self.threshold, call.layer, q.shape[2])
        pooled = mean_pool(q, k, block=self.block, scale=call.scale, softcap=call.softcap)
        by_means = select(pooled.flatten(2).unsqueeze(2), threshold=threshold).view(pooled.shape)
        lines: LineMass = last_queries(q, k, n=self.block, scale=call.scale, softcap=call.softcap)
        keys, distances = (select(mass.unsqueeze(2), threshold=threshold).squeeze(2) for mass in (lines.vertical, lines.slash))
        by_lines = blocks_of_lines(keys, distances, q.shape[1], self.block)
        chosen = torch.where(self.predicted(q, k, call)[..., None, None], by_means, by_lines)
        return chosen | forced_blocks(FORCED, q.shape[1], k.shape[1], self.block, q.device)

    def predicted(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """``(B, H)``: whether means predict the attention of the last block of queries."""
        last = q[:, -self.block :]
        true = antidiagonal(last, k, stride=1, block=self.block, scale=call.scale, softcap=call.softcap, backend=call.backend)[:, :, 0]
        by_means = mean_pool(last, k, block=self.block, scale=call.scale, softcap=call.softcap)[:, :, 0]
        return divergence(true / true.sum(dim=-1, keepdim=True), by_means).sqrt() < self.tau


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions along the last axis.

    >>> divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(0.6931)
    """
    middle = (a + b) / 2
    parts = (torch.special.xlogy(x, x) - torch.special.xlogy(x, middle) for x in (a, b))
    return (sum(parts, torch.zeros_like(a)).sum(dim=-1) / 2).clamp(min=0)


def blocks_of_lines(keys: Tensor, distances: Tensor, seqlen_q: int, block: int) -> Tensor:
    """bool ``(B, H, query blocks, key blocks)``: blocks that hold a chosen key, or a pair at a chosen distance.

    Args:
        keys, distances: bool ``(B, H, S)``.
    """
    seqlen_k, device = keys.shape[-1], keys.device
    rows, columns = -(-seqlen_q // block), -(-seqlen_k // block)
    vertical = torch.nn.functional.pad(keys, (0, -seqlen_k % block)).unflatten(-1, (columns, block)).any(dim=-1)
    # Queries of row r at distance d read keys from r * block + start on, block of them: in block r + start // block, and perhaps the next.
    start = seqlen_k - seqlen_q - torch.arange(seqlen_k, device=device)
    hit = torch.zeros(*keys.shape[:2], rows + 2 * columns + 1, dtype=torch.int32, device=device)
    zero = rows + columns  # place of the offset 0; no offset of a listed block is further away
    for offset in (start, start + block - 1):
        place = (torch.div(offset, block, rounding_mode="floor") + zero).clamp(0, hit.shape[-1] - 1)
        hit.index_add_(2, place, distances.int())
    offset = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None]
    return vertical.unsqueeze(2) | (hit > 0)[:, :, offset + zero]
