"""The command line: what it prints, and one clear line for what it cannot do."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import s2attn
from s2attn import cli
from s2attn.cli.app import app


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(words))


def error_of(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_show_prints_the_pattern_its_figures_and_a_drawing() -> None:
    result = run("show", "local:2|stride:4", "--heads", "8", "--kv-heads", "4", "--seqlen", "1024")
    assert result.exit_code == 0, result.output
    assert "Local(n=2, block=64) | Stride(stride=4" in result.stdout
    assert re.search(r"density\s+38\.54 % of the causal triangle", result.stdout)
    assert "KV head 3" in result.stdout and "██··██▒▒" in result.stdout


def test_show_counts_what_ranks_would_send() -> None:
    shown = run("show", "local:2|stride:4", "--seqlen", "4096", "--ranks", "4").stdout
    assert "4,096 tokens on 4 ranks" in shown and re.search(r"zigzag +1\.\d{3} +all-gather", shown)
    assert "seqlen must be a multiple of 3" in error_of("show", "s2", "--seqlen", "4096", "--ranks", "3")


@pytest.mark.parametrize(
    "name", ["s2", "phi3_small", "power_attention", "streaming_llm", "duo_attention", "longnet", "longformer", "bigbird"]
)
def test_show_takes_every_preset(name: str) -> None:
    result = run("show", name, "--seqlen", "8192", "--layers", "2")
    assert result.exit_code == 0, result.output
    assert "causal triangle" in result.stdout


def test_show_takes_files_of_patterns_and_recipes(tmp_path: Path) -> None:
    pattern, recipe = tmp_path / "pattern.json", tmp_path / "recipe.json"
    pattern.write_text(s2attn.Window(512).to_json())
    recipe.write_text(s2attn.Recipe(s2attn.Local(2), dense_layers=[0]).to_json())
    assert "Window(n=512)" in run("show", str(pattern), "--seqlen", "2048").stdout
    assert "Recipe(Local(n=2, block=64), dense_layers=[0])" in run("show", str(recipe), "--seqlen", "2048", "--layers", "2").stdout


def test_show_json_is_json_and_nothing_else() -> None:
    result = run("show", "local:2|stride:4", "--seqlen", "2048", "--json")
    found = json.loads(result.stdout)
    assert s2attn.Pattern.from_json(json.dumps(found["spec"])) == s2attn.parse_pattern("local:2|stride:4")
    assert 0 < found["report"]["density"] < 1 and found["png"] is None


def test_show_draws_a_png(tmp_path: Path) -> None:
    path = tmp_path / "s2.png"
    result = run("show", "s2", "--heads", "4", "--png", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_show_draws_heads_that_differ_of_the_layer_that_is_asked_for() -> None:
    dense, sparse = (run("show", "phi3_small", "--seqlen", "4096", "--layers", "2", "--layer", layer).stdout for layer in "10")
    assert "heads 0, 1, ... 7" in dense and "layer 1; █ all" in dense
    assert sparse.count("─ head") > 1 and "layer 0; █ all" in sparse


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "s3"], "s2attn: WHAT must be a preset (s2, phi3_small, "),
        (["show", "locl:16|stride:8"], "s2attn: pattern name must be one of "),
        (["show", "local:16|"], "s2attn: pattern must have a pattern on both sides of | and &; got 'local:16|'"),
        (["show", "nothing.json"], "s2attn: WHAT must name a JSON file that exists; got 'nothing.json'"),
        (["show", "s2", "--heads", "8", "--kv-heads", "3"], "s2attn: "),
        (["show", "s2", "--seqlen", "0"], "s2attn: seqlen must be "),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], message: str) -> None:
    assert error_of(*words).startswith(message)


def test_malformed_json_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{not json")
    assert error_of("show", str(path)).startswith("s2attn: pattern must be JSON; got ")


def test_doctor_names_versions_devices_and_backends() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "triton", "cpu", "reference", "yes"):
        assert word in result.stdout


def test_doctor_json_has_a_reason_list_for_every_backend_and_device() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["backends"]["torch"]["cpu"] == []
    assert set(found["hardware"]) == set(found["devices"])


def test_doctor_reports_a_backend_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2attn.cli import doctor

    monkeypatch.setattr(doctor, "backend_names", lambda: ["broken"])
    monkeypatch.setattr(doctor, "get_backend", lambda name: 1 / 0)
    assert "ZeroDivisionError: division by zero" in run("doctor").stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_there_is_a_hint(missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "s2attn.cli.app":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == f's2attn: the command line needs {missing}; install it with: pip install "s2attn[cli]"'


def test_another_missing_module_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "s2attn.cli.app":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        cli.main()
