"""The suite `select`: its cases, what it checks before it times, and a tiny run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import selecting
from benchmarks.compared import compare_text
from benchmarks.record_tables import crossovers, record_text
from benchmarks.report import report_page, targets_table
from benchmarks.runner import run_suite
from benchmarks.selecting import Selecting, SelectOracle, run_select_case, select_suite
from experiments.recall import recall
from s2attn.selectors import Call, MassSelector, MeanPool, XAttention
from s2attn.tuning.clock import Meter
from s2attn.tuning.rows import Effort

FAST = Effort(rounds=1, min_rounds=1, budget_s=0.1)
TINY = select_suite(size="tiny")


def test_full_cases_are_those_that_were_promised() -> None:
    cases = select_suite()
    assert len({case.name for case in cases}) == len(cases)
    for kind in ([case for case in cases if case.stride == 8], [case for case in cases if isinstance(case.selector, MeanPool)]):
        assert {case.seqlen for case in kind} == {8192, 16384, 32768, 65536, 131072}
    assert {case.stride for case in cases} == {8, 16, None} and {case.structure for case in cases} == {"slashes", "verticals"}
    small = select_suite(size="small")
    for stride in (8, 16):
        assert {case.seqlen for case in small if case.stride == stride and case.structure == "slashes"} == {4096, 8192, 16384, 32768}
    for case in [*cases, *small, *TINY]:
        assert json.loads(json.dumps(case.facts())) == case.facts()
    assert TINY[0].roofline(0.25) == pytest.approx(1 / (0.25 + 1 / 16)) and TINY[-1].roofline(0.25) == 4
    with pytest.raises(ValueError, match=r"seqlen must be a multiple of the selector's block \(32\); got 100"):
        replace(TINY[0], seqlen=100)


def test_the_tiny_suite_runs_on_a_cpu_and_can_be_read() -> None:
    record = run_suite("select", TINY, effort=FAST)
    assert all(row["status"] == "ok" for row in record["rows"]), record["rows"]
    for ours, dense in zip(record["rows"][::2], record["rows"][1::2], strict=True):
        assert (ours["peer"], dense["peer"], dense["density"]) == ("s2attn", "sdpa", 1.0)
        assert min(ours["score_s"], ours["select_s"], ours["attention_s"]) > 0
        assert 0.7 < ours["kept_worst"] <= ours["kept"] <= ours["kept_most"] <= 1 and ours["score_error"] < 1e-5
        assert ours["of_roofline"] == pytest.approx(ours["speedup"]["sdpa"] / ours["roofline"])
        assert ("choosing_over_product" in ours) == (ours["stride"] is not None)
    text = record_text(record)
    assert "faster from" in text and len(crossovers(record["rows"])) == 2
    assert "### Blocks chosen from q and k" in report_page({"tiny": record}) and "tiny 256, mean pool" in compare_text({"tiny": record})
    assert "same on a CPU | >= 80 % of 1 / (density + 1 / (2 stride)) | not measured" not in targets_table({"tiny": record})


def test_what_is_kept_is_what_the_lab_says() -> None:
    """All rows of all heads, in float64 here and in the lab's own way there."""
    case = TINY[0]
    run = Selecting(case, Meter(), 0, None)
    run.oracle.heads, run.oracle.rows = list(range(case.heads)), list(range(case.seqlen // 32))
    _, mass, _ = run.parts()
    found = run.oracle.check_choice(mass[0], case.selector.choose(run.sample.q, run.sample.k, Call())[0])
    theirs = recall(case.selector, run.sample.q, run.sample.k, run.sample.v)
    assert [found[key] for key in ("kept", "kept_worst", "kept_most")] == pytest.approx(
        [theirs.kept, theirs.worst, theirs.oracle], rel=1e-4
    )


def test_selection_is_timed_without_its_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    right = XAttention.mass
    monkeypatch.setattr(XAttention, "mass", lambda self, *args: counted.append(1) or right(self, *args))
    calls, _, layout = Selecting(TINY[0], Meter(), 0, None).parts()
    counted.clear()
    again = calls["select"]()
    assert not counted and torch.equal(again.rows.idx, layout.rows.idx) and torch.equal(again.rows.ptr, layout.rows.ptr)
    calls["attention"]()
    assert not counted
    calls["score"]()
    assert counted == [1]


@pytest.mark.parametrize("case", [TINY[1], TINY[3]], ids=lambda case: case.name)
@pytest.mark.parametrize("spoil", ["estimate", "choice", "output"])
def test_what_is_wrong_gets_no_number(case: selecting.SelectCase, spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(case.selector)
    if spoil == "estimate":
        right = kind.mass
        monkeypatch.setattr(kind, "mass", lambda self, *args: right(self, *args).roll(1, dims=-1))
    elif spoil == "choice":
        chosen = MassSelector.choose
        monkeypatch.setattr(MassSelector, "choose", lambda self, *args: chosen(self, *args).roll(1, dims=-1))
    else:
        attend = selecting.attention
        monkeypatch.setattr(selecting, "attention", lambda *args, **more: 1.01 * attend(*args, **more))
    ours = run_select_case(case, FAST)[0]
    words = {"estimate": "wrong estimate", "choice": "wrong choice", "output": "wrong result"}
    assert ours["status"] == "failed" and ours["why"].startswith(f"ArithmeticError: {words[spoil]}"), ours["why"]


def test_dense_attention_is_checked_over_all_keys() -> None:
    run = Selecting(TINY[0], Meter(), 0, None)
    oracle = SelectOracle(TINY[0], run.sample)
    chosen = TINY[0].selector.choose(run.sample.q, run.sample.k, Call())[0]
    out = selecting.attention(run.sample.q, run.sample.k, run.sample.v, TINY[0].selector)
    assert oracle.check_output(out, chosen).within and not oracle.check_output(out, None).within
