"""``s2attn tune``: which tiles are the fastest on this GPU, written to the table that launches look up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from s2attn.backends.triton.backend import gpu_facts, triton_version
from s2attn.backends.triton.table import Situation, file_name, write_table
from s2attn.backends.triton.tiles import Tiles
from s2attn.core import bad_value
from s2attn.tuning.benches import Bench
from s2attn.tuning.candidates import FINALISTS, Target, candidates, check_density, compiled_ahead, fallback, refined, small_target
from s2attn.tuning.clock import Call, Meter, Timing, time_in_turn
from s2attn.tuning.host import host_facts
from s2attn.tuning.journal import SCHEMA, DeviceLost, Journal
from s2attn.tuning.rows import one_line, still_there
from s2attn.tuning.turns import LATE

Note = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """The outcome for one target: the fastest tiles, or why there are none."""

    target: Target
    tiles: Tiles | None
    facts: dict[str, Any]


class Contest:
    """Candidates for one target: those that compute the right results are timed in turn."""

    def __init__(self, target: Target, device: torch.device, shared_limit: int, meter: Meter, journal: Journal):
        self.journal, self.name = journal, target.name
        self.mark("")
        self.meter, self.bench, self.first = meter, Bench.random(target, device), fallback(target.situation, shared_limit)
        check_density(target, self.bench.layout)
        self.bench.begin(shared_limit)
        self.expected = {name: call() for name, call in self.bench.calls(self.first).items()}
        self.ready: dict[Tiles, dict[str, Call]] = {}
        self.refused: list[str] = []

    def mark(self, words: str) -> None:
        """Say what begins now, for whoever watches this process."""
        self.journal.mark(self.name, words)

    def enter(self, tiles: Tiles) -> None:
        """Check a candidate; one that does not fit, does not compile, is wrong or has ended a process must not end the run."""
        words = words_of(tiles)
        crash = self.journal.crash_of(self.name, words)
        if crash is not None:
            self.refused.append(f"{words}: {crash}"[:200])
            return
        self.mark(words)
        try:
            calls = self.bench.calls(tiles)
            for name, call in calls.items():
                check_results(self.expected[name], call())
            if self.bench.lost:
                raise ArithmeticError("the compiler did not specialise the warps")
            self.ready[tiles] = {name: self._armed(call) for name, call in calls.items()}
        except Exception as error:
            self.refused.append(f"{words}: {one_line(error)}"[:200])
            still_there(self.meter, self.journal, self.name, words, one_line(error))

    def _armed(self, call: Call) -> Call:
        return self.meter.arm(call, lambda: None, graph=True).call if self.bench.graph else call

    def time(self, candidates: Sequence[Tiles], rounds: int) -> dict[Tiles, dict[str, Timing]]:
        """Time those that are ready, in turn, problem by problem."""
        found: dict[Tiles, dict[str, Timing]] = {tiles: {} for tiles in candidates if tiles in self.ready}
        for name in self.expected:
            named = {words_of(tiles): partial(self._seconds, words_of(tiles), self.ready[tiles][name]) for tiles in found}
            timings = time_in_turn(named, rounds=rounds, min_rounds=min(rounds, 3), measure=lambda call: cast(float, call()))
            for tiles, timing in found.items():
                timing[name] = timings[words_of(tiles)]
        return found

    def _seconds(self, words: str, call: Call) -> float:
        self.mark(words)
        return self.meter.seconds(call)


def tune_target(
    target: Target, device: torch.device, shared_limit: int, meter: Meter, *, tiny: bool = False, journal: Journal | None = None
) -> Measured:
    """Measure all candidates in turn, then the best of them against the fallback for longer."""
    contest = Contest(target, device, shared_limit, meter, journal or Journal())
    for tiles in candidates(target.situation, shared_limit, tiny=tiny):
        contest.enter(tiles)
    quick = contest.time(list(contest.ready), rounds=2 if tiny else 4)
    best = sorted(quick, key=lambda tiles: overall(quick[tiles]).median_s)[:FINALISTS]
    more = refined(target, best, tiny=tiny)
    for tiles in more:
        contest.enter(tiles)
    final = contest.time(list(dict.fromkeys([contest.first, *best, *more])), rounds=2 if tiny else 15)
    winner = min(final, key=lambda tiles: overall(final[tiles]).median_s)
    timing, untuned = overall(final[winner]), final[contest.first]
    facts: dict[str, Any] = {
        "median_s": timing.median_s, "p20_s": timing.p20_s, "p80_s": timing.p80_s,
        "fallback_s": overall(untuned).median_s, "fallback": words_of(contest.first),
        "tried": len(contest.ready), "refused": contest.refused,
        "pattern": repr(target.pattern), "seqlen": target.seqlen, "heads": target.heads, "kv_heads": target.kv_heads,
    }  # fmt: skip
    if len(untuned) > 1:
        each = {name: {"median_s": found.median_s, "fallback_s": untuned[name].median_s} for name, found in final[winner].items()}
        facts["problems"] = each
    return Measured(target, winner, facts)


def overall(timings: Mapping[str, Timing]) -> Timing:
    """One timing for several problems: geometric means, so that halving the time of any of them counts the same.

    >>> overall({"short": Timing(1.0, 1.0, 1.0, 9), "long": Timing(100.0, 100.0, 100.0, 5)})
    Timing(median_s=10.0, p20_s=10.0, p80_s=10.0, runs=5)
    """
    mean = lambda numbers: prod(numbers) ** (1 / len(timings))  # noqa: E731
    each = timings.values()
    return Timing(mean(t.median_s for t in each), mean(t.p20_s for t in each), mean(t.p80_s for t in each), min(t.runs for t in each))


def check_results(expected: list[Tensor], got: list[Tensor]) -> None:
    """Results of other tiles may differ by roundings of their dtype alone.

    Raises:
        ArithmeticError: they differ by more, or hold NaN.
    """
    for a, b in zip(expected, got, strict=True):
        seen = torch.isfinite(a)
        scale = float(a[seen].abs().max()) if bool(seen.any()) else 1.0
        apart = float((a[seen].double() - b[seen].double()).abs().max()) if bool(seen.any()) else 0.0
        allowed = 8 * torch.finfo(a.dtype).eps * max(scale, 1e-30)
        if not apart <= allowed or not torch.equal(seen, torch.isfinite(b)):
            raise ArithmeticError(f"wrong result: {apart:.2e} from the fallback's where {allowed:.2e} is allowed")


def tune(
    wanted: Sequence[Target],
    folder: Path,
    *,
    limit_s: float = 540.0,
    tiny: bool = False,
    workers: int | None = None,
    note: Note | None = None,
    journal: Journal | None = None,
) -> tuple[Path, list[Measured]]:
    """Measure ``wanted`` in order until the time is over; the table on disk is complete after every one.

    Args:
        tiny: on the CPU, in Triton's interpreter; shows that all works, measures nothing.
        workers: processes that compile ahead; by default as many as there are cores but two, none in the interpreter.
        journal: what was measured by a process that has ended is not measured again, and what ended it is not tried again.

    Returns:
        path of the table, and what was measured.

    Raises:
        ValueError: no CUDA device, and not ``tiny``.
    """
    began = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not tiny:
        raise bad_value("size", "must be tiny where there is no CUDA device", "full")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    name, shared_limit = gpu_facts(device.index or 0) if on_gpu else ("interpreter", 232448)
    path, facts = folder / file_name(name, triton_version()), host_facts(device.type)
    journal = journal or Journal()
    if on_gpu and not journal.crashes:  # what was compiled by a process that has ended is still on disk
        compile_ahead(wanted, shared_limit, workers=workers, limit_s=limit_s / 3, each=lambda: journal.mark("compiling", ""))
    meter = _meter(on_gpu)
    for target in wanted:
        if journal.has(target.name) or time.perf_counter() - began > limit_s:
            continue
        if note is not None:
            note(target.name)
        journal.add([_measure(target, device, shared_limit, meter, journal, tiny)], _record(path, began))
        done = measured(wanted, journal)
        rows = [(m.target.situation, m.tiles, m.facts) for m in done if m.tiles is not None]
        write_table(path, name, rows, {"host": facts, "seconds": time.perf_counter() - began})
        meter.tidy()
    journal.write(_record(path, began))
    return path, measured(wanted, journal)


def _record(path: Path, began: float) -> dict[str, Any]:
    return {"schema": SCHEMA, "suite": "tune", "table": str(path), "seconds": time.perf_counter() - began}


def _measure(target: Target, device: torch.device, shared_limit: int, meter: Meter, journal: Journal, tiny: bool) -> dict[str, Any]:
    """One target as a row of the journal."""
    tiles, facts = None, {"why": journal.crash_of(target.name, "")}
    if facts["why"] is None:
        try:
            found = tune_target(target, device, shared_limit, meter, tiny=tiny, journal=journal)
            tiles, facts = found.tiles, found.facts
        except DeviceLost:
            raise
        except Exception as error:
            facts = {"why": one_line(error)}
            still_there(meter, journal, target.name, "", one_line(error))
    return {"case": target.name, "tiles": None if tiles is None else asdict(tiles), "facts": facts}


def measured(wanted: Sequence[Target], journal: Journal) -> list[Measured]:
    """What a journal knows of targets."""
    rows = {row["case"]: row for row in journal.rows}
    found = []
    for target in wanted:
        row = rows.get(target.name)
        tiles = None if row is None or row["tiles"] is None else Tiles(**row["tiles"])
        found.append(Measured(target, tiles, {"why": LATE} if row is None else row["facts"]))
    return found


def compile_ahead(wanted: Sequence[Target], shared_limit: int, *, workers: int | None, limit_s: float, each: Callable[[], None]) -> None:
    """Fill Triton's cache on disk from several processes, since compiling takes longer than measuring; ``each`` comes after each kernel."""
    jobs = dict.fromkeys(job for t in wanted for job in compiled_ahead(t.situation, shared_limit))
    ends = time.time() + limit_s
    with ProcessPoolExecutor(workers or max((os.cpu_count() or 4) - 2, 1), mp_context=get_context("spawn")) as pool:
        each()
        for _ in as_completed([pool.submit(compile_one, job, ends) for job in jobs]):
            each()


