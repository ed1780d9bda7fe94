"""The recipe in a configuration: written, read, and refused when it is for another model."""

from __future__ import annotations

import json

import pytest

from s2attn import Dense, Local, PerHead, Recipe, Stride, Window
from s2attn.integrations.spec import read_spec, to_spec

RECIPE = Recipe(Local(4) | Stride(4), dense_layers=[0], layers={2: PerHead({1: Window(64)})})
SHAPE = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2}


def test_a_recipe_survives_json() -> None:
    spec = json.loads(json.dumps(to_spec(RECIPE)))
    assert read_spec(spec, **SHAPE) == RECIPE
    assert read_spec(json.dumps(spec), **SHAPE) == RECIPE
    assert read_spec(RECIPE, **SHAPE) == RECIPE


def test_a_pattern_is_the_recipe_of_all_layers() -> None:
    assert read_spec(to_spec(Dense()), **SHAPE) == Recipe(Dense()) == read_spec(Dense(), **SHAPE)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_layers": 2}, "s2_attention must name layers below 2, those of this model; got layer 2"),
        ({"num_kv_heads": 1}, "layer 2 does not fit 8 heads over 1 KV heads: PerHead patterns must name kv heads below 1"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_a_recipe_for_another_model_is_refused(shape: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(to_spec(RECIPE), **{**SHAPE, **shape})


@pytest.mark.parametrize("value", [None, 3, ["recipe"]])
def test_what_is_no_recipe_is_named(value: object) -> None:
    with pytest.raises(TypeError, match="s2_attention must be a recipe"):
        read_spec(value, **SHAPE)
    with pytest.raises(TypeError, match="recipe must be a Recipe or a Pattern"):
        to_spec(value)


def test_an_object_that_is_no_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="recipe"):
        read_spec({"default": 3}, **SHAPE)
