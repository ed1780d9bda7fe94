"""Tensors seen as tables of rows, one row of numbers per (batch, token, head), and the index arithmetic on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A ``(batch, tokens, heads, width)`` tensor as a table: row ``batch * s0 + token * s1 + head * s2``, without a copy if possible."""

    table: Tensor
    s0: int
    s1: int
    s2: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls.without_copy(x) or cls.of(x.contiguous())

    @classmethod
    def without_copy(cls, x: Tensor) -> Rows | None:
        """The table, or None where strides are no whole rows."""
        width = x.shape[-1]
        strides = [0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
        if (x.stride(-1) != 1 and width > 1) or any(stride % width for stride in strides):
            return None
        s0, s1, s2 = (stride // width for stride in strides)
        count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[:3], (s0, s1, s2), strict=True)) if x.numel() else 0
        return cls(x.as_strided((count, width), (width, 1)), s0, s1, s2)

    def at(self, batch: Tensor, token: Tensor, head: Tensor) -> Tensor:
        """Row numbers, by broadcasting; pages of a cache stand in the place of batch entries."""
        return batch * self.s0 + token * self.s1 + head * self.s2


@cache
def keep_freed_memory() -> None:
    """Ask glibc, once, to keep freed blocks of up to 32 MiB mapped.

    It starts by returning blocks above 128 KiB to the kernel, so that every buffer of scores would be mapped, zeroed and faulted in
    anew: more time than the product that fills it. Freeing one untouched large block raises that threshold. Elsewhere it does nothing.
    """
    torch.empty(30 << 20, dtype=torch.uint8)


def add_blocks(total: Tensor, index: Tensor, source: Tensor) -> None:
    """``total[index[i]] += source[i]`` in the order of i, with the same bits every time.

    On a CPU `index_add_` goes through the index one by one. Elsewhere it uses atomics, whose order varies, so there each round adds at
    most one source to a place.
    """
    if total.device.type == "cpu":
        total.index_add_(0, index, source)
    else:
        add_in_rounds(total, index, source)


def add_in_rounds(total: Tensor, index: Tensor, source: Tensor) -> None:
    """The same sums with unique places in every round."""
    ordered, order = torch.sort(index, stable=True)
    nth = torch.arange(len(index), device=index.device) - torch.searchsorted(ordered, ordered)
    for turn in range(int(nth.max()) + 1 if len(index) else 0):
        mine = order[nth == turn]
        total.index_add_(0, index[mine], source[mine])
