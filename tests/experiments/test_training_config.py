"""Configuration files: every value counts, and one that does not fit is named before any work."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from experiments.training.config import JobConfig, config_of, read_config, tomllib
from s2attn import Dense, Local, Recipe, Stride, Window

FILE = """
[data]
source = "texts"
include = ["*.md", "*.txt"]
tokenizer = "bpe"
vocabulary = 1000

[model]
layers = 6
recipe = { default = "local:2|stride:4", dense_layers = [0, 5], layers = { 3 = "window:64" } }

[train]
steps = 20
learning_rate = 1
precision = "bfloat16"

[run]
out = "somewhere"
"""


def test_a_file_becomes_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    config = read_config(path, ["train.steps=30", "data.packed=false", "run.device=cpu"])
    assert config.data.include == ("*.md", "*.txt") and config.data.vocabulary == 1000 and not config.data.packed
    assert config.model.recipe == Recipe(Local(2) | Stride(4), dense_layers=[0, 5], layers={3: Window(64)})
    assert (config.train.steps, config.train.learning_rate, config.train.precision) == (30, 1.0, "bfloat16")
    assert (config.run.out, config.run.device) == ("somewhere", "cpu")


def test_recipes_come_from_presets_expressions_and_files(tmp_path: Path) -> None:
    recipe = Recipe(Window(32), dense_layers=[1])
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert read_config(None, [f"model.recipe={tmp_path / 'recipe.json'}"]).model.recipe == recipe
    assert read_config(None, ["model.recipe=dense"]).model.recipe == Recipe(Dense())
    assert read_config(None).model.recipe == JobConfig().model.recipe


def test_where_a_run_takes_place_is_no_part_of_what_decides_it() -> None:
    plain = read_config(None)
    assert read_config(None, ["run.out=elsewhere", "run.keep=5"]).facts() == plain.facts()
    assert read_config(None, ["train.seed=1"]).facts() != plain.facts()
    assert plain.with_vocabulary(999).facts() == plain.facts()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("train.stepz=3", ValueError, "train must hold nothing but .*steps.*; got 'stepz'"),
        ("traim.steps=3", ValueError, "CONFIG must hold the tables data, model, train, run and no others; got 'traim'"),
        ("steps=3", ValueError, "--set must be TABLE.NAME=VALUE, such as train.steps=20; got 'steps=3'"),
        ("train.steps=many", TypeError, "train.steps must be of type int; got str"),
        ("train.steps=true", TypeError, "train.steps must be of type int; got bool"),
        ("train.compile=1", TypeError, "train.compile must be of type bool; got int"),
        ("train.steps=0", ValueError, "steps must be an integer >= 1; got 0"),
        ("train.precision=float16", ValueError, "precision must be one of float32, bfloat16; got 'float16'"),
        ("train.clip=0", ValueError, "clip must be positive; got 0.0"),
        ("train.weight_decay=-1", ValueError, "weight_decay must not be negative; got -1.0"),
        ("data.tokenizer=words", ValueError, "data.tokenizer must be one of bytes, bpe; got 'words'"),
        ("data.include=[1]", ValueError, r"data.include must be a list of texts; got \[1\]"),
        ("run.keep=0", ValueError, "run.keep must be an integer >= 1; got 0"),
        ("model.vocabulary=9", ValueError, "model.vocabulary must be left out; .* got 9"),
        ("model.recipe=nonsense", ValueError, "model.recipe must be a preset .*; got 'nonsense'"),
        ("model.recipe={layers={0='dense'}}", ValueError, "model.recipe must be a text, or a table with default, .*"),
        ("model.recipe={default=3}", TypeError, "model.recipe.default must be a text; got int"),
        ("model.recipe=gone.json", ValueError, "model.recipe must name a JSON file that exists; got 'gone.json'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(change: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_config(None, [change])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{default='local:2', dense_layers=[4]}", "s2_attention must name layers below 4, those of this model; got layer 4"),
        ("{default='local:2', layers={7='dense'}}", "s2_attention must name layers below 4, those of this model; got layer 7"),
    ],
)
def test_a_recipe_for_more_layers_than_the_model_has_is_refused(recipe: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(None, [f"model.recipe={recipe}"])


def test_a_recipe_for_more_heads_than_the_model_has_is_refused(tmp_path: Path) -> None:
    from s2attn import PerHead

    (tmp_path / "recipe.json").write_text(Recipe(PerHead({9: Dense()}, default=Window(8))).to_json())
    with pytest.raises(ValueError, match="s2_attention: layer 0 does not fit 8 heads over 4 KV heads: "):
        read_config(None, [f"model.recipe={tmp_path / 'recipe.json'}"])


def test_a_file_that_is_missing_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CONFIG must name a TOML file that exists; got "):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[train\nsteps = 3")
    with pytest.raises(ValueError, match=r"CONFIG must be TOML; got .*bad\.toml: "):
        read_config(tmp_path / "bad.toml")


def test_the_file_on_the_page_names_every_value_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/train.md").read_text()
    tables = tomllib.loads(page.split("```toml")[1].split("```")[0])
    shown, plain = config_of(tables), JobConfig()
    told = {name: set(table) for name, table in tables.items()}
    left_out = {"model": {"vocabulary"}, "data": {"max_files"}, "train": {"compile_backend"}, "run": set()}
    for name, table in told.items():
        assert table | left_out[name] == {entry.name for entry in fields(getattr(plain, name))}
    assert shown.train == plain.train and shown.run == plain.run
    assert replace(shown.model, recipe=plain.model.recipe) == plain.model
