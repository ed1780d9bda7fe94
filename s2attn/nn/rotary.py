"""Rotary positions (arXiv:2104.09864), for models whose heads turn their first half against their second."""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(head_dim: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    """How far each pair of channels turns per position, in radians: ``base ** (-2 i / head_dim)``, float32 ``(head_dim / 2,)``."""
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def rotations(place: Tensor, turns: Tensor, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(B, T, 1, head_dim / 2)`` of the angles at positions ``(B, T)``, float32; both are multiplied by ``size``.

    >>> cos, sin = rotations(torch.tensor([[0, 1]]), frequencies(4, 10000.0))
    >>> cos[0, :, 0].tolist()[0], sin.shape
    ([1.0, 1.0], torch.Size([1, 2, 1, 2]))
    """
    angles = place.float()[..., None, None] * turns
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if size == 1.0 else (cos * size, sin * size)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the two halves of every head of ``x`` ``(B, T, heads, head_dim)`` by the angles of its position."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
