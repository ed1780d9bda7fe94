"""`Pattern`: the value that says which keys a query may see, and the two ways to join patterns."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.patterns.cells import Cells, Shape, View
from s2attn.patterns.runs import Array

FORMAT_VERSION = 1
MOST_TOKENS = 2**31 - 1
"""The largest number in a pattern: positions and block numbers stay within 32 bits."""
MOST_PARTS = 4096
"""Patterns inside one pattern, at all depths: what is built, printed or read takes time in their number."""
MOST_DEPTH = 64
"""Patterns inside patterns: far below what Python's stack allows."""


@dataclass(frozen=True)
class Head:
    """Which head of which layer a pattern is asked for, in global numbers (never those of one tensor-parallel rank).

    >>> Head(query=5, num_heads=8, num_kv_heads=2).kv
    1
    """

    query: int = 0
    num_heads: int = 1
    num_kv_heads: int = 1
    layer: int = 0

    @property
    def kv(self) -> int:
        return self.query * self.num_kv_heads // self.num_heads


KINDS: dict[str, type[Pattern]] = {}
"""Every class of pattern by its name, as JSON says it; a subclass enters itself."""


@dataclass(frozen=True)
class Pattern:
    """Which keys a query may see: an immutable value without tensors.

    Patterns are joined with ``|`` (seen by either) and ``&`` (seen by both), compare by value, hash, print as the code that makes them,
    and travel as JSON. A pattern may differ by head and layer; :meth:`at` gives the one of a single head. Causality is not part of a
    pattern: it is asked for with the call, and cuts whatever the pattern allows.

    A new kind of pattern is a subclass that gives ``_allowed`` (exact, per token), ``cells`` (per block, from interval arithmetic) and
    ``signature`` (blocks with equal signatures have equal masks); one on a grid of its own derives from `Grid` instead.
    """

    def __post_init__(self) -> None:
        """Bound the size, and keep the canonical JSON as the plain attribute ``spec``: compilers read it as a constant.

        Subclasses call this last.
        """
        size = 1 + sum([getattr(part, "_size") for part in self.parts])  # noqa: B009  attributes, not fields, like ``spec``
        depth = 1 + max([getattr(part, "_depth") for part in self.parts], default=0)  # noqa: B009
        if size > MOST_PARTS:
            raise bad_value("pattern", f"must be made of at most {MOST_PARTS} patterns", size)
        if depth > MOST_DEPTH:
            raise bad_value("pattern", f"must nest at most {MOST_DEPTH} deep", depth)
        object.__setattr__(self, "_size", size)
        object.__setattr__(self, "_depth", depth)
        object.__setattr__(self, "spec", canonical_json({"version": FORMAT_VERSION, "pattern": self.to_dict()}))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KINDS[cls.__name__] = cls

    # what a subclass gives

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        raise bad_kind("pattern", "must be one of the kinds that s2attn defines, or a subclass with _allowed", self)

    def cells(self, view: View) -> Cells:
        """Full and perhaps partial key blocks of each row of ``view``; the pattern must not differ by head any more."""
        raise bad_kind("pattern", "must be one of the kinds that s2attn defines, or a subclass with cells", self)

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        """Integers per (query block, key block) pair; two pairs with equal integers have equal token masks."""
        raise bad_kind("pattern", "must be one of the kinds that s2attn defines, or a subclass with signature", self)

    # what every pattern has

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The patterns that this one is made of."""
        return ()

    @property
    def grids(self) -> frozenset[int]:
        """Block sizes, in tokens, of the grids that the pattern lives on."""
        return frozenset().union(*(part.grids for part in self.parts))

    @property
    def per_query_head(self) -> bool:
        """Whether query heads of one group may see different keys (``heads="query"`` somewhere inside)."""
        return getattr(self, "heads", "kv") == "query" or any(part.per_query_head for part in self.parts)

    def at(self, head: Head) -> Pattern:
        """The pattern of one head, which no longer depends on the head."""
        return self

    def allowed(self, q_pos: Any, k_pos: Any, shape: Shape, head: Head | None = None) -> Array:
        """Whether the query at ``q_pos`` sees the key at ``k_pos``: the exact meaning, token by token.

        Args:
            q_pos: integer positions of queries, any shape; the last query of a sequence sits at ``shape.seqlen_k - 1``.
            k_pos: integer positions of keys, broadcast against ``q_pos``.
            shape: number of keys, and whether keys after the query are cut.
            head: for which head; the only one when left out.

        >>> from s2attn.patterns import Window
        >>> Window(2).allowed(3, [0, 1, 2, 3, 4], Shape(seqlen_k=5)).tolist()
        [False, False, True, True, False]
        """
        q, k = np.broadcast_arrays(np.asarray(q_pos, dtype=np.int64), np.asarray(k_pos, dtype=np.int64))
        seen = self.at(head or Head())._allowed(q, k, shape) & (k >= 0) & (k < shape.seqlen_k)
        return seen & (k <= q) if shape.causal else seen

    def __or__(self, other: Pattern) -> Pattern:
        return Or.of(self, other) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: Pattern) -> Pattern:
        return And.of(self, other) if isinstance(other, Pattern) else NotImplemented

    # JSON

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain JSON values, without the format version."""
        return {"type": type(self).__name__, **self._fields()}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], depth: int) -> Pattern:
        """Build from JSON values; ``depth`` is what `pattern_from_dict` is to be told of patterns inside."""
        return cls(**fields)

    def to_json(self) -> str:
        """The pattern as canonical JSON with a format version: equal patterns have equal text.

        >>> from s2attn.patterns import Sink
        >>> Sink(4).to_json()
        '{"pattern":{"n":4,"type":"Sink"},"version":1}'
        """
        return getattr(self, "spec")  # noqa: B009  an attribute, not a field: it takes no part in comparison

    @staticmethod
    def from_json(text: str) -> Pattern:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: malformed JSON, another version, an unknown kind or field; the message names it.
        """
        return pattern_from_dict(read_document(text, "pattern"))

    @cached_property
    def digest(self) -> str:
        """A hash of 16 hexadecimal digits that is the same in every process and release with the same format version."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def canonical_json(value: Any) -> str:
    """``json.dumps`` with sorted keys and no spaces, for plain names and numbers, in Python that torch.compile can follow.

    >>> canonical_json({"b": [1, None, True], "a": "x"})
    '{"a":"x","b":[1,null,true]}'
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        return "{" + ",".join([f'"{key}":{canonical_json(value[key])}' for key in sorted(value)]) + "}"
    return "[" + ",".join([canonical_json(item) for item in value]) + "]"


def read_document(text: str, name: str) -> dict[str, Any]:
    """The JSON object under ``name`` of a versioned document."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise bad_value(name, f"must nest at most {MOST_DEPTH} deep", f"{str(text)[:60]!r}") from None
    except (ValueError, TypeError) as error:  # malformed, or a number with thousands of digits
        raise bad_value(name, "must be JSON", f"{str(text)[:60]!r} ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get(name), dict):
        raise bad_value(name, f'must be a JSON object {{"version": 1, "{name}": {{...}}}}', f"{str(text)[:60]!r}")
    if document.get("version") != FORMAT_VERSION:
        raise bad_value(name, f"must have version {FORMAT_VERSION}", document.get("version"))
    return document[name]


def pattern_from_dict(data: Any, depth: int = 1) -> Pattern:
    """Build a pattern from the values of `Pattern.to_dict`; ``depth`` counts this pattern and those around it."""
    if depth > MOST_DEPTH:
        raise bad_value("pattern", f"must nest at most {MOST_DEPTH} deep", f"at least {depth}")
    if not isinstance(data, dict) or not isinstance(data.get("type"), str):
        raise bad_value("pattern", 'must be an object with a "type"', reprlib.repr(data))
    kind = KINDS.get(data["type"])
    if kind is None or kind.__name__ not in public_kinds():
        raise bad_value("pattern type", f"must be one of {', '.join(sorted(public_kinds()))}", repr(data["type"]))
    fields = {key: value for key, value in data.items() if key != "type"}
    known = {f.name for f in dataclasses.fields(kind)}
    for key in fields:
        if key not in known:
            raise bad_value(f"{kind.__name__} in JSON", f"must have only the fields {', '.join(sorted(known))}", repr(key))
    try:
        return kind._from_fields(fields, depth + 1)
    except (TypeError, KeyError) as error:
        raise bad_value(f"{kind.__name__} in JSON", f"must be complete ({error})", reprlib.repr(fields)) from None


def public_kinds() -> Iterator[str]:
    return (name for name in KINDS if not name.startswith("_") and name != "Grid")


@dataclass(frozen=True, repr=False)
class _Joined(Pattern):
    """Several patterns joined by one operator; nested ones of the same kind are flattened and repeated ones dropped."""

    of_parts: tuple[Pattern, ...]

    sign: ClassVar[str]
    join: ClassVar[Callable[[Any, Any], Any]]

    def __post_init__(self) -> None:
        if not self.of_parts or not all(isinstance(part, Pattern) for part in self.of_parts):
            raise bad_value(type(self).__name__, "must join one or more patterns", self.of_parts)
        super().__post_init__()

    @classmethod
    def of(cls, *patterns: Pattern) -> Pattern:
        flat: list[Pattern] = []
        for pattern in patterns:
            flat.extend(pattern.of_parts if isinstance(pattern, cls) else [pattern])
        unique = tuple(dict.fromkeys(flat))
        return unique[0] if len(unique) == 1 else cls(unique)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.of_parts

    def at(self, head: Head) -> Pattern:
        return type(self).of(*(part.at(head) for part in self.of_parts))

    def cells(self, view: View) -> Cells:
        cells = [view.cells_of(part) for part in self.of_parts]
        total = cells[0]
        for more in cells[1:]:
            total = type(self).join(total, more)
        return total

    def _allowed(self, q: Array, k: Array, shape: Shape) -> Array:
        total = self.of_parts[0]._allowed(q, k, shape)
        for part in self.of_parts[1:]:
            total = type(self).join(total, part._allowed(q, k, shape))
        return total

    def signature(self, q_lo: Array, k_lo: Array, block: int, shape: Shape) -> list[Array]:
        return [column for part in self.of_parts for column in part.signature(q_lo, k_lo, block, shape)]

    def to_dict(self) -> dict[str, Any]:
        return {"type": type(self).__name__, "of_parts": [part.to_dict() for part in self.of_parts]}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any], depth: int) -> Pattern:
        parts = fields["of_parts"]
        if not isinstance(parts, list) or not parts:
            raise bad_value(f"{cls.__name__} in JSON", "must list of_parts", reprlib.repr(parts))
        return cls.of(*(pattern_from_dict(part, depth) for part in parts))

    def __repr__(self) -> str:
        return f" {self.sign} ".join(f"({part!r})" if isinstance(part, _Joined) else repr(part) for part in self.of_parts)


