"""``s2attn train`` and what reads its checkpoints: a run to its table, and one clear line for what it cannot do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from s2attn.cli.app import app

CONFIG = """
[data]
source = {source}
split = "tail"
percent = 20
tokenizer = "bpe"
vocabulary = 300

[model]
layers = 2
width = 32
heads = 2
kv_heads = 1
hidden = 32
recipe = {{ default = "local:2,block=16|stride:2,block=16", dense_layers = [0] }}

[train]
steps = 3
context = 48
warmup = 1
eval_every = 3
eval_windows = 2

[run]
device = "cpu"
"""


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(words))


def error_of(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text("def read(path):\n    return open(path).read()\n" * 30)
    (folder / "run.toml").write_text(CONFIG.format(source=json.dumps(str(folder / "texts"))))
    return folder / "run.toml"


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    result = run("train", str(config), "--out", str(config.parent / "out"), "--set", "run.save_every=2")
    assert result.exit_code == 0, result.output
    for words in (r"steps\s+3\n", r"tokens read\s+288\n", r"bits per byte\s+\d", "step      3   validation loss"):
        assert re.search(words, result.stdout), result.stdout
    return config.parent / "out" / "checkpoints" / "step-00000003"


def test_a_checkpoint_of_byte_pairs_writes_on_and_goes_on_from_its_cache(trained: Path, tmp_path: Path) -> None:
    words = ["generate", str(trained), "--temperature", "0"]
    whole = run(*words, "--prompt", "def read(path):", "--count", "12")
    assert whole.exit_code == 0, whole.output
    assert re.search(r"12 tokens in [\d.]+ s; the cache never held more than", whole.stderr)
    cache = str(tmp_path / "cache.pt")
    first = run(*words, "--prompt", "def read(path):", "--count", "8", "--save", cache, "--room", "60")
    second = run(*words, "--resume", cache, "--count", "4")
    plain = [result.stdout.replace("\n", "") for result in (whole, first, second)]
    assert plain[1] + plain[2] == plain[0]
    assert (
        error_of(*words, "--prompt", "a", "--stop", "x") == "s2attn: --stop must be left out with a model of byte pairs; got 1 characters"
    )


def test_selectors_are_judged_on_the_tokens_of_the_model(trained: Path, config: Path) -> None:
    text = str(config.parent / "texts" / "one.txt")
    result = run("recall", "--checkpoint", str(trained), "--text", text, "--seqlen", "64", "--block", "16", "--thresholds", "0.9")
    assert result.exit_code == 0, result.output
    assert "layer 1" in result.stdout


def test_a_run_is_resumed_and_never_written_over(trained: Path, config: Path) -> None:
    words = ["train", str(config), "--out", str(trained.parents[1]), "--set", "run.save_every=2"]
    assert error_of(*words).startswith("s2attn: run.out must be a folder without checkpoints, or be resumed (--resume); got ")
    assert error_of(*words, "--resume", "--compile").endswith("train.compile is True here and False there")
    again = run(*words, "--resume")
    assert again.exit_code == 0 and "0 steps" in again.stdout, again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.toml"], "s2attn: CONFIG must name a TOML file that exists; got 'missing.toml'"),
        (["--set", "data.source=nowhere"], "s2attn: data.source must be a folder, or one of stdlib, installed; got 'nowhere'"),
        (["--set", "run.device=tpu"], "s2attn: run.device must be auto, cpu or cuda; got 'tpu'"),
    ],
)
def test_what_train_cannot_do_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    assert error_of("train", *words, "--out", str(tmp_path / "out")) == message
