"""``s2attn tune``: which tiles are the fastest on this GPU, written to the table that launches look up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2attn.backends import Scoring
from s2attn.backends.triton import launch
from s2attn.backends.triton.backend import gpu_facts, triton_version
from s2attn.backends.triton.table import PACKAGED, Situation, file_name, write_table
from s2attn.backends.triton.tiles import Tiles
from s2attn.backends.triton.ways import Prepared, Way, objections
from s2attn.bench.candidates import RANGES, Target, candidates, check_density, fallback, small_target, targets
from s2attn.bench.clock import Meter, Timing, time_in_turn
from s2attn.bench.host import host_facts
from s2attn.core import bad_value

Note = Callable[[str], None]
FINALISTS = 5


@dataclass(frozen=True)
class Measured:
    """The outcome for one target: the fastest tiles, or why there are none."""

    target: Target
    tiles: Tiles | None
    facts: dict[str, Any]


class Bench:
    """The tensors and the layout of one target, and its kernel over them with any tiles.

    Args:
        device: of the layout.
        make: a tensor ``(1, seqlen, heads, width)`` of the target's dtype, for so many heads and such a width.
    """

    def __init__(self, target: Target, device: torch.device, make: Callable[[int, int], Tensor]):
        s = target.situation
        self.target, self.layout = target, target.layout(device)
        self.q, self.k, self.v = make(target.heads, s.head_dim), make(target.kv_heads, s.head_dim), make(target.kv_heads, s.v_dim)
        self.dout, self.scoring = make(target.heads, s.v_dim), Scoring(s.head_dim**-0.5)
        self.lse = self.delta = torch.empty(1, target.heads, target.seqlen, device=self.q.device)
        self.prepared, self.ways = Prepared(), list[Way]()

    @classmethod
    def random(cls, target: Target, device: torch.device) -> Bench:
        """Normal numbers on the layout's device."""
        generator = torch.Generator(device).manual_seed(0)
        return cls(
            target, device, lambda heads, width: torch.randn(
                1, target.seqlen, heads, width, generator=generator, device=device
            ).to(target.dtype)
        )  # fmt: skip

    @classmethod
    def hollow(cls, target: Target, device: torch.device) -> Bench:
        """Tensors without memory: kernels are compiled for them, and not started."""
        return cls(target, device, lambda heads, width: torch.empty(1, target.seqlen, heads, width, dtype=target.dtype, device="meta"))

    def begin(self, tiles: Tiles, rows: Tiles) -> list[Tensor]:
        """What the backward kernels need of the forward pass, and the results with the fallback tiles.

        Args:
            tiles: the fallback of this op; ``rows`` that of the forward pass.
        """
        out, self.lse = self.way("forward", rows).forward(self.q, self.k, self.v, self.layout, self.scoring)
        self.delta = launch.delta(out, self.dout, self.lse, None, self.prepared.starts)
        return self.call(tiles)()

    def way(self, op: str, tiles: Tiles) -> Way:
        """A kernel with these tiles.

        Raises:
            ValueError: one in another form is wanted and cannot serve.
        """
        way = Way.of(op, tiles, self.q, self.k, self.v, self.layout, self.scoring, self.prepared)
        self.ways.append(way)
        if tiles.form != "plain" and way.special is None:
            raise bad_value(tiles.form, "must be able to serve", "; ".join(
                objections(op, tiles.form, self.q, self.k, self.v, self.layout, self.scoring)
            ) or f"device {self.layout.device}")  # fmt: skip
        return way

    def call(self, tiles: Tiles) -> Callable[[], list[Tensor]]:
        """One start of the target's kernel with these tiles."""
        op = self.target.situation.op
        way, inputs, rest = self.way(op, tiles), (self.q, self.k, self.v), (self.layout, self.scoring)
        if op == "forward":
            return lambda: list(way.forward(*inputs, *rest))
        backward = (*inputs, self.dout, self.lse, self.delta, *rest)
        if op == "dq":
            return lambda: [way.dq(*backward)]
        return lambda: list(way.dkv(*backward))


