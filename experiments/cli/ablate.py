"""``python -m experiments ablate``: recipes compared at equal tokens and equal pairs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from experiments.ablate import run_ablation
from experiments.ablate_report import plan_table, result_table, summary, write_report
from experiments.ablate_settings import AblateSettings
from experiments.cli.screen import Screen
from experiments.folder import Gauge
from s2attn.cli.screen import console, table
from s2attn.core import bad_value, check_int
from s2attn.tuning.clock import peak_bytes
from s2attn.tuning.host import host_facts

MOST_SEEDS = 1000
"""Runs of a study at most, for each recipe; more is taken for a mistake."""


def settings_of(
    size: str, *, recipes: str, tasks: str | None, seeds: int | None, budget: float | None, stretch: str | None
) -> AblateSettings:
    """The settings of a size, changed by what the command line says; an empty or missing word leaves a setting alone."""
    made = AblateSettings.of(size)
    if recipes:
        made = replace(made, recipes=tuple(words(recipes)))
    if tasks is not None:
        made = replace(made, tasks=replace(made.tasks, names=tuple(words(tasks))))
    if seeds is not None:
        made = replace(made, seeds=tuple(range(check_int("--seeds", seeds, 1, MOST_SEEDS))))
    if budget is not None:
        made = replace(made, budget=budget)
    return made if stretch is None else replace(made, tasks=replace(made.tasks, stretch=stretch))


def words(text: str) -> list[str]:
    """
    >>> words("dense, s2+1"), words("")
    (['dense', 's2+1'], [])
    """
    return [word.strip() for word in text.split(",") if word.strip()]


def show_plan(settings: AblateSettings) -> None:
    """Print which parameters make the recipes equal, and run nothing."""
    screen, recipes = console(), settings.matched()
    screen.print(table(without(plan_table(recipes, settings.tolerance), "parameters"), "Recipes"))
    for one in recipes:
        screen.print(f"\n[bold]{one.name}[/bold]: {one.meaning}")
        screen.print(f"  {one.recipe!r}", markup=False)
    runs = len(settings.recipes) * len(settings.seeds)
    screen.print(f"\n{runs} runs, each of {settings.text_tokens:,} tokens of text and {settings.tasks.tokens:,} of tasks")


def without(lines: list[list[str]], *names: str) -> list[list[str]]:
    """A table without the columns of these names: a terminal is narrow.

    >>> without([["a", "b", "c"], ["1", "2", "3"]], "b")
    [['a', 'c'], ['1', '3']]
    """
    kept = [i for i, name in enumerate(lines[0]) if name not in names]
    return [[line[i] for i in kept] for line in lines]


def gauge_of(device: str) -> Gauge:
    """What measures this machine's memory, or that of its graphics card."""
    if device == "cpu":
        return Gauge(peak_bytes, host_facts)
    if not torch.cuda.is_available():
        raise bad_value("device", "must be a device of this machine; torch sees no CUDA device", repr(device))
    from s2attn.tuning.cuda import CudaMeter

    return Gauge(CudaMeter().peak_bytes, partial(host_facts, device))


def command_of(arguments: Sequence[str]) -> str:
    """The command for a reader, without the folder and the limit, which say nothing about what is compared.

    >>> command_of(["ablate", "--out", "here", "--recipes", "dense,s2", "--limit=60"])
    'python -m experiments ablate --recipes dense,s2'
    """
    beside = ("--out", "--limit")
    kept = [word for before, word in pairwise(["", *arguments]) if before not in beside and word.split("=")[0] not in beside]
    return shlex.join(["python", "-m", "experiments", *kept])


def show_ablation(settings: AblateSettings, out: Path, *, limit: float | None) -> None:
    """Run what is open of an ablation, write its report, and print the table."""
    screen = console()
    if settings.is_tiny:
        screen.print("[yellow]Tiny sizes: this shows that everything works, and none of its numbers means anything.[/yellow]")
    outcome = run_ablation(settings, out, Screen(screen), gauge_of(settings.device), limit)
    page = write_report(outcome, out, command_of(sys.argv[1:] if sys.argv[1:2] == ["ablate"] else ["ablate"]))
    if outcome.runs:
        screen.print(table(without(result_table(summary(outcome)), "seeds", "step memory", "KV cache"), "Results"))
    if outcome.open:
        screen.print(f"{len(outcome.open)} runs are open; the same command goes on with them.", style="yellow")
    screen.print(f"Report: [bold]{page}[/bold]")
