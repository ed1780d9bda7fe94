"""Studies of many runs: one JSON file per finished run in a folder, a budget of time, and whoever measures the machine."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from experiments.files import write_file
from experiments.place import ALONE, Place
from experiments.progress import Show
from s2attn.core import StrPath, as_path, bad_value
from s2attn.core.files import read_json

Record = dict[str, Any]
K = TypeVar("K")


class OutOfTime(Exception):
    """The time of a study is over; what is finished lies in its folder."""


@dataclass(frozen=True)
class Gauge:
    """What knows the machine; the command line brings that of the benchmarks, without it nothing is measured.

    Attributes:
        peak_bytes: by how much memory rises while a call runs, or None.
        host: facts of the machine, kept with every run.
    """

    peak_bytes: Callable[[Callable[[], object]], int | None] = lambda call: None
    host: Callable[[], Record] = dict


NO_GAUGE = Gauge()


@dataclass
class Watch:
    """A time budget: no run begins that would not end in time, unless it can go on later, and one that goes on beyond it is stopped."""

    seconds: float | None = None
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise bad_value("limit", "must be a positive number of seconds", self.seconds)

    @property
    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - (time.perf_counter() - self.began)

    def check(self) -> None:
        if self.left < 0:
            raise OutOfTime


@dataclass(frozen=True)
class Surroundings:
    """Where a run reports to, what may stop it, what measures it, and where it takes place."""

    show: Show
    watch: Watch
    gauge: Gauge
    place: Place = ALONE


@dataclass(frozen=True)
class Job:
    """A run that a folder holds when it is finished, as ``runs/NAME.json``.

    Attributes:
        title: for the reader.
        made_with: the settings that its record must name, as plain JSON values.
        recipe: the recipe that its record must name, likewise.
        work: makes the record, with ``"seconds"``, ``"made_with"`` and ``"recipe"`` in it.
        tidy: called when the record is written. A run that has it keeps what it has done when it is stopped, so it may begin although it
            will not end in time.
    """

    name: str
    title: str
    made_with: Record
    recipe: Record
    work: Callable[[], Record]
    tidy: Callable[[], None] | None = None


def run_jobs(jobs: Mapping[K, Job], out: StrPath, around: Surroundings) -> dict[K, Record]:
    """Run what is still open, in order; finished runs are never repeated, and one that was stopped leaves no record.

    Returns:
        The records of all finished runs.

    Raises:
        ValueError: ``out`` holds runs of other settings, or files that cannot be read.
    """
    out = as_path("out", out)
    show, watch = around.show, around.watch
    done = {key: record for key, job in jobs.items() if (record := finished(job, out)) is not None}
    for key, job in jobs.items():
        if key in done:
            continue
        usual = median([run["seconds"] for run in done.values()]) if done and job.tidy is None else 0.0
        if usual > watch.left:
            usually = f"a run takes {usual:.0f} s, and " if usual else ""
            show.note(f"stopped: {usually}{max(0.0, watch.left):.0f} s are left")
            break
        show.stage(f"{job.title} ({len(done) + 1} of {len(jobs)})")
        try:
            record = job.work()
        except OutOfTime:
            show.end()
            later = "begin anew" if job.tidy is None else "go on from here"
            show.note(f"stopped in the midst of this run: the time is over; it will {later}")
            break
        write_json(record, _path(job, out))
        if job.tidy is not None:
            job.tidy()
        done[key] = record
    return done


def _path(job: Job, out: Path) -> Path:
    return out / "runs" / f"{job.name}.json"


def finished(job: Job, out: StrPath) -> Record | None:
    """The record of a run in ``out``, or None where it is open.

    Raises:
        ValueError: the file cannot be read, or comes from other settings, which are named.
    """
    out = as_path("out", out)
    path = _path(job, out)
    if not path.is_file():
        return None
    try:
        record = read_json(path, "out")
        made_with, recipe = record["made_with"], record["recipe"]
        float(record["seconds"])
        differ = differing(job.made_with, made_with)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_value("out", f"must hold readable runs ({error!r}); delete the file to run it again", path) from None
    if recipe != job.recipe:
        differ.append("recipe")
    if differ:
        raise bad_value("out", f"must be a folder of the same settings; {', '.join(differ)} differ", path)
    return record


def differing(here: Record, there: Record) -> list[str]:
    """The names under which two records differ.

    >>> differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": None, "d": 4})
    ['b', 'd']
    """
    return sorted(key for key in {*here, *there} if here.get(key) != there.get(key))


def write_json(values: Any, path: StrPath) -> Path:
    """Write a JSON file that is whole or not there; a list of numbers stands on one line."""
    path = as_path("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=1)
    write_file(path, re.sub(r'\[\n\s+([^\[\]{}"]*?)\n\s+\]', lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")
    return path


def machine_lines(host: Sequence[Record]) -> list[str]:
    """On which machines runs were made, a line each, and a warning where there are several.

    >>> machine_lines([{"processor": "abacus", "cores": 1, "torch": "2", "s2attn": "0"}, {}])
    ['Machine: abacus, 1 cores, torch 2, s2attn 0.']
    """
    machines = sorted({_machine(one) for one in host if one})
    many = ["**The runs come from several machines or versions: their speeds do not compare.**"] if len(machines) > 1 else []
    return [f"Machine: {one}" for one in machines] + many


def _machine(facts: Record) -> str:
    card = f"{facts['gpu']}, " if "gpu" in facts else ""
    return f"{card}{facts['processor']}, {facts['cores']} cores, torch {facts['torch']}, s2attn {facts['s2attn']}."
