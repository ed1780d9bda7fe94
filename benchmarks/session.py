"""A run of several suites within a time limit, in a process that is watched: what breaks it becomes rows, and the rest is run anew.

A kernel that was never run on a device can stop the device, the process or the clock. The suites therefore run in a process of their own,
which notes what it begins and writes its records case by case; whoever started it starts it again behind the place where it ended.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimating import hyper_suite
from benchmarks.inference import inference_suite
from benchmarks.peers import CPU_PEERS, CUDA_PEERS, NAMES, make_peers
from benchmarks.runner import AnyCase, names_in, run_suite
from benchmarks.selecting import select_suite
from benchmarks.stacks import stack_suite
from benchmarks.suites import attention_suite
from benchmarks.tables import case_lines
from s2attn.core import bad_value
from s2attn.tuning.host import host_facts
from s2attn.tuning.journal import SCHEMA, Journal, Record, Row, read_record
from s2attn.tuning.paged import decode_suite
from s2attn.tuning.rows import Effort
from s2attn.tuning.watched import main_watched, run_to_end

SHARES = {"forward": 4.0, "backward": 4.0, "train": 3.0, "prefill": 2.0, "decode": 3.0, "inference": 3.0, "select": 2.0, "hyper": 1.0}
"""The suites, and how a time limit is shared among them."""
SUITES: dict[str, Callable[[str, str], Sequence[AnyCase]]] = {
    "forward": attention_suite,
    "backward": attention_suite,
    "train": stack_suite,
    "prefill": stack_suite,
    "decode": decode_suite,
    "inference": inference_suite,
    "select": select_suite,
    "hyper": hyper_suite,
}
"""The cases of each, by its name and a size."""
SMALL = ("decode", "select", "hyper")
"""Suites with cases that mean something on a CPU."""
SIZES = ("full", "small", "tiny")
EFFORTS = {"full": Effort(15, 3, 3.0), "small": Effort(9, 3, 3.0), "tiny": Effort(2, 1, 0.1)}
STALL_S = 150.0


@dataclass(frozen=True)
class Plan:
    """What shall be run.

    Attributes:
        suites: of `SHARES`, in this order.
        size: ``"full"`` for a graphics card, ``"small"`` for a CPU, ``"tiny"`` for a first look on one.
        peers: names; the device's usual ones when None.
        paths: of peers that lie elsewhere, by name.
        backend: of s2attn; Triton on a CUDA device and plain torch elsewhere when None.
        limit_s: for everything together.
        cases: only cases whose name holds this text.
        commit: for the record, where the source tree cannot tell.
        stall_s: a process that begins nothing new for so long is ended.
    """

    out: str
    suites: tuple[str, ...] = tuple(SHARES)
    size: str = "full"
    peers: tuple[str, ...] | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    backend: str | None = None
    limit_s: float = 540.0
    seed: int = 0
    cases: str = ""
    commit: str | None = None
    stall_s: float = STALL_S

    def __post_init__(self) -> None:
        for suite in self.suites:
            if suite not in SHARES:
                raise bad_value("suites", f"must be some of {', '.join(SHARES)}", repr(suite))
        if not self.suites:
            raise bad_value("suites", f"must be some of {', '.join(SHARES)}", "none")
        if self.size not in SIZES:
            raise bad_value("size", f"must be one of {', '.join(SIZES)}", repr(self.size))
        if self.size == "small" and not set(self.suites) <= set(SMALL):
            raise bad_value("size", f"may be small for {', '.join(SMALL)} alone", f"it for {', '.join(self.suites)}")
        if not self.limit_s > 0:
            raise bad_value("limit", "must be a positive number of seconds", self.limit_s)
        for peer in self.peers or ():
            if peer not in NAMES and peer not in self.paths:
                raise bad_value("peers", f"must be some of {', '.join(NAMES)}, or have a path", repr(peer))

    def path(self, suite: str) -> Path:
        """The record of a suite."""
        return Path(self.out) / f"{suite}.json"

    def suite(self, name: str) -> Sequence[AnyCase]:
        """The cases of a suite."""
        return [case for case in SUITES[name](name, self.size) if self.cases in case.name]

    def names(self, device: str) -> tuple[str, ...]:
        """Who takes part; peers that are known by a path only come last."""
        usual = self.peers or (CUDA_PEERS if device == "cuda" else (*CPU_PEERS[:2], "flash", "cudnn", "s2-original"))
        return (*usual, *(name for name in self.paths if name not in usual))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields: dict[str, Any] = json.loads(text)
        for name in ("suites", "peers"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        return cls(**fields)


def plan_of(
    suites: Sequence[str] = (),
    *,
    size: str = "full",
    peers: str = "",
    peer_path: Sequence[str] = (),
    backend: str | None = None,
    limit: float = 540.0,
    cases: str = "",
    out: str | None = None,
    seed: int = 0,
    commit: str | None = None,
) -> Plan:
    """A plan from the words of a command line: names separated by commas, ``NAME=PATH``, and the folder that ``OUT`` names."""
    pairs = [word.partition("=") for word in peer_path]
    for name, sign, path in pairs:
        if not (name and sign and path):
            raise bad_value("--peer-path", "must be NAME=PATH", repr(f"{name}{sign}{path}"))
    return Plan(
        out or os.environ.get("OUT") or "bench-results",
        tuple(suites) or tuple(SHARES),
        size,
        tuple(word.strip() for word in peers.split(",") if word.strip()) or None,
        {name: path for name, _, path in pairs},
        backend,
        limit,
        seed,
        cases,
        commit,
    )


def work(plan: Plan, state: Path | None = None, crashes: Sequence[Row] = ()) -> list[Record]:
    """Run what is left of a plan in this process, and return the records.

    Raises:
        ValueError: a suite of full size without a CUDA device.
        DeviceLost: the device answers nothing any more; what was measured is on disk.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if plan.size == "full" and device == "cpu":
        raise bad_value("size", "must be small or tiny where there is no CUDA device", plan.size)
    began, records = time.perf_counter(), []
    facts = host_facts(device, plan.commit)
    paths = {name: Path(path) for name, path in plan.paths.items()}
    peers = make_peers(plan.names(device), device, backend=plan.backend, paths=paths)
    effort = EFFORTS[plan.size]
    for i, suite in enumerate(plan.suites):
        earlier = read_record(plan.path(suite)) if plan.path(suite).exists() else None
        if earlier is not None and earlier["complete"]:
            continue
        left = plan.limit_s - (time.perf_counter() - began)
        share = left * SHARES[suite] / sum(SHARES[name] for name in plan.suites[i:])
        print(f"{suite}: {share:.0f} s", flush=True)
        journal = Journal(
            plan.path(suite), earlier=earlier, state=state, crashes=crashes, tell=lambda rows: print(case_lines(rows), flush=True)
        )
        note = lambda name: print(f" {name} ({time.perf_counter() - began:.0f} s)", flush=True)  # noqa: E731
        cases = plan.suite(suite)
        records.append(
            run_suite(
                suite,
                cases,
                peers=peers,
                effort=effort,
                seed=plan.seed,
                limit_s=share,
                note=note,
                device=device,
                journal=journal,
                facts=facts,
            )
        )
    return records


