"""`MassSelector`: what all selectors share that estimate the mass of blocks and keep some by a rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value
from s2attn.ops.selector import Call, Selector
from s2attn.selectors.select import SHARING, check_share, select

FORCED = ("sink", "diagonal")
Threshold = float | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MassSelector(Selector):
    """A selector made of an estimate, a rule, and what is kept in any case.

    Attributes:
        forced: what is kept whatever its mass: ``("sink", "diagonal")``, one of them, or ``()``.
        share: how the heads of one KV head agree: "none", "union", "mean" or "majority"; see `select`.
    """

    forced: tuple[str, ...] = field(default=FORCED, kw_only=True)
    share: str = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share not in SHARING:
            raise bad_value("share", f"must be one of {', '.join(SHARING)}", repr(self.share))
        given = tuple(self.forced) if isinstance(self.forced, (tuple, list)) else None
        if given is None or len(set(given)) != len(given) or any(name not in FORCED for name in given):
            raise bad_value("forced", f"must be a tuple of names among {FORCED}, each once", repr(self.forced))
        object.__setattr__(self, "forced", given)

    @abstractmethod
    def mass(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """``(B, H, query blocks, key blocks)``: the estimate."""

    @abstractmethod
    def rule(self, call: Call, heads: int) -> dict[str, Any]:
        """The rule as an argument of `select`."""

    def choose(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        forced = forced_blocks(self.forced, q.shape[1], k.shape[1], self.block, q.device)
        rule = self.rule(call, q.shape[2])
        return select(self.mass(q, k, call), **rule, forced=forced, share=self.share, kv_heads=k.shape[2])


def forced_blocks(names: tuple[str, ...], seqlen_q: int, seqlen_k: int, block: int, device: torch.device) -> Tensor:
    """bool ``(query blocks, key blocks)``: column 0 for "sink"; for "diagonal" every key block in which the row's queries lie."""
    rows, columns = -(-seqlen_q // block), -(-seqlen_k // block)
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    if "sink" in names:
        mask[:, :1] = True
    if "diagonal" in names:
        first = torch.arange(rows, device=device)[:, None] * block + seqlen_k - seqlen_q
        last = (first + block - 1).clamp(max=seqlen_k - 1)
        key = torch.arange(columns, device=device) * block
        mask |= (key <= last) & (key + block > first)
    return mask


def read_threshold(threshold: object) -> Threshold:
    """A threshold, or a table of them by layer and query head, checked."""
    if not isinstance(threshold, Sequence):
        return check_share("threshold", threshold)
    table = []
    for row in threshold:
        if not isinstance(row, Sequence) or not row:
            raise bad_kind("threshold", "must be a number, or a table with a list of numbers for each layer", row)
        table.append(tuple(check_share("threshold", number) for number in row))
    if not table:
        raise bad_value("threshold", "must have at least one layer when it is a table", threshold)
    return tuple(table)


def threshold_of(threshold: Threshold, layer: int, heads: int) -> float | tuple[float, ...]:
    """What a threshold, or a table of them, says for a layer; a table of another model does not fit."""
    if not isinstance(threshold, tuple):
        return threshold
    if layer >= len(threshold):
        raise bad_value("threshold", f"must have a row for layer {layer}: is it the table of another model?", f"{len(threshold)} layers")
    if len(threshold[layer]) != heads:
        rule = f"must have a number for each of the {heads} query heads in layer {layer}: is it the table of another model?"
        raise bad_value("threshold", rule, f"{len(threshold[layer])} numbers")
    return threshold[layer]