def compile_one(job: tuple[Situation, Tiles], ends: float) -> None:
    """Compile one kernel with one choice of tiles for the current device; what does not compile is found out again when it is measured."""
    if time.time() > ends:
        return
    situation, tiles = job
    try:
        bench = Bench.hollow(small_target(situation), torch.device("cuda", torch.cuda.current_device()))
        for call in bench.calls(tiles).values():
            call()
    except Exception:
        return


def _meter(on_gpu: bool) -> Meter:
    if not on_gpu:
        return Meter()
    from s2attn.tuning.cuda import CudaMeter

    return CudaMeter()


def words_of(tiles: Tiles) -> str:
    """
    >>> words_of(Tiles(64, 32, 4, 3))
    '64x32, 4 warps, 3 stages'
    """
    if tiles.form != "plain":
        return tiles.form
    ranged = f", ranges of {tiles.key_range}" if tiles.key_range else ""
    cut = f", {tiles.cut}" if tiles.cut else ""
    return f"{tiles.line_tokens}x{tiles.listed_tokens}, {tiles.num_warps} warps, {tiles.num_stages} stages{ranged}{cut}"


def tune_lines(done: Sequence[Measured]) -> list[str]:
    """One line for each target: the fastest tiles, and their time beside the fallback's."""
    lines = []
    for m in done:
        if m.tiles is None:
            lines.append(f"{m.target.name}: not measured: {m.facts['why']}")
        else:
            gain = m.facts["fallback_s"] / m.facts["median_s"]
            lines.append(f"{m.target.name}: {words_of(m.tiles)}, {m.facts['median_s'] * 1e3:.3f} ms, {gain:.2f}x the untuned")
    return lines
