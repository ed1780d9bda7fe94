"""Patterns on a grid of blocks: `Local`, `Stride`, `Power`, `Dilated`, `LongNet`, and their base `Grid`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from s2attn.core import bad_kind, bad_value, check_block
from s2attn.patterns.base import MOST_TOKENS, Head, Pattern, check_heads, check_number, head_number
from s2attn.patterns.cells import Cells, Shape, View, grid_cells
from s2attn.patterns.runs import Array, Runs


@dataclass(frozen=True)
class Grid(Pattern):
    """A pattern of whole blocks of ``block`` tokens: a subclass gives ``sees`` per pair of blocks and ``lists`` per query block."""

    def sees(self, q_block: Array, k_block: Array, shape: Shape) -> Array:
        """Whether a query block sees a key block (block numbers of the pattern's own grid; causality aside)."""
        raise bad_kind("pattern", "must be a subclass of Grid with sees", self)

    def lists(self, q_block: Array, shape: Shape) -> Runs:
        """The key blocks of each query block in ``q_block``, as progressions."""
        raise bad_kind("pattern", "must be a subclass of Grid with lists", self)

    @property
    def grid(self) -> int:
        return getattr(self, "block")  # noqa: B009  the field stands last in every subclass, after its own

    @property
    def grids(self) -> frozenset[int]:
        return frozenset([self.grid])

    def limit(self, shape: Shape) -> int:
        """Key blocks on this grid."""
        return -(-shape.seqlen_k // self.grid)

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        return self.sees(q // self.grid, k // self.grid, shape)

    def cells(self, view: View) -> Cells:
        return grid_cells(view, self.grid, lambda q_block: self.lists(q_block, view.shape))

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        # Which of the touched pairs of grid blocks are seen, and where the grid's lines cut the block.
        first, last = q_lo // self.grid, (q_lo + block - 1) // self.grid
        tall = int((last - first).max(initial=0)) + 1
        wide = max(1, block // self.grid)
        columns = [q_lo % self.grid] if tall > 1 else []
        packed, bits = np.zeros(q_lo.shape, dtype=np.int64), 0
        for i in range(tall):
            for j in range(wide):
                packed = 2 * packed + self.sees(np.minimum(first + i, last), k_lo // self.grid + j, shape)
                bits += 1
                if bits == 60:
                    columns.append(packed)
                    packed, bits = np.zeros(q_lo.shape, dtype=np.int64), 0
        return [*columns, packed]


def _check_grid(pattern: Pattern, **minimum: int) -> None:
    for name, least in minimum.items():
        value = getattr(pattern, name)
        object.__setattr__(pattern, name, check_number(f"{type(pattern).__name__} {name}", value, least))
    object.__setattr__(pattern, "block", check_block(f"{type(pattern).__name__} block", getattr(pattern, "block")))  # noqa: B009


@dataclass(frozen=True)
class Local(Grid):
    """The query's own block and the ``n - 1`` blocks before it, whole (S2-Attention, arXiv:2407.17678, section 3).

    When the call is not causal, also the ``n - 1`` blocks after it.
    """

    n: int
    block: int = 64

    def __post_init__(self) -> None:
        _check_grid(self, n=1)
        super().__post_init__()

    def sees(self, q_block: Array, k_block: Array, shape: Shape) -> Array:
        distance = q_block - k_block
        return (distance < self.n) & (distance > (-1 if shape.causal else -self.n))

    def lists(self, q_block: Array, shape: Shape) -> Runs:
        last = q_block if shape.causal else q_block + self.n - 1
        return Runs.intervals(q_block - self.n + 1, last, self.limit(shape))


OFFSETS = ("head", "spread")
"""How `Stride` may differ by head, in words."""


@dataclass(frozen=True)
class Stride(Grid):
    """Key blocks j with ``(j + offset) % stride == 0``, at absolute positions (S2-Attention, arXiv:2407.17678, section 3).

    ``offset="head"`` spreads the heads over the residues: head h of layer l among n heads takes ``l * n + h``, so the union of the heads
    covers every block whenever n >= stride, and when heads are fewer, each layer continues where the last one stopped.
    ``offset="spread"`` is the rule of the original code: head h takes ``h * max(1, stride // n)`` in
    every layer, so that few heads lie evenly apart. An integer gives all heads the same blocks. ``shift`` is
    added to the head's offset. ``heads`` says which heads are counted: "kv" (a group shares its keys, so the
    cache can shrink) or "query".

    >>> Stride(8).at(Head(query=3, num_heads=4, num_kv_heads=4))
    Stride(stride=8, offset=3, shift=0, block=64, heads='kv')
    >>> [Stride(8, offset="spread").at(Head(query=h, num_heads=2, num_kv_heads=2)).offset for h in range(2)]
    [0, 4]
    """

    stride: int
    offset: int | str = "head"
    shift: int = 0
    block: int = 64
    heads: str = "kv"

    def __post_init__(self) -> None:
        if self.offset not in OFFSETS:
            object.__setattr__(self, "offset", check_number('Stride offset, when not "head" or "spread",', self.offset, 0))
        _check_grid(self, stride=1, shift=0)
        check_heads(self.heads)
        super().__post_init__()

    @property
    def per_query_head(self) -> bool:
        return self.heads == "query" and isinstance(self.offset, str)

    def at(self, head: Head) -> Pattern:
        if isinstance(self.offset, int):
            return self if self.heads == "kv" else replace(self, heads="kv")
        number, total = head_number(self.heads, head)
        if self.offset == "head":
            offset = head.layer * total + number
        else:
            offset = number * max(1, self.stride // total)
        return replace(self, offset=(offset + self.shift) % self.stride, shift=0, heads="kv")

    @property
    def _residue(self) -> int:
        """The residue of the listed blocks modulo ``stride``."""
        if isinstance(self.offset, str):
            raise bad_kind("pattern", "must be resolved with .at(head) before its blocks are asked for", self)
        return -(self.offset + self.shift) % self.stride

    def sees(self, q_block: Array, k_block: Array, shape: Shape) -> Array:
        return k_block % self.stride == self._residue

    def lists(self, q_block: Array, shape: Shape) -> Runs:
        rows, limit = np.arange(len(q_block)), self.limit(shape)
        count = max(0, -((self._residue - limit) // self.stride))
        # Nothing after the query is ever seen when causal, so a row's progression ends there.
        count = np.minimum(count, np.maximum(0, (q_block - self._residue) // self.stride + 1)) if shape.causal else count
        return Runs.of(rows, np.full(len(rows), self._residue), self.stride, np.broadcast_to(count, rows.shape), limit)


@dataclass(frozen=True)
class Power(Grid):
    """Blocks at distance 0 and at the powers of ``base``: 1, 2, 4, 8, ... (PowerAttention, arXiv:2503.03588, section 4).

    When the call is not causal, in both directions.
    """

    base: int = 2
    block: int = 64

    def __post_init__(self) -> None:
        _check_grid(self, base=2)
        super().__post_init__()

    def _distances(self, limit: int) -> list[int]:
        distances, step = [0], 1
        while step < limit:
            distances.append(step)
            step *= self.base
        return distances

    def sees(self, q_block: Array, k_block: Array, shape: Shape) -> Array:
        distance = q_block - k_block
        if not shape.causal:
            distance = np.abs(distance)
        return np.isin(distance, self._distances(int(distance.max(initial=0)) + 1))

    def lists(self, q_block: Array, shape: Shape) -> Runs:
        limit = self.limit(shape)
        far = self._distances(max(int(q_block.max(initial=0)), limit - int(q_block.min(initial=0))) + 1)
        distances = np.array(far if shape.causal else [*(-d for d in far[1:]), *far])
        blocks = q_block[:, None] - distances[None, :]
        rows = np.broadcast_to(np.arange(len(q_block))[:, None], blocks.shape)
        return Runs.of(rows.ravel(), blocks.ravel(), 1, np.ones(blocks.size, dtype=np.int64), limit)


@dataclass(frozen=True)
class Dilated(Grid):
    """Blocks at a distance that is a multiple of ``dilation`` and, when ``n`` is given, below ``n`` blocks.

    PowerAttention's dilated baseline is ``Dilated(2, 20, block=256)``, its stride-slash ``Local(6, block=256) | Dilated(32, block=256)``
    (arXiv:2503.03588, section 5). When the call is not causal, in both directions.
    """

    dilation: int
    n: int | None = None
    block: int = 64

    def __post_init__(self) -> None:
        if self.n is not None:
            object.__setattr__(self, "n", check_number("Dilated n", self.n, 1))
        _check_grid(self, dilation=1)
        super().__post_init__()

    def sees(self, q_block: Array, k_block: Array, shape: Shape) -> Array:
        distance = q_block - k_block
        if not shape.causal:
            distance = np.abs(distance)
        return (distance >= 0) & (distance % self.dilation == 0) & (self.n is None or distance < self.n)

    def lists(self, q_block: Array, shape: Shape) -> Runs:
        limit, rows = self.limit(shape), np.arange(len(q_block))
        reach = max(int(np.abs(q_block).max(initial=0)), limit) + limit + 1 if self.n is None else self.n
        back = (reach - 1) // self.dilation
        ahead = 0 if shape.causal else back
        first, count = q_block - back * self.dilation, np.full(len(rows), back + ahead + 1)
        return Runs.of(rows, first, self.dilation, count, limit)


@dataclass(frozen=True)
class LongNet(Grid):
    """Segments that double while they thin out (LongNet, arXiv:2307.02486, section 3; on block numbers as in arXiv:2503.03588).

    Level i of ``levels``: query and key block lie in the same aligned segment of ``segment * 2**i`` blocks, and the key block's number
    is divisible by ``2**i``; with the defaults ``(q ^ k) < 8``, or ``< 16`` and k even, ``< 32`` and k divisible by 4, and so on to
    ``< 128``. ``segment`` is a power of two. The last of 128 blocks never sees more than 80 of them, however many the layers.
    """

    segment: int = 8
    levels: int = 5
    block: int = 64

    def __post_init__(self) -> None:
        _check_grid(self, segment=1, levels=1)
        if self.segment & (self.segment - 1):
            raise bad_value("LongNet segment", "must be a power of two", self.segment)
        if self.levels > 31 or self.segment << (self.levels - 1) > MOST_TOKENS:
            rule = f"must be so few that segment * 2 ** (levels - 1) is at most {MOST_TOKENS} blocks"
            raise bad_value("LongNet levels", rule, self.levels)
        super().__post_init__()

    def sees(self, q_block: Array, k_block: Array, shape: Shape) -> Array:
        differ = q_block ^ k_block
        seen = np.zeros(np.shape(differ), dtype=bool)
        for level in range(self.levels):
            seen |= (differ >= 0) & (differ < self.segment << level) & (k_block & ((1 << level) - 1) == 0)
        return seen

    def lists(self, q_block: Array, shape: Shape) -> Runs:
        rows, total = np.arange(len(q_block)), Runs.none()
        for level in range(self.levels):
            first = q_block & ~((self.segment << level) - 1)
            total |= Runs.of(rows, first, 1 << level, np.full(len(rows), self.segment), self.limit(shape))
        return total
