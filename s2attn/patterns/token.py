"""Patterns exact to the token: `Dense`, `Window`, `Sink`, `Global`, and distance bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from s2attn.patterns.base import MOST_TOKENS, Pattern, check_number
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
FAR = 2 * MOST_TOKENS
"""A position behind every sequence."""


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
        object.__setattr__(self, "n", check_number("Window n", self.n, 1))
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
        object.__setattr__(self, "n", check_number("Sink n", self.n, 1))
        super().__post_init__()

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        return k < self.n

    def cells(self, view: View) -> Cells:
        return key_cells(view, self.n)

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        return [np.clip(self.n - k_lo, 0, block)]


@dataclass(frozen=True)
class Global(Pattern):
    """The first ``n`` tokens are seen by all, and see all (Longformer, arXiv:2004.05150, section 3.1).

    ``last`` adds the last tokens of the sequence, as BigBird does (arXiv:2007.14062, section 2). They have no
    effect when the call is causal, where nobody sees them and a token must not change its keys once it is no
    longer the last: a causal ``Global`` is `Sink`.

    >>> from s2attn.patterns import Shape
    >>> Global(1, last=1).allowed([[1], [3]], [0, 1, 2, 3], Shape(seqlen_k=4, causal=False)).tolist()
    [[True, False, False, True], [True, True, True, True]]
    """

    n: int
    last: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", check_number("Global n", self.n, 1))
        object.__setattr__(self, "last", check_number("Global last", self.last, 0))
        super().__post_init__()

    def _tail(self, shape: Shape) -> int:
        """The position of the first of the ``last`` tokens; none is as far when they have no effect."""
        return max(0, shape.seqlen_k - self.last) if self.last and not shape.causal else FAR

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        tail = self._tail(shape)
        return (k < self.n) | (q < self.n) | (k >= tail) | (q >= tail)

    def cells(self, view: View) -> Cells:
        tail, end = self._tail(view.shape), view.num_blocks - 1
        zero = np.zeros(view.rows, dtype=np.int64)
        first = np.where((view.q_hi < self.n) | (view.q_lo >= tail), 0, -(-tail // view.block))
        touched = np.where((view.q_lo < self.n) | (view.q_hi >= tail), 0, tail // view.block)
        full, cover = view.intervals(first, zero + end), view.intervals(touched, zero + end)
        return key_cells(view, self.n) | Cells(full, cover - full)

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        edges = (self.n, self._tail(shape))
        return [np.clip(edge - lo, 0, block) for edge in edges for lo in (k_lo, q_lo)]

    def to_dict(self) -> dict[str, Any]:
        """Without ``last`` where there is none, so that the text and digest of such a pattern stay the same."""
        return {"type": "Global", "n": self.n} | ({"last": self.last} if self.last else {})