@dataclass(frozen=True, repr=False)
class Or(_Joined):
    """Seen by any of the parts; write ``a | b``."""

    sign: ClassVar[str] = "|"
    join: ClassVar[Callable[[Any, Any], Any]] = staticmethod(lambda a, b: a | b)


@dataclass(frozen=True, repr=False)
class And(_Joined):
    """Seen by all of the parts; write ``a & b``."""

    sign: ClassVar[str] = "&"
    join: ClassVar[Callable[[Any, Any], Any]] = staticmethod(lambda a, b: a & b)


def check_heads(value: str) -> str:
    """``heads`` says whose number a per-head pattern counts by: "kv" or "query"."""
    if value not in ("kv", "query"):
        raise bad_value("heads", "must be 'kv' or 'query'", repr(value))
    return value


def head_number(heads: str, head: Head) -> tuple[int, int]:
    """The head's number and the number of heads, counted as ``heads`` says."""
    return (head.query, head.num_heads) if heads == "query" else (head.kv, head.num_kv_heads)


def check_layer(layer: object) -> int:
    return check_number("layer", layer, 0)


def check_number(argument: str, value: object, minimum: int) -> int:
    """`check_int` for the numbers of patterns, which are at most ``MOST_TOKENS``.

    >>> check_number("Window n", 10**20, 1)
    Traceback (most recent call last):
    ...
    ValueError: Window n must be at most 2147483647; got 100000000000000000000
    """
    number = check_int(argument, value, minimum)
    if number > MOST_TOKENS:
        raise bad_value(argument, f"must be at most {MOST_TOKENS}", shortened(number))
    return number


def shortened(number: int) -> str:
    """A number in at most 40 characters; Python refuses to write out more than some thousands of digits."""
    return str(number) if abs(number) < 10**40 else f"a number of {number.bit_length()} bits"


def numbered(name: str, patterns: Any, depth: int = 1) -> dict[int, Pattern]:
    """A JSON object whose keys are numbers of heads or layers and whose values are patterns."""
    if not isinstance(patterns, dict):
        raise bad_value(name, "must map numbers to patterns", reprlib.repr(patterns))
    for key in patterns:
        if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
            raise bad_value(name, "must map numbers to patterns", f"the key {key[:40]!r}")
    return {int(key): pattern_from_dict(pattern, depth) for key, pattern in patterns.items()}
