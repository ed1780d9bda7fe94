"""Angular hashing: random hyperplanes, their signs read as a Gray code, and the order that it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.backends.checks import exact_arithmetic
from s2attn.selectors.stages import stage


def hyperplanes(count: int, width: int, generator: torch.Generator) -> Tensor:
    """``(count, width)`` float32: normals of random hyperplanes."""
    return torch.randn(count, width, generator=generator, device=generator.device, dtype=torch.float32)


def gray_rank(code: Tensor) -> Tensor:
    """The place of a code in the Gray sequence ``n ^ (n >> 1)``: codes at neighbouring places differ in one bit.

    >>> gray_rank(torch.tensor([0b000, 0b001, 0b011, 0b010, 0b110, 0b111, 0b101, 0b100])).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    rank, shift = code, 1
    while shift < 64:
        rank, shift = rank ^ (rank >> shift), shift * 2
    return rank


def buckets(x: Tensor, planes: Tensor) -> Tensor:
    """The bucket of every vector of ``x (..., width)``: which side of each hyperplane it lies on, as a place in the Gray sequence.

    Two vectors at an angle theta agree in each bit with probability ``1 - theta / pi``.
    """
    with exact_arithmetic(x.device):
        side = (x.float() @ planes.transpose(0, 1)) > 0
    weight = 2 ** torch.arange(len(planes), device=x.device)
    return gray_rank((side * weight).sum(dim=-1))


def bucket_order(x: Tensor, planes: Tensor) -> Tensor:
    """``(B, tokens, heads)`` int64: the tokens of ``x (B, tokens, heads, width)`` by bucket, in their old order inside a bucket."""
    with stage("hash"):
        found = buckets(x, planes)
    with stage("sort"):
        return torch.sort(found, dim=1, stable=True).indices


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """``x (B, tokens, heads, width)`` in another order of tokens for each head; differentiable."""
    return x.gather(1, order.unsqueeze(-1).expand(*order.shape, x.shape[-1]))


def inverse_of(order: Tensor) -> Tensor:
    """The order that undoes ``order``."""
    place = torch.arange(order.shape[1], device=order.device)[None, :, None].expand(order.shape)
    return torch.empty_like(order).scatter_(1, order, place)