def run_plan(plan: Plan) -> list[Record]:
    """Run a plan in a watched process, started again behind whatever ends it, and return the records; old ones are replaced.

    Raises:
        ValueError: the plan cannot be run on this machine.
    """
    for suite in plan.suites:
        plan.path(suite).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        state, job = Path(folder) / "state.json", Path(folder) / "job.json"

        def start(limit_s: float, crashes: Sequence[Row]) -> list[str]:
            job.write_text(json.dumps({"plan": replace(plan, limit_s=limit_s).to_json(), "crashes": list(crashes)}))
            return [sys.executable, "-m", "benchmarks", "work", str(job), str(state)]

        crashes = run_to_end(start, state, plan.limit_s, plan.stall_s)
    return [_finished(plan, suite, crashes) for suite in plan.suites]


def _finished(plan: Plan, suite: str, crashes: Sequence[Row]) -> Record:
    """The record of a suite with a row, and a reason, for whatever was not run."""
    if plan.path(suite).exists():
        record = read_record(plan.path(suite))
    else:
        facts: Record = {"host": host_facts(commit=plan.commit), "device": "cpu", "seed": plan.seed}
        record = {"schema": SCHEMA, "suite": suite, **facts, "complete": False, "seconds": 0.0, "rows": []}
    if record["complete"]:
        return record
    journal, device = Journal(plan.path(suite), earlier={**record, "seconds": 0.0}, crashes=crashes), str(record["device"])
    paths = {name: Path(path) for name, path in plan.paths.items()}
    peers = make_peers(plan.names(device), device, backend=plan.backend, paths=paths)
    late = "the time for all timings was over, or too many runs had ended before"
    rows: list[Row] = []
    for case in plan.suite(suite):
        if not journal.has(case.name):
            for name in names_in(case, peers, device):
                crash = journal.crash_of(case.name, name)
                reason = {"status": "skipped", "why": late} if crash is None else {"status": "failed", "why": crash}
                rows.append({**case.facts(), "peer": name, **reason})
    journal.add(rows, record)
    return read_record(plan.path(suite))


def main_work(job: Path, state: Path) -> int:
    """What the watched process runs; its exit code."""
    read: dict[str, Any] = json.loads(job.read_text())
    return main_watched(lambda: work(Plan.from_json(read["plan"]), state, read["crashes"]), state)