def tune_target(target: Target, device: torch.device, shared_limit: int, meter: Meter, *, tiny: bool = False) -> Measured:
    """Measure all candidates in turn, then the best of them against the fallback for longer."""
    bench, first = Bench.random(target, device), fallback(target.situation, shared_limit)
    check_density(target, bench.layout)
    rows = fallback(replace(target.situation, op="forward"), shared_limit)
    expected = bench.begin(first, rows)
    calls: dict[Tiles, Callable[[], list[Tensor]]] = {}
    refused: list[str] = []
    wanted = candidates(target.situation, shared_limit, tiny=tiny)
    for tiles in wanted:
        try:
            call = bench.call(tiles)
            check_results(expected, call())
            if bench.ways[-1].special is not None and bench.ways[-1].special.lost:
                raise ArithmeticError("the compiler did not specialise the warps")
            calls[tiles] = call
        except Exception as error:  # tiles that do not fit, do not compile or are wrong must not end the run
            refused.append(f"{_words(tiles)}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200])
    quick = _in_turn(calls, meter, rounds=2 if tiny else 4)
    best = sorted(calls, key=lambda tiles: quick[tiles].median_s)[:FINALISTS]
    if target.situation.density == "sparse" and target.situation.op != "dkv" and not tiny:
        ranged = [replace(best[0], key_range=tokens, form="plain") for tokens in RANGES if tokens < target.seqlen]
        for tiles in ranged:
            calls[tiles] = bench.call(tiles)
            check_results(expected, calls[tiles]())
        best += ranged
    final = _in_turn({tiles: calls[tiles] for tiles in dict.fromkeys([first, *best])}, meter, rounds=3 if tiny else 15)
    winner = min(final, key=lambda tiles: final[tiles].median_s)
    facts = {
        "median_s": final[winner].median_s, "p20_s": final[winner].p20_s, "p80_s": final[winner].p80_s,
        "fallback_s": final[first].median_s, "fallback": _words(first), "tried": len(calls), "refused": refused,
        "pattern": repr(target.pattern), "seqlen": target.seqlen, "heads": target.heads, "kv_heads": target.kv_heads,
    }  # fmt: skip
    return Measured(target, winner, facts)


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
) -> tuple[Path, list[Measured]]:
    """Measure ``wanted`` in order until the time is over; the table on disk is complete after every one.

    Args:
        tiny: on the CPU, in Triton's interpreter; shows that all works, measures nothing.
        workers: processes that compile ahead; by default as many as there are cores but two, none in the interpreter.

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
    if on_gpu:
        compile_ahead(wanted, shared_limit, workers=workers, limit_s=limit_s / 3)
    meter, done = _meter(on_gpu), list[Measured]()
    for target in wanted:
        if time.perf_counter() - began > limit_s:
            done.append(Measured(target, None, {"why": f"the {limit_s:.0f} seconds for all measurements were over"}))
            continue
        if note is not None:
            note(target.name)
        try:
            done.append(tune_target(target, device, shared_limit, meter, tiny=tiny))
        except Exception as error:
            done.append(Measured(target, None, {"why": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]}))
        rows = [(m.target.situation, m.tiles, m.facts) for m in done if m.tiles is not None]
        write_table(path, name, rows, {"host": facts, "seconds": time.perf_counter() - began})
        meter.tidy()
    return path, done


def compile_ahead(wanted: Sequence[Target], shared_limit: int, *, workers: int | None, limit_s: float) -> None:
    """Fill Triton's cache on disk from several processes, since compiling takes longer than measuring."""
    jobs = {(t.situation, tiles): None for t in wanted for tiles in candidates(t.situation, shared_limit)}
    ends = time.time() + limit_s
    with ProcessPoolExecutor(workers or max((os.cpu_count() or 4) - 2, 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, list(jobs), [ends] * len(jobs), chunksize=4))


def compile_one(job: tuple[Situation, Tiles], ends: float) -> None:
    """Compile one kernel with one choice of tiles for the current device; what does not compile is found out again when it is measured."""
    if time.time() > ends:
        return
    situation, tiles = job
    try:
        Bench.hollow(small_target(situation), torch.device("cuda", torch.cuda.current_device())).call(tiles)()
    except Exception:
        return


def _in_turn(calls: dict[Tiles, Callable[[], list[Tensor]]], meter: Meter, rounds: int) -> dict[Tiles, Timing]:
    named = {_words(tiles): call for tiles, call in calls.items()}
    timings = time_in_turn(named, rounds=rounds, min_rounds=min(rounds, 3), measure=meter.seconds)
    return {tiles: timings[_words(tiles)] for tiles in calls}


def _meter(on_gpu: bool) -> Meter:
    if not on_gpu:
        return Meter()
    from s2attn.bench.cuda import CudaMeter

    return CudaMeter()


def _words(tiles: Tiles) -> str:
    """
    >>> _words(Tiles(64, 32, 4, 3))
    '64x32, 4 warps, 3 stages'
    """
    if tiles.form != "plain":
        return tiles.form
    ranged = f", ranges of {tiles.key_range}" if tiles.key_range else ""
    return f"{tiles.line_tokens}x{tiles.listed_tokens}, {tiles.num_warps} warps, {tiles.num_stages} stages{ranged}"


def tune_lines(done: Sequence[Measured]) -> list[str]:
    """One line for each target: the fastest tiles, and their time beside the fallback's."""
    lines = []
    for m in done:
        if m.tiles is None:
            lines.append(f"{m.target.name}: not measured: {m.facts['why']}")
        else:
            gain = m.facts["fallback_s"] / m.facts["median_s"]
            lines.append(f"{m.target.name}: {_words(m.tiles)}, {m.facts['median_s'] * 1e3:.3f} ms, {gain:.2f}x the untuned")
    return lines


def run_tune(
    *, out: Path | None, ops: str, dims: str, blocks: str, dtype: str, size: str, limit: float, note: Note | None = None
) -> list[str]:
    """`tune` from the words of a command line; returns what to print.

    Raises:
        ValueError: a word that names nothing, or no CUDA device where one is needed.
    """
    if size not in ("full", "tiny"):
        raise bad_value("--size", "must be one of full, tiny", repr(size))
    tiny = size == "tiny"
    if tiny and dtype == "bfloat16" and not torch.cuda.is_available():
        dtype = "float32"  # the interpreter multiplies bfloat16 wrongly
    wanted = targets(dims=_numbers("--dims", dims), blocks=_numbers("--blocks", blocks), ops=ops.split(","), dtype=dtype, tiny=tiny)
    folder = out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else Path("tuned-tiny") if tiny else PACKAGED)
    path, done = tune(wanted, folder, limit_s=limit, tiny=tiny, note=note)
    return [*tune_lines(done), f"Table: {path}"]


def _numbers(name: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise bad_value(name, "must be numbers separated by commas", repr(text))
    return [int(word) for word in words]
