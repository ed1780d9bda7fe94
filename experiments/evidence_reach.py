"""What studies of reach say on the page of evidence: prediction against learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.folder import Record
from experiments.reach_study_report import LEARNED, distance_chart, hops_chart, hops_table, result_table, totals_table, verdict
from experiments.report_md import markdown

KIND = "reach"


def reach_sections(records: Mapping[str, Record]) -> list[str]:
    """One section, about all studies."""
    parts = ["## Reach and recall"]
    if not records:
        return [*parts, "Nothing was measured yet; `python -m experiments reach` would do that."]
    parts.append(
        "[`python -m experiments reach`](how-to/reach-study.md) computes which places a token can know through a model's layers, and "
        "compares that with what trained models recall."
    )
    for name, record in records.items():
        made = record["totals"]
        parts += [f"**Record `{name}`**, `{record['command']}`.", verdict(made), markdown(totals_table(made)), markdown(hops_table(made))]
        parts += [f"![exact answers over distance](evidence/{name}-distances.png)", f"![exact answers over hops](evidence/{name}-hops.png)"]
        parts.append(markdown(without_seconds(result_table(record["summary"]))))
    return parts


def without_seconds(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table without the column of times, which say nothing here.

    >>> without_seconds([["layers", "seconds"], ["2", "60"]])
    [['layers'], ['2']]
    """
    kept = [i for i, name in enumerate(lines[0]) if name != "seconds"]
    return [[line[i] for i in kept] for line in lines]


def reach_pictures(records: Mapping[str, Record], folder: Path) -> None:
    """Draw what the section shows."""
    for name, record in records.items():
        folder.mkdir(parents=True, exist_ok=True)
        distance_chart(record["summary"], folder / f"{name}-distances.png")
        hops_chart(record["totals"], folder / f"{name}-hops.png")


def reach_targets(records: Mapping[str, Record]) -> list[list[str]]:
    """Nothing may be learned that cannot be reached."""
    goal = f"no place that the layout says cannot be reached is answered right in {100 * LEARNED:.0f} % of the cases"
    lines = []
    for name, record in records.items():
        outside = record["totals"]["unreachable"]
        if outside["asked"]:
            said = f"{outside['learned']} of {outside['asked']:,}"
            lines.append([goal, said, f"`{name}`", "met" if outside["learned"] == 0 else "**missed**"])
    return lines or [[goal, "-", "-", "not measured"]]
