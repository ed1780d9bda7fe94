"""What a backend is: a way to compute attention over a layout, and the reasons why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from s2attn.layout import Layout


class Backend(ABC):
    """One way to compute exact attention over a `Layout`.

    Tensors that reach a backend are checked already and have four axes: q ``(B, T, H, D)``, k ``(B, S, G, D)``, v ``(B, S, G, Dv)``,
    out ``(B, T, H, Dv)``, lse ``(B, H, T)`` float32 (float64 for float64 inputs), natural log; packed sequences arrive with B = 1.
    A row that sees no key gives out 0 and lse -inf. Both directions are deterministic.
    """

    name: str

    @abstractmethod
    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        """Every reason why this backend cannot serve such tensors; empty when it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)``."""

    @abstractmethod
    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(dq, dk, dv)``; ``dS = P * (dP - delta + dlse)`` with ``delta = sum(dout * out)``."""
