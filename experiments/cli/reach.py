"""``python -m experiments reach``: does a model learn what its pattern reaches, and nothing else?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from experiments.cli.ablate import MOST_SEEDS, words
from experiments.cli.screen import Screen
from experiments.folder import Gauge
from experiments.reach_study import Outcome, run_reach
from experiments.reach_study_report import hops_table, plan_table, result_table, summary, totals, totals_table, write_report
from experiments.reach_study_settings import ReachSettings
from s2attn.cli.screen import console, table
from s2attn.core import check_int
from s2attn.tuning.host import host_facts


def settings_of(size: str, *, patterns: str, seeds: int | None, steps: int | None) -> ReachSettings:
    """The settings of a size, changed by what the command line says; an empty or missing word leaves a setting alone."""
    made = ReachSettings.of(size)
    if patterns:
        made = replace(made, patterns=tuple(words(patterns)))
    if seeds is not None:
        made = replace(made, seeds=tuple(range(check_int("--seeds", seeds, 1, MOST_SEEDS))))
    return made if steps is None else made.with_steps(steps)


def show_plan(settings: ReachSettings) -> None:
    """Print what would run, and run nothing."""
    screen = console()
    screen.print(table(plan_table(Outcome(settings, {})), "Patterns", right_from=4))
    tokens = settings.train.steps * settings.curriculum.step_tokens
    screen.print(f"\n{len(settings.cases)} runs, each of {tokens:,} tokens up to length {settings.length}")


def show_reach(settings: ReachSettings, out: Path, *, limit: float | None) -> None:
    """Run what is open of a study, write its report, and print the tables."""
    screen = console()
    if settings.is_tiny:
        screen.print("[yellow]Tiny sizes: this shows that everything works, and none of its numbers means anything.[/yellow]")
    outcome = run_reach(settings, out, Screen(screen), Gauge(host=host_facts), limit)
    command = " ".join(["python -m experiments", *sys.argv[1:]]) if sys.argv[1:2] == ["reach"] else "python -m experiments reach"
    page = write_report(outcome, out, command)
    if outcome.runs:
        made = totals(list(outcome.runs.values()))
        screen.print(table(result_table(summary(outcome)), "Runs"))
        screen.print(table(totals_table(made), "Reachable and learned"))
        screen.print(table(hops_table(made), "By hops"))
    if outcome.open:
        screen.print(f"{len(outcome.open)} runs are open; the same command goes on with them.", style="yellow")
    screen.print(f"Report: [bold]{page}[/bold]")
