"""`python -m experiments reach` on the command line: it runs, ends early, goes on, plans, and refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from experiments.cli.app import app
from experiments.cli.reach import settings_of
from experiments.reach_study_settings import ReachSettings

QUICK = ("reach", "--size", "tiny", "--steps", "2", "--patterns", "window,s2")


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(words))


def test_a_tiny_study_ends_early_goes_on_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "reach"
    short = run(*QUICK, "--limit", "1e-9", "--out", str(out))
    assert short.exit_code == 0 and "4 runs are open; the same command goes on with them" in short.stdout
    assert "Not finished: 4 of 4 runs are open" in (out / "report.md").read_text()
    result = run(*QUICK, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "none of its numbers means anything" in result.stdout and "runs are open" not in result.stdout
    assert "Reachable and learned" in result.stdout and "By hops" in result.stdout
    found = json.loads((out / "record.json").read_text())
    assert [one["name"] for one in found["summary"]] == [f"{name}-layers{n}-seed0" for name in ("window", "s2") for n in (1, 2)]
    assert found["open"] == [] and found["host"][0]["torch"] and found["kind"] == "reach"
    again = run(*QUICK, "--out", str(out))
    assert "s2, 1 layer" not in again.stdout and "Reachable and learned" in again.stdout


def test_a_plan_runs_nothing(tmp_path: Path) -> None:
    result = run("reach", "--plan", "--patterns", "window,dilated", "--out", str(tmp_path / "none"))
    assert result.exit_code == 0, result.output
    assert "1, 2, 4, 6" in result.stdout and "6 runs, each of 819,200 tokens up to length 512" in result.stdout
    assert not (tmp_path / "none").exists()


def test_options_change_the_settings_and_nothing_else() -> None:
    assert settings_of("small", patterns="", seeds=None, steps=None) == ReachSettings.of("small")
    made = settings_of("small", patterns="s2, power", seeds=2, steps=80)
    assert (made.patterns, made.seeds, made.train.steps, made.train.warmup) == (("s2", "power"), (0, 1), 80, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "huge"], "s2attn: size must be one of tiny, small; got 'huge'"),
        (["--patterns", "chess"], "s2attn: patterns must be among window, power, stride, s2, dilated, longnet, dense; got 'chess'"),
        (["--seeds", "0"], "s2attn: --seeds must be an integer >= 1; got 0"),
        (["--steps", "0"], "s2attn: steps must be an integer >= 1; got 0"),
        (["--limit", "0"], "s2attn: limit must be a positive number of seconds; got 0.0"),
    ],
)
def test_bad_options_are_refused_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    result = run("reach", *words, "--out", str(tmp_path / "none"))
    assert result.exit_code == 2 and result.stderr.startswith(message), result.output
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "none").exists()


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    assert run(*QUICK, "--patterns", "dense", "--out", str(tmp_path)).exit_code == 0
    result = run("reach", "--size", "tiny", "--patterns", "dense", "--out", str(tmp_path))
    assert result.exit_code == 2 and result.stderr.startswith("s2attn: out must be a folder of the same settings; train differ")
