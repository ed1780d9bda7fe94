"""``python -m experiments demo``: the demo with progress bars and a table at its end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.runner import Effort, run_suite
from experiments.cli.screen import Screen, show_times
from experiments.demo import DemoSettings, run_demo
from experiments.progress import Show
from experiments.report_md import loss_table, seconds, write_report
from s2attn.cli.screen import console, table
from s2attn.tuning.cases import length_cases


def time_attention(settings: DemoSettings, show: Show) -> dict[str, Any]:
    """The demo's attention timings: its lengths and pattern, by the benchmark's runner."""
    cases = length_cases(settings.lengths, pattern=settings.timed_pattern)
    peers = ["s2attn", "sdpa", "flex"] if settings.flex else ["s2attn", "sdpa"]
    show.begin(len(cases), "cases")
    note = _Once(show)
    record = run_suite(
        "demo",
        cases,
        peers=peers,
        effort=Effort(rounds=7, budget_s=6.0),
        seed=settings.seed,
        limit_s=settings.timing_seconds,
        note=note.case,
    )
    show.end()
    return record


class _Once:
    """Advances the bar when the next case begins, and names it."""

    def __init__(self, show: Show):
        self.show, self.begun = show, False

    def case(self, name: str) -> None:
        if self.begun:
            self.show.advance(name)
        self.begun = True


def show_demo(out: Path, *, quick: bool, steps: int | None, seed: int, flex: bool) -> None:
    """Run the demo, write its report into ``out``, and print what came out."""
    from s2attn.analysis.plot import plot

    began, screen = time.perf_counter(), console()
    settings = (DemoSettings.quick() if quick else DemoSettings()).with_options(seed=seed, steps=steps, flex=flex)
    if quick:
        screen.print("[yellow]Quick run with tiny sizes: it shows that everything works, and none of its numbers means anything.[/yellow]")
    out.mkdir(parents=True, exist_ok=True)
    results = run_demo(settings, out, Screen(screen), time_attention)
    plot(settings.timed_pattern, num_heads=8, seqlen=4096 if not quick else settings.lengths[-1], path=out / "pattern.png")
    results["command"] = " ".join(["python -m experiments", *sys.argv[1:]]) if sys.argv[1:2] == ["demo"] else "python -m experiments demo"
    results["total_seconds"] = time.perf_counter() - began
    page = write_report(results, out)
    _print_results(results, screen)
    screen.print(f"\nReport: [bold]{page}[/bold]   ({seconds(results['total_seconds'])} in all)")


def _print_results(results: dict[str, Any], screen: Console) -> None:
    made = results["generation"]
    screen.print("\n[bold]The model continues a file it never saw[/bold]")
    screen.print(made["prompt_end"], style="dim", markup=False, end="")
    screen.print(made["text"], style="green", markup=False)
    screen.print(table(loss_table(results), "Learning"))
    show_times(results["attention"]["rows"], screen)
