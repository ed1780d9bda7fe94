"""``python -m experiments generate --resume`` makes room: as ``--room`` says, and for the new text at least."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli.app import app
from experiments.model import LanguageModel, ModelConfig
from experiments.train import save_model
from s2attn import Dense, Power, Recipe, SparseCache


def checkpoint(folder: Path, recipe: Recipe) -> str:
    torch.manual_seed(0)
    save_model(LanguageModel(ModelConfig(layers=1, width=32, heads=2, kv_heads=1, hidden=32, recipe=recipe)), folder)
    return str(folder)


def generate(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["generate", *words, "--temperature", "0"])
    return result.exit_code, result.stdout, result.stderr


def test_a_saved_text_goes_on_beyond_the_room_of_its_file(tmp_path: Path) -> None:
    model, first, second = checkpoint(tmp_path / "model", Recipe(Dense())), str(tmp_path / "1.pt"), str(tmp_path / "2.pt")
    _, whole, _ = generate(model, "--prompt", "abc", "--count", "43")
    assert generate(model, "--prompt", "abc", "--count", "3", "--save", first)[0] == 0
    assert SparseCache.load(first).max_tokens == 6
    code, rest, said = generate(model, "--resume", first, "--count", "40", "--save", second, "--room", "700")
    assert code == 0, said
    assert whole.rstrip("\n").endswith(rest.rstrip("\n")[-8:])
    assert SparseCache.load(second).max_tokens == 700 and "kB allocated)" in said


def test_a_text_that_cannot_grow_is_told_by_the_name_of_the_option(tmp_path: Path) -> None:
    """Pages that no query of the short text read were never kept, and the longer text reads them."""
    model, cache = checkpoint(tmp_path / "model", Recipe(Power(block=16))), str(tmp_path / "1.pt")
    assert generate(model, "--prompt", 60 * "a", "--count", "8", "--save", cache)[0] == 0
    code, _, said = generate(model, "--resume", cache, "--count", "4", "--room", "900")
    assert code != 0
    assert said.startswith(f"s2attn: --room must be at most 68, for which {cache} was saved, since a longer text reads keys")


@pytest.mark.parametrize("content", [b"", b"PK"])
def test_a_file_that_is_cut_short_is_one_line(tmp_path: Path, content: bytes) -> None:
    model, cache = checkpoint(tmp_path / "model", Recipe(Dense())), tmp_path / "1.pt"
    assert generate(model, "--prompt", "abc", "--count", "3", "--save", str(cache))[0] == 0
    cache.write_bytes(content or cache.read_bytes()[:-200])
    code, _, said = generate(model, "--resume", str(cache), "--count", "4")
    assert code != 0 and said.startswith("s2attn: path must be a file that SparseCache.save wrote; got ") and said.count("\n") == 1
