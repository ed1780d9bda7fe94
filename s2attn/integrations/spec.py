"""One recipe for every host: what stands under ``s2_attention`` in a model's configuration, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.layout import HeadRange, layout_heads
from s2attn.patterns import Pattern, Recipe

FIELD = "s2_attention"
"""The name of the recipe in a configuration, the same in every host."""


def to_spec(recipe: Recipe | Pattern) -> dict[str, Any]:
    """A recipe as the JSON object that a configuration keeps under `FIELD`; a single pattern is the recipe of all layers.

    >>> from s2attn import Window
    >>> to_spec(Window(64))["recipe"]["default"]
    {'n': 64, 'type': 'Window'}
    """
    if isinstance(recipe, Pattern):
        recipe = Recipe(recipe)
    if not isinstance(recipe, Recipe):
        raise bad_kind("recipe", "must be a Recipe or a Pattern", recipe)
    return json.loads(recipe.to_json())


def read_spec(value: Any, *, num_layers: int, num_heads: int, num_kv_heads: int) -> Recipe:
    """The recipe of a configuration, checked against the model it is for.

    Args:
        value: what stands under `FIELD`: the object of :func:`to_spec`, the same as text, or a `Recipe` or `Pattern`.
        num_layers, num_heads, num_kv_heads: of the whole model, whatever part of it this process holds.

    Raises:
        ValueError, TypeError: not a recipe, or one for another number of layers or heads.
    """
    if isinstance(value, (Recipe, Pattern)):
        value = to_spec(value)
    if isinstance(value, Mapping):
        try:
            value = json.dumps(value, sort_keys=True)
        except RecursionError:
            raise bad_value(FIELD, "must be a recipe", "an object that nests too deep") from None
    if not isinstance(value, str):
        raise bad_kind(FIELD, "must be a recipe: an object, its JSON text, a Recipe or a Pattern", value)
    return _read(
        value, check_int("num_layers", num_layers, 1), check_int("num_heads", num_heads, 1), check_int("num_kv_heads", num_kv_heads, 1)
    )


@lru_cache(maxsize=64)
def _read(text: str, num_layers: int, num_heads: int, num_kv_heads: int) -> Recipe:
    recipe = Recipe.from_json(text)
    named = (*recipe.dense_layers, *(layer for layer, _ in recipe.layers))
    if named and max(named) >= num_layers:
        raise bad_value(FIELD, f"must name layers below {num_layers}, those of this model", f"layer {max(named)}")
    everyone = HeadRange(0, num_heads, num_heads, num_kv_heads)
    for layer in range(num_layers):
        try:
            layout_heads(recipe.pattern(layer), everyone, num_kv_heads, layer)
        except ValueError as error:
            raise ValueError(f"{FIELD}: layer {layer} does not fit {num_heads} heads over {num_kv_heads} KV heads: {error}") from error
    return recipe
