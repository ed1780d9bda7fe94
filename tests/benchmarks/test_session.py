"""What was measured survives: records grow case by case, a crash becomes rows, and a limit leaves reasons."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.peer import Peer, Prepared
from benchmarks.peers import Sdpa
from benchmarks.runner import run_case, run_suite
from benchmarks.session import Plan, _finished, plan_of, run_plan, work
from benchmarks.suites import attention_suite
from s2attn.tuning.cases import AttentionCase
from s2attn.tuning.clock import Meter
from s2attn.tuning.journal import DeviceLost, Journal, Row, read_record, write_atomically
from s2attn.tuning.rows import Effort
from s2attn.tuning.watched import run_to_end

FAST = Effort(rounds=1, min_rounds=1, budget_s=0.1)
CASES = attention_suite("forward", "tiny")[:3]
PEER = """
import os
import sys
from benchmarks.peers import Sdpa


def prepare(case, device):
    assert not {"typer", "rich", "matplotlib"} & set(sys.modules), "the benchmark must run where these are not installed"
    if "dense" in case.name:
        os.kill(os.getpid(), 9)
    return Sdpa(device).prepare(case)
"""


class Stops(Peer):
    """Ends the run in its second case."""

    name = "stops"

    def prepare(self, case: AttentionCase) -> Prepared:
        if case is CASES[1]:
            raise KeyboardInterrupt
        return Sdpa().prepare(case)


class Lost(Meter):
    """A device that answers nothing after the first error."""

    def sync(self) -> None:
        raise RuntimeError("illegal address")


def test_a_record_survives_the_end_of_its_run(tmp_path: Path) -> None:
    path = tmp_path / "forward.json"
    with pytest.raises(KeyboardInterrupt):
        run_suite("forward", CASES, peers=["sdpa", Stops()], effort=FAST, journal=Journal(path))
    record = read_record(path)
    assert not record["complete"] and record["seconds"] > 0
    assert [(row["case"], row["status"]) for row in record["rows"]] == [(CASES[0].name, "ok")] * 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    path, named = tmp_path / "forward.json", list[str]()
    with pytest.raises(KeyboardInterrupt):
        run_suite("forward", CASES, peers=["sdpa", Stops()], effort=FAST, journal=Journal(path))
    crash = {"case": CASES[1].name, "peer": "stops", "why": "it ended the process"}
    journal = Journal(path, earlier=read_record(path), crashes=[crash])
    record = run_suite("forward", CASES, peers=["sdpa", Stops()], effort=FAST, journal=journal, note=named.append)
    assert named == [case.name for case in CASES[1:]] and record["complete"] and read_record(path) == json.loads(json.dumps(record))
    assert [(row["peer"], row["status"]) for row in record["rows"][2:4]] == [("sdpa", "ok"), ("stops", "failed")]
    assert record["rows"][3]["why"] == "it ended the process"


def test_who_stops_three_runs_is_left_out() -> None:
    crashes = [{"case": f"case {i}", "peer": "bad", "why": "signal 11"} for i in range(3)]
    journal = Journal(crashes=[*crashes, {"case": "case 9", "peer": "", "why": "timing"}])
    assert journal.crash_of("case 1", "bad") == "signal 11"
    assert journal.crash_of("another", "bad") == "left out: it stopped 3 runs"
    assert journal.crash_of("another", "good") is None and journal.crash_of("case 9", "good") == "timing"


def test_a_lost_device_ends_the_process_and_says_why(tmp_path: Path) -> None:
    class Breaks(Peer):
        name = "breaks"

        def prepare(self, case: AttentionCase) -> Prepared:
            raise RuntimeError("an illegal memory access was encountered")

    state = tmp_path / "state.json"
    with pytest.raises(DeviceLost):
        run_case(CASES[0], [Breaks()], FAST, meter=Lost(), journal=Journal(state=state))
    known = json.loads(state.read_text())
    assert (known["case"], known["peer"]) == (CASES[0].name, "breaks") and "illegal memory access" in known["why"]


def test_a_process_that_is_killed_costs_one_row(tmp_path: Path) -> None:
    (tmp_path / "peer.py").write_text(PEER)
    words = {"size": "tiny", "peers": "sdpa,killer", "peer_path": [f"killer={tmp_path / 'peer.py'}"], "cases": "tiny", "limit": 120.0}
    plan = plan_of(["forward"], out=str(tmp_path / "out"), commit="abc", **words)
    (record,) = run_plan(plan)
    assert record["complete"] and record["host"]["commit"] == "abc"
    failed = [(row["case"], row["peer"], row["why"]) for row in record["rows"] if row["status"] != "ok"]
    assert failed == [("tiny dense fwd", "killer", "the process ended with signal 9")]
    assert len(record["rows"]) == 2 * len([case for case in attention_suite("forward", "tiny") if "tiny" in case.name])


STUCK = """
import json, sys, time
from pathlib import Path
Path(sys.argv[1]).write_text(json.dumps({"case": "a", "peer": "waits"}))
time.sleep(600)
"""


def test_a_process_that_is_stuck_is_ended_and_the_next_one_is_told(tmp_path: Path) -> None:
    state, told = tmp_path / "state.json", []

    def start(limit_s: float, crashes: Sequence[Row]) -> list[str]:
        told.append((list(crashes), limit_s))
        return [sys.executable, "-c", "" if crashes else STUCK, str(state)]

    crash = {"case": "a", "peer": "waits", "why": "nothing new began for 2 seconds"}
    assert run_to_end(start, state, 60.0, 2.0) == [crash]
    assert [crashes for crashes, _ in told] == [[], [crash]] and told[1][1] < told[0][1] <= 60.0


def test_suites_share_a_limit_and_what_is_left_says_so(tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), ("train", "prefill"), "tiny", limit_s=1e-6)
    for record in work(plan):
        assert record["complete"] and {row["status"] for row in record["rows"]} == {"skipped"}
        assert all("seconds for all timings were over" in row["why"] for row in record["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefill.json", "train.json"]
    assert work(plan) == []


def test_a_run_that_never_ended_has_a_row_for_everything(tmp_path: Path) -> None:
    plan, case = Plan(str(tmp_path), ("forward",), "tiny", ("s2attn", "sdpa")), attention_suite("forward", "tiny")[0]
    with pytest.raises(KeyboardInterrupt):
        run_suite("forward", CASES, peers=["sdpa", Stops()], effort=FAST, journal=Journal(plan.path("forward")))
    record = _finished(plan, "forward", [{"case": CASES[2].name, "peer": "sdpa", "why": "signal 11"}])
    assert not record["complete"] and {row["case"] for row in record["rows"]} == {one.name for one in attention_suite("forward", "tiny")}
    late = {(row["case"], row["peer"]): (row["status"], row["why"]) for row in record["rows"] if row["case"] != case.name}
    assert late.pop((CASES[2].name, "sdpa")) == ("failed", "signal 11")
    assert set(late.values()) == {("skipped", "the time for all timings was over, or too many runs had ended before")}


def test_the_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "there")
    assert plan_of().out == "there" and plan_of(out="here").out == "here"
    monkeypatch.delenv("OUT")
    assert plan_of().out == "bench-results"
    plan = plan_of(["train"], peers="s2attn, mine", peer_path=["mine=a/b.py"])
    assert Plan.from_json(plan.to_json()) == plan and plan.names("cuda") == ("s2attn", "mine")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"suites": ["sleep"]}, "suites must be some of forward, backward, train, prefill, decode, inference, select, hyper; got 'sleep'"),
        ({"size": "huge"}, "size must be one of full, small, tiny; got 'huge'"),
        ({"limit": 0.0}, "limit must be a positive number of seconds; got 0.0"),
        ({"peers": "s2attn,fa9"}, "peers must be some of .*, or have a path; got 'fa9'"),
        ({"peer_path": ["here"]}, "--peer-path must be NAME=PATH; got 'here'"),
    ],
)
def test_plans_that_make_no_sense_are_refused(words: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(**words)


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new" and len(list(path.parent.iterdir())) == 1


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (("{", "record must be JSON"), ("{}", "record must be a benchmark's record of schema 1 to 2")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_record(path)
