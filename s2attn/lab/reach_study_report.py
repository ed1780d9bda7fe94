"""What a study of reach found: prediction against learning as tables and pictures, from the runs' records alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s2attn.core import StrPath, as_path, write_text
from s2attn.lab.charts import new_figure
from s2attn.lab.folder import Record, machine_lines, write_json
from s2attn.lab.plot import save_figure
from s2attn.lab.reach_study import Outcome
from s2attn.lab.reach_study_hops import NEVER
from s2attn.lab.reach_study_settings import DIGITS, subjects
from s2attn.lab.report_md import markdown

LEARNED = 0.9
"""A (question, place) whose answers are right in at least this share is learned; a guess is right in a tenth."""

KEPT = ("pattern", "layers", "seed", "train_seconds", "questions", "places", "hops", "right")
"""What ``record.json`` has of every run beside its summary."""

Cell = tuple[int, float]
"""Of a question and a place: the predicted hops, and the share of right answers."""


def cells(runs: Sequence[Record]) -> Iterator[Cell]:
    """Every (question, place) of the runs."""
    for run in runs:
        for predicted, right in zip(run["hops"], run["right"], strict=True):
            yield from ((one, count / run["made_with"]["samples"]) for one, count in zip(predicted, right, strict=True))


def counted(found: Sequence[Cell]) -> Record:
    """How many cells these are, how many of them are learned, and the mean share of right answers; None of no cell.

    >>> counted([(1, 1.0), (1, 0.5)])
    {'asked': 2, 'learned': 1, 'exact': 0.75}
    """
    shares = [share for _, share in found]
    return {
        "asked": len(shares),
        "learned": sum(share >= LEARNED for share in shares),
        "exact": sum(shares) / len(shares) if shares else None,
    }


def totals(runs: Sequence[Record]) -> Record:
    """Reachable and unreachable (question, place) pairs of all runs, and the reachable ones by the hops that they need."""
    found = list(cells(runs))
    within = [cell for cell in found if cell[0] != NEVER]
    by_hops = {str(count): counted([cell for cell in within if cell[0] == count]) for count in sorted({cell[0] for cell in within})}
    return {"reachable": counted(within), "unreachable": counted([cell for cell in found if cell[0] == NEVER]), "by_hops": by_hops}


def summary(outcome: Outcome) -> list[Record]:
    """One entry per finished run: the counts of `totals`, and what the last token is asked, by distance.

    ``reach`` is the greatest d such that every place up to distance d can be known to it, ``learned`` the same of what it does know.
    """
    found = []
    for case, run in ((case, outcome.runs[case]) for case in outcome.settings.cases if case in outcome.runs):
        question, samples = run["questions"][-1], run["made_with"]["samples"]
        far = [question - place for place in run["places"] if place < question]
        shares = [count / samples for count in run["right"][-1]]
        known = [(distance, share >= LEARNED) for distance, share in zip(far, shares, strict=True)]
        could = [(distance, count != NEVER) for distance, count in zip(far, run["hops"][-1], strict=True)]
        found.append(
            {
                **{name: run[name] for name in ("pattern", "layers", "seed", "recipe", "parameters", "tokens", "loss", "seconds")},
                "name": case.name,
                "reach": _unbroken(could),
                "learned": _unbroken(known),
                **totals([run]),
                "last": {"distance": far, "hops": run["hops"][-1], "exact": shares},
            }
        )
    return found


def _unbroken(known: Sequence[tuple[int, bool]]) -> int:
    """The greatest distance up to which all are known; 0 where the nearest is not.

    >>> _unbroken([(30, True), (20, False), (10, True)]), _unbroken([(10, False)])
    (10, 0)
    """
    reached = 0
    for distance, one in sorted(known):
        if not one:
            break
        reached = distance
    return reached


def result_table(found: Sequence[Record]) -> list[list[str]]:
    """Heading and one line per run."""
    head = ["pattern", "layers", "seed", "reachable", "learned", "not reachable: learned", "exact (%)", "reach", "recall", "seconds"]
    lines = []
    for one in found:
        within, outside = one["reachable"], one["unreachable"]
        asked = within["asked"] + outside["asked"]
        lines.append(
            [
                *(one["pattern"], str(one["layers"]), str(one["seed"])),
                f"{_percent(within['asked'], asked)} %",
                f"{_percent(within['learned'], within['asked'])} %",
                f"{outside['learned']} of {outside['asked']}",
                *(_exact(outside), str(one["reach"]), str(one["learned"]), f"{one['seconds']:.0f}"),
            ]
        )
    return [head, *lines]


def totals_table(made: Record) -> list[list[str]]:
    """Heading and two lines: can be known or not, by learned or not."""
    lines = [["", "learned", "not learned", "exact (%)"]]
    for name in ("reachable", "unreachable"):
        one = made[name]
        lines.append([name, f"{one['learned']:,}", f"{one['asked'] - one['learned']:,}", _exact(one)])
    return lines


def hops_table(made: Record) -> list[list[str]]:
    """Heading and one line per number of hops."""
    lines = [["hops", "asked", "learned", "exact (%)"]]
    for count, one in made["by_hops"].items():
        lines.append([count, f"{one['asked']:,}", f"{_percent(one['learned'], one['asked'])} %", _exact(one)])
    return lines


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}" if whole else "-"


def _exact(one: Record) -> str:
    return "-" if one["exact"] is None else f"{100 * one['exact']:.1f}"


def plan_table(outcome: Outcome) -> list[list[str]]:
    """Heading and one line per pattern: its layers and meaning."""
    settings = outcome.settings
    lines = [["pattern", "layers", "every layer reads", "in full"]]
    for name in settings.patterns:
        one = subjects(settings.length, settings.block)[name]
        layers = ", ".join(str(count) for count in one.layers if count <= settings.deepest)
        lines.append([name, layers, one.meaning, repr(one.pattern)])
    return lines


def write_report(outcome: Outcome, out: StrPath, command: str) -> Path:
    """Write ``record.json``, the pictures and ``report.md`` into ``out``.

    Args:
        command: how the study was started, for the reader.
    """
    out = as_path("out", out)
    settings, runs = outcome.settings, list(outcome.runs.values())
    found, made = summary(outcome), totals(runs)
    host = [run["host"] for run in runs]
    kept = [
        {name: run[name] for name in ("pattern", "layers", "seed", "train_seconds", "questions", "places", "hops", "right")} for run in runs
    ]
    facts = {"kind": "reach", "size": settings.size, "settings": settings.facts(), "command": command, "host": host[-1:]}
    still_open = [case.name for case in outcome.open]
    write_json({**facts, "open": still_open, "totals": made, "summary": found, "runs": kept}, out / "record.json")
    parts = [_head(outcome, host), "## What is asked", _asked(outcome), markdown(plan_table(outcome))]
    if found:
        distance_chart(found, out / "distances.png")
        hops_chart(made, out / "hops.png")
        parts += ["## Reachable and learned", verdict(made), markdown(totals_table(made)), "![exact answers over distance](distances.png)"]
        parts += ["## Hops", _hops_note(), markdown(hops_table(made)), "![exact answers over hops](hops.png)"]
        parts += ["## Runs", _runs_note(), markdown(result_table(found))]
    parts.append(f"## How it was made\n\n`{command}`. Every run is a file in `runs/`, all of them are in `record.json`.")
    page = out / "report.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, "\n\n".join(parts) + "\n")
    return page


def _head(outcome: Outcome, host: Sequence[Record]) -> str:
    lines = ["# Reach predicts recall", *machine_lines(host)]
    if outcome.settings.is_tiny:
        lines.append("**Tiny sizes: this shows that everything works, and none of its numbers means anything.**")
    if outcome.open:
        names, many = ", ".join(case.name for case in outcome.open), f"{len(outcome.open)} of {len(outcome.settings.cases)}"
        lines.append(f"**Not finished: {many} runs are open: {names}.** The same command goes on with them.")
    return "\n\n".join(lines)


def _asked(outcome: Outcome) -> str:
    settings = outcome.settings
    return (
        f"One digit stands in {settings.length} random letters, and a model says at later tokens which one it was. It learns that from "
        f"{settings.train.steps * settings.curriculum.step_tokens:,} tokens, at lengths "
        f"{', '.join(map(str, settings.curriculum.lengths))}, asked at every token from the digit on; no answer is ever among its inputs. "
        f"Then it is asked {settings.samples} times for each of {len(settings.places)} places of the digit, at {len(settings.questions)} "
        "later tokens. Before any training, the layout of the pattern says through how many layers the digit has to be passed on (*hops*) "
        "until that token can know it, or that it never can."
    )


def verdict(made: Record) -> str:
    """What the totals say, in a sentence or two."""
    within, outside = made["reachable"], made["unreachable"]
    words = [f"A question at a place is *learned* when {100 * LEARNED:.0f} % of its answers are right; a guess is in {100 // DIGITS} %."]
    if outside["learned"]:
        words.append(f"**{outside['learned']} unreachable ones are learned: that cannot be, and is a bug in the prediction.**")
    if within["asked"]:
        words.append(f"Of what can be reached, {_percent(within['learned'], within['asked'])} % is learned.")
    return " ".join(words)


def _hops_note() -> str:
    return "What can be reached, by the least number of layers that have to pass it on. Whether training finds a path is another matter."


def _runs_note() -> str:
    return (
        "*Reachable* is a share of all (question, place) pairs of a run, *learned* one of the reachable ones, *exact* the share of right "
        "answers where nothing can be known. *Reach* is the distance from the last token up to which it could know the digit at "
        "every place, *recall* that up to which it does."
    )


def distance_chart(found: Sequence[Record], path: StrPath) -> Path:
    """Right answers of the last token over distance, a panel per pattern and number of layers; what is reachable is shaded.

    Seeds are thin lines of their own.
    """
    path = as_path("path", path)
    kinds = list(dict.fromkeys((one["pattern"], one["layers"]) for one in found))
    names = list(dict.fromkeys(pattern for pattern, _ in kinds))
    columns = max(sum(name == pattern for pattern, _ in kinds) for name in names)
    figure, axes = new_figure(columns, width=3.1, height=1.9, rows=len(names))
    for axis in axes:
        axis.set_visible(False)
    for row, name in enumerate(names):
        for column, kind in enumerate(kind for kind in kinds if kind[0] == name):
            axis = axes[row * columns + column]
            axis.set_visible(True)
            _panel(axis, [one for one in found if (one["pattern"], one["layers"]) == kind])
            axis.set_title(f"{name}, {kind[1]} layer{'s' if kind[1] > 1 else ''}", fontsize=9)
            if column == 0:
                axis.set_ylabel("exact (%)", fontsize=8)
            if row == len(names) - 1 or column == columns - 1:
                axis.set_xlabel("distance (tokens)", fontsize=8)
    save_figure(figure, path)
    return path


def _panel(axis: Any, runs: Sequence[Record]) -> None:
    far, predicted = runs[0]["last"]["distance"], runs[0]["last"]["hops"]
    half = abs(far[0] - far[1]) / 2 if len(far) > 1 else 1.0
    for distance, count in zip(far, predicted, strict=True):
        if count != NEVER:
            axis.axvspan(distance - half, distance + half, color="#1668b8", alpha=0.10 + 0.05 * min(count, 6), linewidth=0)
    for run in runs:
        axis.plot(far, [100 * share for share in run["last"]["exact"]], "o-", color="black", markersize=2.5, linewidth=0.7)
    axis.axhline(100 / DIGITS, color="#b3261e", linestyle=":", linewidth=1)
    axis.set(ylim=(-4, 104), xlim=(0, max(far) + half))
    axis.tick_params(labelsize=7)


def hops_chart(made: Record, path: StrPath) -> Path:
    """Learned questions and right answers by hops, and what no path leads to."""
    path = as_path("path", path)
    figure, (axis,) = new_figure()
    groups = {**made["by_hops"], **({"never": made["unreachable"]} if made["unreachable"]["asked"] else {})}
    at = range(len(groups))
    axis.bar(at, [100 * one["learned"] / one["asked"] for one in groups.values()], color="#1668b8", label="learned")
    axis.plot(at, [100 * one["exact"] for one in groups.values()], "o", color="black", label="exact answers")
    axis.axhline(100 / DIGITS, color="#b3261e", linestyle=":", linewidth=1, label="guessing")
    axis.set_xticks(at, list(groups))
    axis.set(xlabel="layers that have to pass the digit on", ylabel="%", ylim=(0, 104))
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
    return path
