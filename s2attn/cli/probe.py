"""``s2attn compare`` and ``s2attn suggest``: a saved model, a text, and what fewer keys would cost it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from s2attn.analysis.compare import NeedsTraining, Progress, compare
from s2attn.analysis.suggest import suggest
from s2attn.cli.screen import console, table
from s2attn.cli.show import read_what
from s2attn.core import Unsupported, bad_value, check_int, requires, write_text
from s2attn.core.files import read_json


@dataclass(frozen=True)
class Reading:
    """What the model reads: ``texts`` pieces of ``length`` tokens from a file, of which the ``last`` are predicted for judgement."""

    file: Path
    length: int
    texts: int
    last: int | None
    device: str


def show_comparison(folder: Path, recipe: str, reading: Reading, *, as_json: bool) -> None:
    """Print what a recipe does to a saved model."""
    chosen = read_what(recipe)
    model, tokens = opened(folder, reading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NeedsTraining)  # they are printed
        with shown_progress() as progress:
            found = compare(model, chosen, tokens, last=reading.last, progress=progress)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    screen = console()
    screen.print(found.sentence(), markup=False)
    for note in found.notes:
        screen.print(f"- {note}", style="yellow", markup=False)
    screen.print(table(found.lines(), right_from=2))


def show_suggestion(
    folder: Path, budget: float, reading: Reading, *, sink: int, window: int, by: str, depths: int, out: Path | None
) -> None:
    """Print which layers or heads of a saved model can be sparse, and perhaps write the recipe."""
    model, tokens = opened(folder, reading)
    how: dict[str, Any] = {"sink": sink, "window": window, "by": by, "last": reading.last}
    with shown_progress() as progress:
        found = suggest(model, tokens, budget, **how, tokenizer=tokenizer_of(folder), depths=depths, progress=progress)
    screen = console()
    screen.print(found.sentence(), markup=False)
    for note in found.notes():
        screen.print(f"- {note}", style="yellow", markup=False)
    screen.print(table(found.lines()))
    if out is not None:
        write_text(out, found.recipe.to_json())
        screen.print(f"Recipe: [bold]{out}[/bold]")


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A bar on stderr, which leaves stdout to the results."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("begins", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield progress


def opened(folder: Path, reading: Reading) -> tuple[Any, list[list[int]]]:
    """A model from its folder, on a device, and the texts in its tokens. Nothing is downloaded, and no code of the folder is run."""
    check_int("--length", reading.length, 2)
    check_int("--texts", reading.texts, 1)
    if not reading.file.is_file():
        raise bad_value("--text", "must name a file that exists", str(reading.file))
    if not (folder / "config.json").is_file():
        raise bad_value("MODEL", "must be a folder with a config.json", str(folder))
    tokens = pieces(read_tokens(folder, reading.file), reading)
    if _model_type(folder) == "phi3small":
        from s2attn.integrations.phi3small import Phi3Small

        model: Any = Phi3Small.from_folder(folder)
    else:
        with requires("this model cannot be loaded", "transformers", "transformers"):
            from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    return model.to(torch.device(reading.device)).eval(), tokens


def _model_type(folder: Path) -> Any:
    found = read_json(folder / "config.json", "MODEL", "must be a folder with a config.json in JSON")
    if not isinstance(found, dict):
        raise bad_value("MODEL", "must have a JSON object in config.json", type(found).__name__)
    return found.get("model_type")


def read_tokens(folder: Path, file: Path) -> list[int]:
    """The tokens of a file: a JSON list of numbers, or a text for the tokenizer of the folder."""
    if file.suffix == ".json":
        found = read_json(file, "--text")
        if not isinstance(found, list):
            raise bad_value("--text", "must hold a list of tokens, where it is JSON", type(found).__name__)
        return [check_int("--text", token, 0) for token in found]
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise Unsupported("this text cannot be read", {str(folder): ["it holds no tokenizer; give the tokens as a JSON list"]})
    return tokenizer(file.read_text(encoding="utf-8"))["input_ids"]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model of Transformers; None where the folder holds none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        return None
    with requires("this text cannot be read", "transformers", "transformers"):
        from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def pieces(tokens: Sequence[int], reading: Reading) -> list[list[int]]:
    """Texts from the beginning of a file, one behind the other."""
    needed = reading.length * reading.texts
    if len(tokens) < needed:
        raise bad_value("--text", f"must hold {reading.texts} texts of {reading.length} tokens", f"{len(tokens)} tokens")
    return [list(tokens[start : start + reading.length]) for start in range(0, needed, reading.length)]
