"""`s2attn compare` and `s2attn suggest` on saved models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from s2attn import Dense, Recipe, Sink, Window, compare
from s2attn.cli.app import app
from s2attn.lab.model import LanguageModel, ModelConfig
from s2attn.lab.train import save_model

RECIPE = Recipe(Dense(), layers={1: Sink(4) | Window(32)})


def run(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(map(str, words)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a tiny model of Transformers, tokens and a recipe."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    (tmp_path / "tokens.json").write_text(json.dumps(torch.randint(64, (300,)).tolist()))
    (tmp_path / "recipe.json").write_text(RECIPE.to_json())
    return tmp_path


def test_compare_says_what_the_function_says(saved: Path) -> None:
    words = ["compare", saved, saved / "recipe.json", "--text", saved / "tokens.json", "--length", "140", "--texts", "2", "--last", "20"]
    found = json.loads(run(*words, "--json").stdout)
    tokens = torch.tensor(json.loads((saved / "tokens.json").read_text()))[:280].view(2, 140)
    expected = compare(LlamaForCausalLM.from_pretrained(saved).eval(), RECIPE, tokens, last=20)
    assert found == expected.to_dict()
    shown = run(*words)
    assert shown.exit_code == 0, shown.output
    assert expected.sentence() in shown.stdout and "Sink(n=4) | Window(n=32)" in shown.stdout


def test_compare_says_what_needs_training(saved: Path) -> None:
    shown = run("compare", saved, "local:1|stride:2", "--text", saved / "tokens.json", "--length", "200")
    assert shown.exit_code == 0, shown.output
    assert "NEEDS TRAINING: no head of any layer sees everything" in shown.stdout


def test_suggest_writes_a_recipe(saved: Path) -> None:
    out = saved / "found.json"
    words = ["--text", saved / "tokens.json", "--length", "150", "--budget", "1", "--sink", "4", "--window", "32", "--by", "layer"]
    shown = run("suggest", saved, *words, "--out", out)
    assert shown.exit_code == 0, shown.output
    assert "1 of 2 can be sparse" in shown.stdout
    patterns = [Recipe.from_json(out.read_text()).pattern(layer) for layer in range(2)]
    assert sorted(map(repr, patterns)) == ["Dense()", "Sink(n=4) | Window(n=32)"]


def test_a_model_of_the_demo_reads_bytes(tmp_path: Path) -> None:
    save_model(LanguageModel(ModelConfig(layers=2)), tmp_path)
    (tmp_path / "text.txt").write_text("a text of some length, " * 20)
    shown = run("compare", tmp_path, "sink:4|window:64", "--text", tmp_path / "text.txt", "--length", "200")
    assert shown.exit_code == 0, shown.output
    assert "199 predictions" in shown.stdout


def test_progress_is_on_stderr_alone(saved: Path) -> None:
    words = ["compare", saved, saved / "recipe.json", "--text", saved / "tokens.json", "--length", "140", "--json"]
    terminal = {"COLUMNS": "200", "TERM": "xterm", "TTY_COMPATIBLE": "1", "FORCE_COLOR": "1"}
    shown = CliRunner(env=terminal).invoke(app, list(map(str, words)))
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["predictions"] == 139
    assert "/2" in shown.stderr and "done" in shown.stderr


def test_suggest_looks_for_needles_with_the_tokenizer_of_the_folder(saved: Path) -> None:
    words = ["--text", saved / "tokens.json", "--length", "150", "--budget", "1", "--sink", "4", "--window", "32"]
    assert "no needles were looked for" in run("suggest", saved, *words).stdout
    tokenizer = Tokenizer(WordLevel({"[unknown]": 0, "key": 1}, unk_token="[unknown]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(saved)
    shown = run("suggest", saved, *words, "--depths", "2")
    assert shown.exit_code == 0, shown.output
    assert "of the text: " in shown.stdout and "of 2 found before" in shown.stdout
    assert "no needles were looked for" in run("suggest", saved, *words, "--depths", "0").stdout


def test_a_text_is_read_by_the_tokenizer_of_the_folder(saved: Path) -> None:
    words = {word: i for i, word in enumerate(["[unknown]", "one", "two", "three"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[unknown]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(saved)
    (saved / "text.txt").write_text("one two three two " * 30)
    found = run("compare", saved, "sink:4|window:64", "--text", saved / "text.txt", "--length", "120", "--json")
    expected = compare(LlamaForCausalLM.from_pretrained(saved).eval(), Recipe(Dense()), [1, 2, 3, 2] * 30)
    assert json.loads(found.stdout)["nll"] == expected.nll


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "none.txt"], "--text must name a file that exists; got none.txt"),
        (["--text", "tokens.json", "--length", "301"], "--text must hold 1 texts of 301 tokens; got 300 tokens"),
        (["--text", "recipe.json"], "--text must hold a list of tokens, where it is JSON; got dict"),
        (["--text", "text.txt"], "it holds no tokenizer; give the tokens as a JSON list"),
        (["--text", "tokens.json", "--length", "1"], "--length must be an integer >= 2; got 1"),
        (["--text", "tokens.json", "--length", "20"], "must name layers below 2, those of this model; got layer 3"),
    ],
)
def test_what_cannot_be_done_is_one_line(saved: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    (saved / "text.txt").write_text("words")
    (saved / "wrong.json").write_text(Recipe(Dense(), layers={3: Window(4)}).to_json())
    done = run("compare", saved, "wrong.json", *words)
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert message in done.stderr.strip().splitlines()[-1]  # Transformers may have shown its progress above


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("[1, 2, 3]")
    done = run("suggest", tmp_path, "--text", tmp_path / "tokens.json")
    assert done.exit_code == 2 and "MODEL must be a folder with a config.json" in done.stderr
