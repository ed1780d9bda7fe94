"""Patterns exact to the token: `Dense`, `Window`, `Sink`, `Global`, and distance bands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2attn.core import check_int
from s2attn.patterns.base import Pattern
from s2attn.patterns.cells import Cells, Shape, View, distance_cells, key_cells
from s2attn.patterns.runs import Array


@dataclass(frozen=True)
class _Band(Pattern):
    """Token distance ``lo <= q - k < hi``; None is unbounded. `Window` and `ByRange` are made of it."""

    lo: int | None
    hi: int | None

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        distance = q - k
        seen = np.ones(distance.shape, dtype=bool)
        if self.lo is not None:
            seen &= distance >= self.lo
        if self.hi is not None:
            seen &= distance < self.hi
        return seen

    def cells(self, view: View) -> Cells:
        return distance_cells(view, self.lo, self.hi)

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        # The mask depends on the distance of the corners alone, and no longer where the band's edges do not cross the block.
        delta = q_lo - k_lo
        return [np.clip(delta - edge, -block, block) for edge in (self.lo, self.hi) if edge is not None]


CAUSAL = _Band(0, None)


@dataclass(frozen=True)
class Dense(Pattern):
    """Every key (every earlier key when the call is causal): FlashAttention's pattern (arXiv:2205.14135, 2307.08691)."""

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        return np.ones(q.shape, dtype=bool)

    def cells(self, view: View) -> Cells:
        return distance_cells(view, None, None)

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        return []


@dataclass(frozen=True)
class Window(Pattern):
    """The query itself and the ``n - 1`` keys before it, exact to the token (arXiv:2004.05150, section 3.1).

    When the call is not causal, also the ``n - 1`` keys after it.

    >>> Window(1024)
    Window(n=1024)
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", check_int("Window n", self.n, 1))
        super().__post_init__()

    def _bands(self, causal: bool) -> _Band:
        return _Band(0 if causal else 1 - self.n, self.n)

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        return self._bands(shape.causal)._allowed(q, k, shape)

    def cells(self, view: View) -> Cells:
        return self._bands(view.shape.causal).cells(view)

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        return self._bands(shape.causal).signature(q_lo, k_lo, block, shape)


@dataclass(frozen=True)
class Sink(Pattern):
    """The first ``n`` tokens of the sequence, exact to the token (StreamingLLM, arXiv:2309.17453, section 3.2)."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", check_int("Sink n", self.n, 1))
        super().__post_init__()

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        return k < self.n

    def cells(self, view: View) -> Cells:
        return key_cells(view, self.n)

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        return [np.clip(self.n - k_lo, 0, block)]


@dataclass(frozen=True)
class Global(Pattern):
    """The first ``n`` tokens are seen by all, and see all (Longformer, arXiv:2004.05150, section 3.1; BigBird's global tokens).

    When the call is causal this is `Sink`.
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", check_int("Global n", self.n, 1))
        super().__post_init__()

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        return (k < self.n) | (q < self.n)

    def cells(self, view: View) -> Cells:
        end = view.num_blocks - 1
        full = view.intervals(np.zeros(view.rows), np.where(view.q_hi < self.n, end, -1))
        cover = view.intervals(np.zeros(view.rows), np.where(view.q_lo < self.n, end, -1))
        return key_cells(view, self.n) | Cells(full, cover - full)

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        return [np.clip(self.n - k_lo, 0, block), np.clip(self.n - q_lo, 0, block)]
