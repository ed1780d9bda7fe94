"""Tensors as tables of vectors, and products whose bad numbers reach only rows that see them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Hide = Callable[[Tensor, float], Tensor]
"""Fill the hidden pairs of ``(n, rows, keys)`` in place with a number, and return it."""


@dataclass(frozen=True)
class Rows:
    """A tensor ``(I, J, H, D)`` as a table of vectors, without a copy where the last stride is 1.

    Vector (i, j, h) is row ``i * step[0] + j * step[1] + h * step[2]``; rows may overlap, and are read only.
    """

    table: Tensor
    step: tuple[int, int, int]

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.contiguous()
        if x.dtype == torch.float8_e4m3fn:
            x = x.view(torch.uint8)  # which index_select knows on every device
        strides = [stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
        unit = math.gcd(*strides) or 1
        step = (strides[0] // unit, strides[1] // unit, strides[2] // unit)
        last = sum((size - 1) * s for size, s in zip(x.shape[:3], step, strict=True))
        return cls(x.as_strided((last + 1, x.shape[-1]), (unit, 1)), step)

    def take(self, i: Tensor, j: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
        """The vectors at broadcast indices, ``(*shape, D)``."""
        number = i * self.step[0] + j * self.step[1] + h * self.step[2]
        found = self.table.index_select(0, number.reshape(-1))
        if found.dtype == torch.uint8:
            found = found.view(torch.float8_e4m3fn)
        return found.to(dtype).view(*number.shape, -1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm``; the bits of an item do not depend on how many others there are.

    A CPU library may split the sum of a product that stands alone among its threads, hence never one.
    """
    if len(a) != 1 or a.device.type != "cpu":
        return torch.bmm(a, b)
    return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1]


def weigh(weights: Tensor, values: Tensor, hide: Hide) -> Tensor:
    """``weights @ values``, where a value that is not finite makes NaN of the rows that see it and touches no other row."""
    if bool(values.sum().isfinite()):  # finite numbers whose sum overflows take the other way, with the same bits
        return product(weights, values)
    broken = ~values.isfinite().all(-1)
    out = product(weights, values.masked_fill(broken[..., None], 0.0))
    seen = hide(broken[:, None].repeat(1, weights.shape[1], 1), 0)
    return out.masked_fill_(seen.any(-1, keepdim=True), torch.nan)
