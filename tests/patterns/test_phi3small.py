"""`Recipe.from_phi3small`: the masks of Phi-3-small, against its rule written out block by block."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from s2attn import Dense, Recipe, preset
from tests.support.masks import dense_mask

PUBLISHED: dict[str, Any] = {
    "model_type": "phi3small",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "dense_attention_every_n_layers": 2,
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8,
    "blocksparse_homo_head_pattern": False,
}


def rule(config: dict[str, Any], layer: int, head: int, query: int, key: int) -> bool:
    """Whether a query sees a key, as the published model has it: one block pair at a time, with nothing of a pattern."""
    if key > query:
        return False
    every = config["dense_attention_every_n_layers"]
    if every and (layer + 1) % every == 0:
        return True
    size, stride, heads = config["blocksparse_block_size"], config["blocksparse_vert_stride"], config["num_attention_heads"]
    step = 0 if config["blocksparse_homo_head_pattern"] else max(1, int(stride / heads))
    query_block, key_block = query // size, key // size
    near = query_block - key_block < config["blocksparse_num_local_blocks"]
    return near or (key_block + head * step + 1) % stride == 0


def small(**other: Any) -> dict[str, Any]:
    blocks = {"blocksparse_block_size": 16, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 4}
    return {**PUBLISHED, "num_attention_heads": 4, "num_key_value_heads": 2, **blocks, **other}


@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(blocksparse_homo_head_pattern=True),
        small(num_attention_heads=6, num_key_value_heads=3),  # the heads do not go through the residues whole times
        small(num_attention_heads=2, num_key_value_heads=1, blocksparse_vert_stride=9),  # fewer heads than residues: steps of 4
        small(blocksparse_vert_stride=1),
        small(dense_attention_every_n_layers=3),
        small(dense_attention_every_n_layers=None),
        small(dense_attention_every_n_layers=0),
    ],
    ids=["published", "alike", "six heads", "wide stride", "stride 1", "every third dense", "none dense", "zero dense"],
)
def test_masks_are_those_of_the_rule(config: dict[str, Any]) -> None:
    recipe, length, heads = Recipe.from_phi3small(config), 200, config["num_attention_heads"]
    for layer in range(4):
        got = dense_mask(recipe.pattern(layer), heads, config["num_key_value_heads"], length, length, layer=layer).numpy()
        said = [[[rule(config, layer, h, q, k) for k in range(length)] for q in range(length)] for h in range(heads)]
        np.testing.assert_array_equal(got, np.array(said))


def test_the_published_model_is_the_preset() -> None:
    recipe = Recipe.from_phi3small(PUBLISHED)
    assert recipe == preset("phi3_small")
    assert [recipe.pattern(layer) == Dense() for layer in range(4)] == [False, True, False, True]


def test_an_object_with_the_same_names_will_do() -> None:
    assert Recipe.from_phi3small(SimpleNamespace(**PUBLISHED)) == Recipe.from_phi3small(PUBLISHED)
    assert Recipe.from_json(Recipe.from_phi3small(small(num_attention_heads=6, num_key_value_heads=3)).to_json()).pattern(0).per_query_head


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"model_type", "num_hidden_layers"}))
def test_a_missing_field_is_named(name: str) -> None:
    config = {key: value for key, value in PUBLISHED.items() if key != name}
    for came in (config, SimpleNamespace(**config)):
        with pytest.raises(ValueError, match=f"config must be a Phi-3-small configuration with {name}"):
            Recipe.from_phi3small(came)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"model_type": "phi3"}, ValueError, "config must have the model_type 'phi3small'; got 'phi3'"),
        ({"num_key_value_heads": 5}, ValueError, r"num_key_value_heads must divide num_attention_heads \(32\); got 5"),
        ({"blocksparse_block_size": 48}, ValueError, "blocksparse_block_size must be one of 16, 32, 64, 128, 256; got 48"),
        ({"blocksparse_num_local_blocks": 0}, ValueError, "blocksparse_num_local_blocks must be an integer >= 1; got 0"),
        ({"blocksparse_vert_stride": 0}, ValueError, "blocksparse_vert_stride must be an integer >= 1; got 0"),
        ({"dense_attention_every_n_layers": -1}, ValueError, "dense_attention_every_n_layers must be an integer >= 1; got -1"),
        ({"blocksparse_homo_head_pattern": 0}, TypeError, "blocksparse_homo_head_pattern must be True or False; got int"),
    ],
)
def test_a_wrong_field_is_named(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe.from_phi3small({**PUBLISHED, **wrong})
