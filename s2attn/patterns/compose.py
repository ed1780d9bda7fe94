"""Patterns made of patterns: `ByRange` (by distance from the query) and `PerHead`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from s2attn.core import bad_kind, bad_value
from s2attn.patterns.base import Head, Pattern, check_heads, check_number, head_number, numbered, pattern_from_dict
from s2attn.patterns.cells import Cells, Shape, View
from s2attn.patterns.runs import Array
from s2attn.patterns.token import Dense, _Band


def _checked_range(entry: Any) -> tuple[int, int | None, Pattern]:
    if not isinstance(entry, Sequence) or len(entry) != 3:
        raise bad_value("ByRange ranges", "must be (start, end, pattern) triples", reprlib.repr(entry))
    start, end, pattern = entry
    start = check_number("ByRange start", start, 0)
    end = None if end is None else check_number("ByRange end", end, start + 1)
    if not isinstance(pattern, Pattern):
        raise bad_kind("ByRange pattern", "must be a Pattern", pattern)
    return start, end, pattern


@dataclass(frozen=True, repr=False)
class ByRange(Pattern):
    """A pattern for every range of distance between query and key (S2-Attention, arXiv:2407.17678, section 3 and figure 1).

    Args:
        ranges: triples ``(start, end, pattern)``, half-open, in tokens, ascending and without overlap; ``end=None`` is unbounded. A
            distance in no range is not seen. When the call is not causal the distance is ``|q - k|``.

    >>> from s2attn.patterns import Stride
    >>> ByRange([(0, 512, Dense()), (512, None, Stride(4))]).at(Head())
    ByRange([(0, 512, Dense()), (512, None, Stride(stride=4, offset=0, shift=0, block=64, heads='kv'))])
    """

    ranges: tuple[tuple[int, int | None, Pattern], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.ranges, Sequence) or not self.ranges:
            raise bad_value("ByRange ranges", "must be a non-empty list of (start, end, pattern)", reprlib.repr(self.ranges))
        ranges = tuple(_checked_range(entry) for entry in self.ranges)
        for (_, end, _), (start, _, _) in pairwise(ranges):
            if end is None or start < end:
                raise bad_value("ByRange ranges", "must ascend without overlap", f"a range that starts at {start} after one to {end}")
        object.__setattr__(self, "ranges", ranges)
        super().__post_init__()

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return tuple(pattern for _, _, pattern in self.ranges)

    def at(self, head: Head) -> ByRange:
        return ByRange(tuple((start, end, pattern.at(head)) for start, end, pattern in self.ranges))

    def _bands(self, causal: bool) -> list[tuple[_Band, Pattern]]:
        bands = [(_Band(start, end), pattern) for start, end, pattern in self.ranges]
        if not causal:
            bands += [(_Band(None if end is None else 1 - end, 1 - start), pattern) for start, end, pattern in self.ranges]
        return bands

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        seen = np.zeros(q.shape, dtype=bool)
        for band, pattern in self._bands(shape.causal):
            seen |= band._allowed(q, k, shape) & pattern._allowed(q, k, shape)
        return seen

    def cells(self, view: View) -> Cells:
        total: Cells | None = None
        for band, pattern in self._bands(view.shape.causal):
            cells = view.cells_of(band) & view.cells_of(pattern)
            total = cells if total is None else total | cells
        assert total is not None  # there is at least one range
        return total

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        pairs = self._bands(shape.causal)
        return [column for pair in pairs for part in pair for column in part.signature(q_lo, k_lo, block, shape)]

    def to_dict(self) -> dict[str, Any]:
        return {"type": "ByRange", "ranges": [[start, end, pattern.to_dict()] for start, end, pattern in self.ranges]}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], depth: int) -> Pattern:
        ranges = fields["ranges"]
        if not isinstance(ranges, list) or not all(isinstance(entry, list) and len(entry) == 3 for entry in ranges):
            raise bad_value("ByRange in JSON", "must list [start, end, pattern] triples", reprlib.repr(ranges))
        return cls(tuple((start, end, pattern_from_dict(pattern, depth)) for start, end, pattern in ranges))

    def __repr__(self) -> str:
        return f"ByRange({list(self.ranges)!r})"


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """A pattern of its own for some heads, and ``default`` for the others (DuoAttention, arXiv:2410.10819; LServe, arXiv:2502.14866).

    Args:
        patterns: head number -> pattern.
        default: for every head that is not named.
        heads: whether the numbers are those of "kv" or of "query" heads.

    >>> from s2attn.patterns import Sink, Window
    >>> PerHead({0: Dense()}, default=Sink(64) | Window(512)).at(Head(query=0))
    Dense()
    """

    patterns: Any
    default: Pattern = Dense()
    heads: str = "kv"

    def __post_init__(self) -> None:
        given = dict(self.patterns) if isinstance(self.patterns, (Mapping, tuple)) else None
        if given is None:
            raise bad_kind("PerHead patterns", "must map head numbers to patterns", self.patterns)
        for value in (*given.values(), self.default):
            if not isinstance(value, Pattern):
                raise bad_kind("PerHead pattern", "must be a Pattern", value)
        pairs = [(check_number("PerHead head", head, 0), pattern) for head, pattern in given.items()]
        pairs.sort(key=lambda pair: pair[0])
        object.__setattr__(self, "patterns", tuple(pairs))
        check_heads(self.heads)
        super().__post_init__()

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (*(pattern for _, pattern in self.patterns), self.default)

    @property
    def per_query_head(self) -> bool:
        return self.heads == "query" or any(part.per_query_head for part in self.parts)

    def at(self, head: Head) -> Pattern:
        number, total = head_number(self.heads, head)
        if self.patterns and self.patterns[-1][0] >= total:
            raise bad_value("PerHead patterns", f"must name {self.heads} heads below {total}", self.patterns[-1][0])
        return dict(self.patterns).get(number, self.default).at(head)

    def to_dict(self) -> dict[str, Any]:
        patterns = {str(head): pattern.to_dict() for head, pattern in self.patterns}
        return {"type": "PerHead", "patterns": patterns, "default": self.default.to_dict(), "heads": self.heads}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], depth: int) -> Pattern:
        patterns = numbered("PerHead in JSON", fields["patterns"], depth)
        default = pattern_from_dict(fields.get("default", Dense().to_dict()), depth)
        return cls(patterns, default, fields.get("heads", "kv"))

    def __repr__(self) -> str:
        heads = "" if self.heads == "kv" else f", heads={self.heads!r}"
        return f"PerHead({dict(self.patterns)!r}, default={self.default!r}{heads})"
