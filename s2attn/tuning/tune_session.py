"""`s2attn tune` in a process that is watched: a kernel that never ends, or breaks the device, costs one candidate and not the run."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from s2attn.backends.triton.table import PACKAGED
from s2attn.core import bad_value
from s2attn.tuning.candidates import Target, targets
from s2attn.tuning.journal import Journal, Row, read_record
from s2attn.tuning.tune import measured, tune, tune_lines
from s2attn.tuning.watched import main_watched, run_to_end

STALL_S = 60.0
WORKER = (sys.executable, "-m", "s2attn.tuning", "work")


@dataclass(frozen=True)
class TunePlan:
    """What is measured, as words that another process understands.

    Attributes:
        ops, dims, blocks, dtype, tiny: of `s2attn.tuning.candidates.targets`.
        out: folder for the table.
        limit_s: for everything together.
        stall_s: a process that begins no other candidate for so long is ended.
    """

    ops: tuple[str, ...]
    dims: tuple[int, ...]
    blocks: tuple[int, ...]
    dtype: str
    tiny: bool
    out: str
    limit_s: float = 540.0
    stall_s: float = STALL_S

    @property
    def targets(self) -> list[Target]:
        return targets(dims=self.dims, blocks=self.blocks, ops=self.ops, dtype=self.dtype, tiny=self.tiny)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> TunePlan:
        """The plan of what JSON made of one."""
        for name in ("ops", "dims", "blocks"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


def run_tune(*, out: Path | None, ops: str, dims: str, blocks: str, dtype: str, size: str, limit: float) -> list[str]:
    """`tune` from the words of a command line; returns what to print.

    Raises:
        ValueError: a word that names nothing, or no CUDA device where one is needed.
    """
    if size not in ("full", "tiny"):
        raise bad_value("--size", "must be one of full, tiny", repr(size))
    tiny, on_gpu = size == "tiny", torch.cuda.is_available()
    if tiny and dtype == "bfloat16" and not on_gpu:
        dtype = "float32"  # the interpreter multiplies bfloat16 wrongly
    folder = out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else Path("tuned-tiny") if tiny else PACKAGED)
    plan = TunePlan(tuple(ops.split(",")), _numbers("--dims", dims), _numbers("--blocks", blocks), dtype, tiny, str(folder), limit)
    if not plan.targets or (not on_gpu and not tiny):
        raise bad_value("size", "must be tiny where there is no CUDA device", size)
    return run_tune_plan(plan)


def run_tune_plan(plan: TunePlan, worker: Sequence[str] = WORKER) -> list[str]:
    """Measure in watched processes, each started behind whatever ended the one before; returns what to print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state, job, kept = folder / "state.json", folder / "job.json", folder / "done.json"

        def start(limit_s: float, crashes: Sequence[Row]) -> list[str]:
            job.write_text(json.dumps({"plan": asdict(replace(plan, limit_s=limit_s)), "kept": str(kept), "crashes": list(crashes)}))
            return [*worker, str(job), str(state)]

        run_to_end(start, state, plan.limit_s, plan.stall_s)
        record = read_record(kept) if kept.exists() else None
    lines = tune_lines(measured(plan.targets, Journal(earlier=record)))
    return [*lines, f"Table: {record['table'] if record else 'nothing was measured'}"]


def main_tune_work(job: Path, state: Path) -> int:
    """What the watched process runs; its exit code."""
    read: dict[str, Any] = json.loads(job.read_text())
    plan, kept = TunePlan.from_fields(read["plan"]), Path(read["kept"])
    journal = Journal(kept, earlier=read_record(kept) if kept.exists() else None, state=state, crashes=read["crashes"])

    def work() -> None:
        said = lambda name: print(name, flush=True)  # noqa: E731
        tune(plan.targets, Path(plan.out), limit_s=plan.limit_s, tiny=plan.tiny, note=said, journal=journal)

    return main_watched(work, state)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise bad_value(name, "must be numbers separated by commas", repr(text))
    return tuple(int(word) for word in words)
