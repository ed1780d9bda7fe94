"""`Recipe`: which layer uses which pattern."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from s2attn.core import bad_kind, bad_value
from s2attn.patterns import phi3small
from s2attn.patterns.base import (
    FORMAT_VERSION,
    MOST_PARTS,
    Pattern,
    check_layer,
    check_number,
    numbered,
    pattern_from_dict,
    read_document,
)
from s2attn.patterns.token import Dense


@dataclass(frozen=True, repr=False)
class Recipe:
    """The patterns of a model's layers: one by default, dense layers, and exceptions; saved with the model's configuration as JSON.

    Args:
        default: pattern of every layer that nothing else says something about.
        dense_layers: numbers of layers that see everything.
        layers: layer number -> its own pattern (stronger than ``dense_layers``).
        dense_every: when given, layer i is dense if ``(i + 1) % dense_every == 0`` (Phi-3-small: 2).

    >>> from s2attn.patterns import Local, Stride
    >>> recipe = Recipe(Local(16) | Stride(8), dense_layers=[0])
    >>> recipe.pattern(0), recipe.pattern(1).parts[0]
    (Dense(), Local(n=16, block=64))
    """

    default: Pattern
    dense_layers: Any = ()
    layers: Any = ()
    dense_every: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.default, Pattern):
            raise bad_kind("Recipe default", "must be a Pattern", self.default)
        if not isinstance(self.dense_layers, Iterable) or isinstance(self.dense_layers, str):
            raise bad_kind("Recipe dense_layers", "must be a list of layer numbers", self.dense_layers)
        if not isinstance(self.layers, (Mapping, tuple)):
            raise bad_kind("Recipe layers", "must map layer numbers to patterns", self.layers)
        listed = list(islice(self.dense_layers, MOST_PARTS + 1))
        if max(len(listed), len(self.layers)) > MOST_PARTS:
            raise bad_value("Recipe", f"must name at most {MOST_PARTS} layers", "more")
        dense = sorted({check_number("Recipe dense_layers", layer, 0) for layer in listed})
        own = {check_number("Recipe layers", layer, 0): pattern for layer, pattern in dict(self.layers).items()}
        for pattern in own.values():
            if not isinstance(pattern, Pattern):
                raise bad_kind("Recipe layers", "must map layer numbers to patterns", pattern)
        if self.dense_every is not None:
            object.__setattr__(self, "dense_every", check_number("Recipe dense_every", self.dense_every, 1))
        object.__setattr__(self, "dense_layers", tuple(dense))
        object.__setattr__(self, "layers", tuple(sorted(own.items(), key=lambda pair: pair[0])))

    def pattern(self, layer: int) -> Pattern:
        """The pattern of layer ``layer`` (counted from 0)."""
        layer = check_layer(layer)
        for number, pattern in self.layers:
            if number == layer:
                return pattern
        by_rule = self.dense_every is not None and (layer + 1) % self.dense_every == 0
        return Dense() if by_rule or layer in self.dense_layers else self.default

    def to_dict(self) -> dict[str, Any]:
        return {
            "default": self.default.to_dict(),
            "dense_layers": list(self.dense_layers),
            "layers": {str(layer): pattern.to_dict() for layer, pattern in self.layers},
            "dense_every": self.dense_every,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Build a recipe from the values of :meth:`to_dict`."""
        known = {"default", "dense_layers", "layers", "dense_every"}
        if not isinstance(data, dict) or "default" not in data or set(data) - known:
            raise bad_value(
                "recipe", f"must be an object with default and, at will, {', '.join(sorted(known - {'default'}))}", reprlib.repr(data)
            )
        own = numbered("recipe layers", data.get("layers", {}))
        return cls(pattern_from_dict(data["default"]), data.get("dense_layers", ()), own, data.get("dense_every"))

    def to_json(self) -> str:
        """The recipe as JSON with a format version."""
        return json.dumps({"version": FORMAT_VERSION, "recipe": self.to_dict()}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what :meth:`to_json` wrote; ``ValueError`` names what is wrong."""
        return cls.from_dict(read_document(text, "recipe"))

    @classmethod
    def from_phi3small(cls, config: Any) -> Recipe:
        """The recipe of a Phi-3-small model (arXiv:2404.14219), from its own configuration.

        Args:
            config: its ``config.json`` as a mapping, or any object with the same names: ``num_attention_heads``,
                ``num_key_value_heads``, ``dense_attention_every_n_layers``, ``blocksparse_block_size``, ``blocksparse_num_local_blocks``,
                ``blocksparse_vert_stride`` and ``blocksparse_homo_head_pattern``.

        Raises:
            ValueError, TypeError: a field that is missing or wrong, or the configuration of another model.

        >>> heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "dense_attention_every_n_layers": 2}
        >>> blocks = {"block_size": 64, "num_local_blocks": 16, "vert_stride": 8, "homo_head_pattern": False}
        >>> Recipe.from_phi3small({**heads, **{f"blocksparse_{name}": value for name, value in blocks.items()}})
        Recipe(Local(n=16, block=64) | Stride(stride=8, offset='spread', shift=1, block=64, heads='query'), dense_every=2)
        """
        phi3small.check_model_type(config)
        return cls(phi3small.sparse_pattern(config), dense_every=phi3small.dense_every(config))

    def __repr__(self) -> str:
        more = [f"dense_layers={list(self.dense_layers)}"] if self.dense_layers else []
        more += [f"layers={dict(self.layers)!r}"] if self.layers else []
        more += [f"dense_every={self.dense_every}"] if self.dense_every is not None else []
        return f"Recipe({', '.join([repr(self.default), *more])})"
