"""``python -m benchmarks``: records are written, compared and reported, and what cannot be done is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import session
from benchmarks.__main__ import main
from benchmarks.report import RECORDS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cpu", "--lengths", "4k"], "s2attn: --lengths must be positive numbers separated by commas; got '4k'"),
        (["cpu", "--peers", "s2attn,fa9"], "s2attn: --peers must be some of s2attn, sdpa, flex, separated by commas; got 's2attn,fa9'"),
        (
            ["run", "sleep"],
            "s2attn: suites must be some of forward, backward, train, prefill, decode, inference, select, hyper; got 'sleep'",
        ),
        (["compare", "nothing.json"], "s2attn: [Errno 2] No such file or directory: 'nothing.json'"),
        (["cpu", "--out", "."], "s2attn: --out must name a file; got ."),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.strip() == message


def test_cpu_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    assert main(["cpu", "--quick", "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "ciency" in said and "Layout of 4,096 tokens" in said
    assert json.loads(path.read_text())["suite"] == "quick"


def test_run_makes_a_plan_of_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[session.Plan] = []
    monkeypatch.setattr(session, "run_plan", lambda plan: plans.append(plan) or [])
    words = ["--size", "tiny", "--peers", "s2attn,mine", "--peer-path", "mine=a.py", "--limit", "7", "--cases", "dense", "--seed", "3"]
    assert main(["run", "forward", "train", *words, "--out", str(tmp_path), "--backend", "reference", "--commit", "abc"]) == 0
    paths = {"mine": "a.py"}
    expected = session.Plan(str(tmp_path), ("forward", "train"), "tiny", ("s2attn", "mine"), paths, "reference", 7.0, 3, "dense", "abc")
    assert plans == [expected]


def test_compare_and_report_read_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = str(RECORDS / "cpu-two-cores.json")
    assert main(["compare", record, record, "--plot", str(tmp_path / "speed.png")]) == 0
    assert "cpu-two-cores: cpu on " in capsys.readouterr().out
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", "--records", str(RECORDS), "--out", str(tmp_path / "page.md")]) == 0
    assert "## Where we lose" in (tmp_path / "page.md").read_text()
