"""`python -m experiments ablate` on the command line: it runs, goes on, plans, and refuses in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from experiments.ablate_settings import AblateSettings
from experiments.cli.ablate import settings_of
from experiments.cli.app import app

QUICK = ("ablate", "--size", "tiny", "--steps", "2", "--task-steps", "2", "--recipes", "dense,s2")


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(words))


def test_a_tiny_ablation_runs_ends_early_goes_on_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "ablation"
    short = run(*QUICK, "--seeds", "1", "--limit", "1e-9", "--out", str(out))
    assert short.exit_code == 0 and "2 runs are open; the same command goes on with them" in short.stdout
    assert "Not finished: 2 of 2 runs are open" in (out / "report.md").read_text()
    result = run(*QUICK, "--seeds", "1", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "none of its numbers means anything" in result.stdout and "runs are open" not in result.stdout
    assert re.search(r"s2 +60\.1 % +\d\.\d{3} +[+-]\d+\.\d\d", result.stdout)
    found = json.loads((out / "record.json").read_text())
    assert [(one["name"], one["seed"]) for one in found["runs"]] == [("dense", 0), ("s2", 0)] and found["open"] == []
    assert found["runs"][0]["host"]["torch"] and found["runs"][1]["memory"]["step_bytes"] > 0
    again = run(*QUICK, "--seeds", "1", "--out", str(out))
    assert "s2, seed 0" not in again.stdout and "Results" in again.stdout


def test_a_plan_prints_pairs_and_runs_nothing(tmp_path: Path) -> None:
    result = run("ablate", "--plan", "--recipes", "dense,s2+1", "--budget", "0.4", "--out", str(tmp_path / "none"))
    assert result.exit_code == 0, result.output
    assert "reference" in result.stdout and "dense_layers=[0]" in result.stdout and "6 runs" in result.stdout
    assert not (tmp_path / "none").exists()


def test_options_change_the_settings_and_nothing_else() -> None:
    usual = AblateSettings.of("small")
    assert settings_of("small", recipes="", tasks=None, seeds=None, budget=None, stretch=None) == usual
    made = settings_of("small", recipes="s2, power", tasks="copy", seeds=2, budget=0.2, stretch="ntk").with_steps(80, 90)
    assert (made.recipes, made.tasks.names, made.seeds, made.budget) == (("s2", "power"), ("copy",), (0, 1), 0.2)
    assert (made.tasks.stretch, made.text.steps, made.tasks.train.steps) == ("ntk", 80, 90)
    assert settings_of("small", recipes="", tasks="", seeds=None, budget=None, stretch=None).tasks.names == ()


@pytest.mark.parametrize(("words", "said"), [(["--steps", "0"], "0 tokens of text and 512 of tasks"), (["--tasks", ""], "and 0 of tasks")])
def test_the_plan_counts_what_will_be_read(words: list[str], said: str) -> None:
    result = run(*QUICK, "--plan", *words)
    assert result.exit_code == 0 and said in result.stdout, result.output


def test_a_size_for_a_card_is_refused_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("ablate", "--size", "large", "--out", str(tmp_path / "none"))
    assert result.exit_code == 2 and result.stderr.startswith("s2attn: device must be a device of this machine"), result.output
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "huge"], "s2attn: size must be one of tiny, small, large; got 'huge'"),
        (["--recipes", "chess"], "s2attn: recipes must be among dense, window"),
        (["--tasks", "chess"], "s2attn: task must be one of passkey, needle, recall, copy, tracking; got 'chess'"),
        (["--seeds", "0"], "s2attn: --seeds must be an integer >= 1; got 0"),
        (["--budget", "1.5", "--plan"], "s2attn: budget must be above 0 and below 1; got 1.5"),
        (["--steps", "-1"], "s2attn: steps must be an integer >= 0; got -1"),
        (["--stretch", "yarn"], "s2attn: Stretch method must be one of interpolation, ntk; got 'yarn'"),
        (["--device", "tpu"], "s2attn: device must be one of cpu, cuda; got 'tpu'"),
        (["--precision", "float8"], "s2attn: precision must be one of float32, bfloat16; got 'float8'"),
        (["--limit", "0"], "s2attn: limit must be a positive number of seconds; got 0.0"),
    ],
)
def test_bad_options_are_refused_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    result = run("ablate", *words, "--out", str(tmp_path / "none"))
    assert result.exit_code == 2 and result.stderr.startswith(message), result.output
    assert len(result.stderr.strip().splitlines()) == 1 and not (tmp_path / "none").exists()
