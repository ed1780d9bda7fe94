"""The commands of the experiments: the demo goes all the way, and what cannot be done is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from experiments.cli.app import app
from experiments.cli.screen import Screen
from experiments.model import LanguageModel, ModelConfig
from experiments.train import save_model
from s2attn.cli.screen import console


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(words))


def error_of(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_no_steps_are_one_line() -> None:
    assert error_of("demo", "--steps", "0") == "s2attn: steps must be an integer >= 1; got 0"


def test_the_quick_demo_goes_all_the_way(tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = run("demo", "--quick", "--out", str(out), "--seed", "1")
    assert result.exit_code == 0, result.output
    assert "none of its numbers means anything" in result.stdout
    page = (out / "report.md").read_text()
    assert "**Quick run with tiny sizes" in page
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    assert {"pattern.png", "losses.png", "times.png", "memory.png"} <= {path.name for path in out.iterdir()}
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["quick"] and results["settings"]["seed"] == 1
    assert results["checkpoint"]["equal_logits"] and results["generation"]["cache_error"] <= results["generation"]["cache_tolerance"]
    assert 0 < results["generation"]["cache_most_bytes"] < results["generation"]["cache_dense_bytes"]
    assert [run["name"] for run in results["runs"]] == ["dense", "s2"]
    assert {row["seqlen"] for row in results["attention"]["rows"]} == {256, 512}
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in event for event in events) == 2 * results["settings"]["train"]["steps"]


def test_a_full_disk_or_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("here already")
    assert "File exists" in error_of("demo", "--quick", "--out", str(path))


def test_progress_can_be_advanced_before_it_begins_and_ended_twice() -> None:
    screen = Screen(console())
    screen.advance("early")
    screen.begin(2, "steps")
    screen.advance("half")
    screen.end()
    screen.end()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(LanguageModel(ModelConfig(layers=2, width=32, heads=2, kv_heads=1, hidden=32)), folder)
    return folder


def test_generate_writes_and_goes_on_from_its_cache(trained: Path, tmp_path: Path) -> None:
    words = ["generate", str(trained), "--temperature", "1.0", "--seed", "4"]
    whole = run(*words, "--prompt", "def f(x):", "--count", "40")
    assert whole.exit_code == 0, whole.output
    assert re.search(r"40 bytes in [\d.]+ s; the cache never held more than \d+ kB", whole.stderr)
    file, cache = tmp_path / "prompt.txt", str(tmp_path / "cache.pt")
    file.write_text("def f(x):")
    first = run(*words, "--file", str(file), "--count", "25", "--save", cache, "--room", "60", "--chunk", "4")
    second = run(*words, "--resume", cache, "--count", "15")
    ascii_of = lambda text: "".join(letter for letter in text if letter.isascii() and letter != "\n")  # noqa: E731
    assert len(ascii_of(whole.stdout)) > 5  # a character that is cut in two is shown as two broken ones
    assert ascii_of(first.stdout) + ascii_of(second.stdout) == ascii_of(whole.stdout)


def test_generate_takes_more_text_behind_a_cache_and_stops_where_it_shall(trained: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.pt")
    assert run("generate", str(trained), "--prompt", "one ", "--count", "3", "--save", cache, "--room", "400").exit_code == 0
    result = run("generate", str(trained), "--prompt", "two ", "--resume", cache, "--count", "300", "--temperature", "2", "--stop", "eat")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n")[-1] in "eat" and not set(result.stdout.rstrip("\n")[:-1]) & set("eat")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "s2attn: --prompt must hold something, or --file or --resume be given; got nothing"),
        (["--prompt", "a", "--file", "b"], "s2attn: --prompt and --file must not be given together; got 'a' and b"),
        (["--prompt", "a", "--count", "0"], "s2attn: max_new_tokens must be an integer >= 1; got 0"),
        (["--prompt", "a", "--chunk", "0"], "s2attn: chunk must be an integer >= 1; got 0"),
        (["--prompt", "a", "--stop", "\u00e4"], "s2attn: --stop must hold characters of one byte each; got '\u00e4'"),
        (["--resume", "nothing.pt"], "s2attn: [Errno 2] No such file or directory: 'nothing.pt'"),
    ],
)
def test_what_generate_cannot_do_is_one_line(trained: Path, words: list[str], message: str) -> None:
    assert error_of("generate", str(trained), *words).startswith(message)


def test_generate_says_when_pieces_are_too_large_for_a_saved_cache(trained: Path, tmp_path: Path) -> None:
    from experiments.model import LanguageModel, ModelConfig
    from experiments.train import save_model
    from s2attn import Local, Recipe

    config = ModelConfig(layers=1, width=32, heads=2, kv_heads=1, hidden=32, recipe=Recipe(Local(2, block=16)))
    save_model(LanguageModel(config), tmp_path / "local")
    words, cache = ["generate", str(tmp_path / "local"), "--count", "2"], str(tmp_path / "cache.pt")
    assert run(*words, "--prompt", "a", "--save", cache, "--room", "400", "--chunk", "16").exit_code == 0
    said = error_of(*words, "--prompt", 200 * "b", "--resume", cache)
    assert said.startswith("s2attn: --chunk must not be larger than when the cache was made; got 512: the cache is full")
    assert run(*words, "--prompt", 200 * "b", "--resume", cache, "--chunk", "16").exit_code == 0


def test_generate_needs_a_checkpoint(tmp_path: Path) -> None:
    assert error_of("generate", str(tmp_path), "--prompt", "a").startswith("s2attn: folder must hold config.json and weights.pt; got ")
