"""The configuration of `s2attn train`: a TOML file, checked before any work, with every value in it accounted for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from typing import Any

from s2attn.core import StrPath, as_path, bad_kind, bad_value, check_int
from s2attn.integrations.spec import read_spec
from s2attn.lab.model import ModelConfig
from s2attn.lab.train import TrainConfig
from s2attn.lab.words import read_what
from s2attn.patterns import Local, Pattern, Recipe, Stride

tomllib: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

TOKENIZERS = ("bytes", "bpe")
RECIPE = Recipe(Local(2) | Stride(4), dense_layers=[0])


@dataclass(frozen=True)
class DataConfig:
    """What is read; see `read_documents` and `Rows` for the meaning of the values.

    Attributes:
        tokenizer: "bytes", or "bpe": byte pairs learned from the training text, ``vocabulary`` of them at most.
        packed: documents in a row see nothing of each other.
    """

    source: str = "stdlib"
    include: tuple[str, ...] = ("*",)
    split: str = "package"
    percent: int = 5
    max_files: int | None = None
    tokenizer: str = "bytes"
    vocabulary: int = 4096
    packed: bool = True

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise bad_value("data.tokenizer", f"must be one of {', '.join(TOKENIZERS)}", repr(self.tokenizer))
        check_int("data.vocabulary", self.vocabulary, 1)
        if self.max_files is not None:
            check_int("data.max_files", self.max_files, 1)


@dataclass(frozen=True)
class RunConfig:
    """What changes nothing in the result: where it runs and what it leaves.

    Attributes:
        out: folder for metrics and checkpoints.
        device: "auto", "cpu" or "cuda".
        save_every: steps between checkpoints; the last step is always saved.
        keep: checkpoints that stay, the newest ones.
    """

    out: str = "train-out"
    device: str = "auto"
    save_every: int = 50
    keep: int = 2

    def __post_init__(self) -> None:
        check_int("run.save_every", self.save_every, 1)
        check_int("run.keep", self.keep, 1)


@dataclass(frozen=True)
class JobConfig:
    """Everything about a run.

    >>> JobConfig().train.steps
    150
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(recipe=RECIPE))
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        model = self.model
        read_spec(model.recipe, num_layers=model.layers, num_heads=model.heads, num_kv_heads=model.kv_heads)

    def facts(self) -> dict[str, Any]:
        """What decides the result, as plain values: all of it but ``run`` and the number of tokens that came of the text."""
        model = json.loads(self.model.to_json())
        del model["vocabulary"]
        return json.loads(json.dumps({"data": asdict(self.data), "model": model, "train": asdict(self.train)}))

    def with_vocabulary(self, size: int) -> JobConfig:
        return replace(self, model=replace(self.model, vocabulary=size))


def read_config(path: StrPath | None, changes: Sequence[str] = ()) -> JobConfig:
    """The configuration in a file, with changes.

    Args:
        path: a TOML file with the tables ``data``, ``model``, ``train`` and ``run``; the defaults when left out.
        changes: such as ``train.steps=20``; the value is TOML, or a text where it is not.

    Raises:
        ValueError, TypeError: no such file, not TOML, a name that does not exist, a value that does not fit.

    >>> read_config(None, ["train.steps=20", "model.recipe=sink:4|window:64"]).model.recipe
    Recipe(Sink(n=4) | Window(n=64))
    """
    path = None if path is None else as_path("path", path)
    tables: dict[str, Any] = {} if path is None else read_toml(path)
    for change in changes:
        name, equals, text = change.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise bad_value("--set", "must be TABLE.NAME=VALUE, such as train.steps=20", repr(change))
        inside = tables.setdefault(table, {})
        if not isinstance(inside, dict):
            raise bad_kind(table, "must be a table", inside)
        inside[key] = toml_value(text.strip())
    return config_of(tables)


def read_toml(path: StrPath) -> dict[str, Any]:
    """The tables of a TOML file."""
    path = as_path("path", path)
    if not path.is_file():
        raise bad_value("CONFIG", "must name a TOML file that exists", repr(str(path)))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise bad_value("CONFIG", "must be TOML", f"{path}: {error}") from None


def toml_value(text: str) -> Any:
    """A value in TOML's words; anything else is a text.

    >>> toml_value("1e-3"), toml_value("[0, 2]"), toml_value("local:2|stride:4")
    (0.001, [0, 2], 'local:2|stride:4')
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def config_of(tables: Mapping[str, Any]) -> JobConfig:
    """The configuration of TOML's tables.

    Raises:
        ValueError, TypeError: with the name of the value and what it must be.
    """
    known: dict[str, Any] = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig, "run": RunConfig}
    for name, table in tables.items():
        if name not in known:
            raise bad_value("CONFIG", f"must hold the tables {', '.join(known)} and no others", repr(name))
        if not isinstance(table, Mapping):
            raise bad_kind(name, "must be a table", table)
    made: dict[str, Any] = {}
    for name, kind in known.items():
        values = dict(tables.get(name, {}))
        if name == "model":
            if "vocabulary" in values:
                raise bad_value("model.vocabulary", "must be left out; data.tokenizer and data.vocabulary decide it", values["vocabulary"])
            values["recipe"] = recipe_of(values.get("recipe"))
        made[name] = kind(**checked(name, kind, values))
    return JobConfig(**made)


def checked(table: str, kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values for a dataclass, each of the type of its default."""
    known = {entry.name: entry for entry in fields(kind)}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise bad_value(table, f"must hold nothing but {', '.join(sorted(known))}", repr(name))
        rule = str(known[name].type).split(" | ")[0]
        if rule == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if rule.startswith("tuple"):
            texts = [value] if isinstance(value, str) else value
            if not (isinstance(texts, list) and texts and all(isinstance(part, str) for part in texts)):
                raise bad_value(f"{table}.{name}", "must be a list of texts", value)
            value = tuple(texts)
        wanted = {"int": int, "float": float, "str": str, "bool": bool}.get(rule, object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise bad_kind(f"{table}.{name}", f"must be of type {rule}", value)
        found[name] = value
    return found


def recipe_of(value: Any) -> Recipe:
    """A recipe in the words of a configuration: a preset, an expression, a JSON file, or a table with one of them as ``default``.

    >>> recipe_of({"default": "local:2|stride:4", "dense_layers": [0], "layers": {"3": "window:64"}}).pattern(3)
    Window(n=64)
    """
    if value is None:
        return RECIPE
    if isinstance(value, str):
        found = read_what(value, "model.recipe")
        return found if isinstance(found, Recipe) else Recipe(found)
    known = ("default", "dense_layers", "layers", "dense_every")
    if not isinstance(value, Mapping) or "default" not in value or set(value) - set(known):
        raise bad_value("model.recipe", f"must be a text, or a table with {', '.join(known)}, of which default must be there", value)
    layers = value.get("layers", {})
    if not isinstance(layers, Mapping) or not all(str(layer).isdecimal() for layer in layers):
        raise bad_value("model.recipe.layers", "must map layer numbers to patterns", layers)
    own = {int(layer): single(f"model.recipe.layers.{layer}", text) for layer, text in layers.items()}
    return Recipe(single("model.recipe.default", value["default"]), value.get("dense_layers", ()), own, value.get("dense_every"))


def single(name: str, text: Any) -> Pattern:
    """The one pattern that a text names."""
    if not isinstance(text, str):
        raise bad_kind(name, "must be a text", text)
    found = read_what(text, name)
    if isinstance(found, Recipe):
        raise bad_value(name, "must name a pattern, not a recipe", repr(text))
    return found
