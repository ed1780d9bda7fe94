"""What an ablation found: means and spread over seeds, pictures, and one Markdown page, from the runs' records alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from s2attn.core import StrPath, as_path, write_text
from s2attn.lab.ablate import Outcome
from s2attn.lab.ablate_match import Matched
from s2attn.lab.ablate_record import record_of
from s2attn.lab.charts import new_figure
from s2attn.lab.folder import machine_lines, write_json
from s2attn.lab.plot import save_figure
from s2attn.lab.report_md import markdown, mebibytes
from s2attn.lab.tasks import Scores, heat_map

Record = dict[str, Any]


def spread(values: Sequence[float]) -> Record:
    """Mean, standard deviation (of a sample; None of a single value) and the values.

    >>> spread([1.0, 3.0])
    {'mean': 2.0, 'sd': 1.4142135623730951, 'values': [1.0, 3.0]}
    """
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "values": list(values)}


def summary(outcome: Outcome) -> list[Record]:
    """One entry per recipe that has a finished run: pairs, validation loss, task scores, speed (None in a record) and memory.

    ``vs_dense`` is the mean over the seeds that both have of the loss over the dense one's, less 1.
    """
    found = []
    dense = runs_of(outcome, "dense")
    for one in outcome.recipes:
        runs = runs_of(outcome, one.name)
        if not runs:
            continue
        losses, dense_losses = losses_of(runs), losses_of(dense)
        shared = [losses[seed] / dense_losses[seed] - 1 for seed in losses if seed in dense_losses]
        speeds = [run["text"]["bytes_per_second"] for run in runs.values() if "bytes_per_second" in (run["text"] or {})]
        steps = [run["memory"]["step_bytes"] for run in runs.values() if run["memory"]["step_bytes"] is not None]
        first = next(iter(runs.values()))
        found.append(
            {
                **_pairs(one, outcome),
                "seeds": sorted(runs),
                "validation_loss": spread(list(losses.values())) if losses else None,
                "vs_dense": spread(shared) if shared else None,
                "tasks": {name: spread([score_of(run, name).mean for run in runs.values()]) for name in tasks_of(runs)},
                "tokens_per_second": median(speeds) if speeds else None,
                "step_bytes": median(steps) if steps else None,
                "cache_bytes": first["memory"]["cache_bytes"],
                "dense_cache_bytes": first["memory"]["dense_cache_bytes"],
            }
        )
    return found


def losses_of(runs: Mapping[int, Record]) -> dict[int, float]:
    """Validation loss by seed; nothing where no text was read."""
    return {seed: run["text"]["validation_loss"] for seed, run in runs.items() if run["text"] is not None}


def _pairs(one: Matched, outcome: Outcome) -> Record:
    return {
        "name": one.name,
        "meaning": one.meaning,
        "recipe": repr(one.recipe),
        "pairs": one.pairs,
        "wanted_pairs": one.wanted,
        "density": one.density,
        "error": one.error,
        "equal_pairs": one.equal(outcome.settings.tolerance),
    }


def runs_of(outcome: Outcome, name: str) -> dict[int, Record]:
    """The finished runs of a recipe by seed."""
    return {seed: outcome.runs[name, seed] for seed in outcome.settings.seeds if (name, seed) in outcome.runs}


def tasks_of(runs: dict[int, Record]) -> list[str]:
    """The tasks that were scored, by name."""
    tasks = next(iter(runs.values()))["tasks"]
    return [one["task"] for one in tasks["scores"]] if tasks else []


def score_of(run: Record, name: str) -> Scores:
    """The scores of a run at one task."""
    return next(Scores.from_dict(one) for one in run["tasks"]["scores"] if one["task"] == name)


def mean_scores(found: Sequence[Scores]) -> Scores:
    """The scores of several seeds as one: the means of every length and depth, the samples added."""

    def averaged(grid: Callable[[Scores], tuple[tuple[float, ...], ...]]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(map(mean, zip(*rows, strict=True))) for rows in zip(*map(grid, found), strict=True))

    first, samples = found[0], sum(one.samples for one in found)
    return Scores(first.task, first.lengths, first.depths, samples, averaged(lambda one: one.exact), averaged(lambda one: one.tokens))


def plan_table(recipes: Sequence[Matched], tolerance: float) -> list[list[str]]:
    """Heading and one line per recipe: parameters, and the pairs that they list."""
    lines = [["recipe", "density", "pairs wanted", "reached", "equal", "parameters"]]
    for one in recipes:
        equal = "reference" if one.wanted is None else "yes" if one.within(tolerance) else "no"
        wanted = "" if one.wanted is None else f"{one.wanted:,}"
        off = "" if one.wanted is None else f" ({100 * one.error:+.1f} %)"
        lines.append([one.name, f"{100 * one.density:.1f} %", wanted, f"{one.pairs:,}{off}", equal, repr(one.recipe)])
    return lines


def result_table(found: Sequence[Record]) -> list[list[str]]:
    """Heading and one line per recipe: what came out, as means with the standard deviation over seeds."""
    tasks = list(dict.fromkeys(name for one in found for name in one["tasks"]))
    head = ["recipe", "density", "seeds", "loss", "vs dense (%)", *(f"{name} (%)" for name in tasks)]
    return [[*head, "tokens/s", "step memory", "KV cache"], *(_result_line(one, tasks) for one in found)]


def _result_line(one: Record, tasks: Sequence[str]) -> list[str]:
    return [
        one["name"],
        f"{100 * one['density']:.1f} %" + ("" if one["equal_pairs"] or one["name"] == "dense" else " (!)"),
        str(len(one["seeds"])),
        with_spread(one["validation_loss"], 1, 3),
        with_spread(one["vs_dense"], 100, 2, sign="+") if one["name"] != "dense" else "",
        *(with_spread(one["tasks"].get(name), 100, 0) for name in tasks),
        "-" if one["tokens_per_second"] is None else f"{one['tokens_per_second']:,.0f}",
        mebibytes(one["step_bytes"]),
        mebibytes(one["cache_bytes"]),
    ]


def with_spread(value: Record | None, scale: float, digits: int, sign: str = "") -> str:
    """A mean with its standard deviation.

    >>> with_spread({"mean": 0.5, "sd": 0.01}, 100, 1), with_spread({"mean": 0.5, "sd": None}, 1, 2), with_spread(None, 1, 1)
    ('50.0±1.0', '0.50', '-')
    """
    if value is None:
        return "-"
    made = f"{scale * value['mean']:{sign}.{digits}f}"
    return made + (f"±{scale * value['sd']:.{digits}f}" if value["sd"] is not None else "")


def write_report(outcome: Outcome, out: StrPath, command: str) -> Path:
    """Write ``record.json``, the pictures and ``report.md`` into ``out``.

    Args:
        command: how the ablation was started, for the reader.
    """
    out = as_path("out", out)
    found = summary(outcome)
    host = [outcome.runs[key]["host"] for key in outcome.runs]
    write_json(record_of(outcome, command), out / "record.json")
    pictures = []
    if found and outcome.settings.reads_text:
        loss_chart(outcome, out / "losses.png")
        pictures.append("![validation loss](losses.png)")
    if any(one["tasks"] for one in found):
        task_chart(found, out / "tasks.png")
        pictures.append("![exact answers](tasks.png)")
    parts = [
        _head(outcome, host),
        "## Equal work",
        _equal(outcome),
        markdown(plan_table(outcome.recipes, outcome.settings.tolerance)),
        *(["## Results", _results_note(outcome), markdown(result_table(found)), *pictures] if found else []),
        *_heat_maps(outcome, out),
        f"## How it was made\n\n`{command}`. Every run is a file in `runs/`; `record.json` is all of them, without their single steps.",
    ]
    page = out / "report.md"
    write_text(page, "\n\n".join(parts) + "\n")
    return page


def _head(outcome: Outcome, host: Sequence[Record]) -> str:
    settings = outcome.settings
    lines = ["# Ablation", *machine_lines(host)]
    if settings.is_tiny:
        lines.append("**Tiny sizes: this shows that everything works, and none of its numbers means anything.**")
    if outcome.open:
        names = ", ".join(f"{name} (seed {seed})" for name, seed in outcome.open)
        many = f"{len(outcome.open)} of {len(settings.recipes) * len(settings.seeds)}"
        lines.append(f"**Not finished: {many} runs are open: {names}.** The same command goes on with them.")
    return "\n\n".join(lines)


def _equal(outcome: Outcome) -> str:
    settings = outcome.settings
    shape, tasks = settings.shape, settings.tasks
    said = (
        f"Every recipe shall list {100 * settings.budget:g} % of the (query, key) pairs of a dense model, all {shape.layers} layers "
        f"together, at {shape.seqlen:,} tokens; within {100 * settings.tolerance:g} % that counts as equal. The width of the window is "
        "what was solved for. "
    )
    if settings.reads_text:
        said += f"Every model reads {settings.text_tokens:,} tokens of text, for one seed the same ones in the same order"
    if not tasks.names:
        return said + "."
    said += "; another one from the same start" if settings.reads_text else "Every model"
    lengths = ", ".join(map(str, tasks.curriculum.lengths))
    above = f"Rotary positions are scaled ({tasks.stretch}) above that." if tasks.stretch else "Above that, nothing is scaled."
    return f"{said} learns the tasks from {tasks.tokens:,} tokens at lengths {lengths}. {above}"


def _results_note(outcome: Outcome) -> str:
    tasks = outcome.settings.tasks
    parts = [
        "Means and standard deviations over seeds. *Loss* is the validation loss in nats per byte, *vs dense* its difference from the "
        "dense one of the same seed; (!) marks pairs that are not equal."
    ]
    if tasks.names:
        parts.append(
            f"Tasks: share of exact answers, as greedy decoding gives them, over lengths {', '.join(map(str, tasks.lengths))} and "
            f"{len(tasks.depths)} depths, {tasks.samples} sequences each."
        )
    parts.append(
        "*Step memory* is by how much memory rises in a forward and backward pass, *KV cache* what a server keeps of one sequence after "
        "eviction, in float32. Speeds were taken one run after the other, not in turn: differences of some percent mean nothing."
    )
    return " ".join(parts)


def _heat_maps(outcome: Outcome, out: Path) -> list[str]:
    parts = []
    for one in outcome.recipes:
        runs = runs_of(outcome, one.name)
        if runs and tasks_of(runs):
            scores = [mean_scores([score_of(run, task) for run in runs.values()]) for task in tasks_of(runs)]
            heat_map(scores, out / f"heat-{one.name}.png", title=one.name)
            parts.append(f"![{one.name}](heat-{one.name}.png)")
    return ["## Depth and length", "Share of exact answers, mean over seeds.", *parts] if parts else []


def loss_chart(outcome: Outcome, path: StrPath) -> Path:
    """Validation loss over tokens, the range of the seeds shaded; and at the end, every seed as a dot beside the dense one of that seed."""
    path = as_path("path", path)
    figure, (left, right) = new_figure(2)
    names = [one.name for one in outcome.recipes if runs_of(outcome, one.name)]
    batch = outcome.settings.text.batch * outcome.settings.text.context
    for name in names:
        curves = [run["text"]["validation"] for run in runs_of(outcome, name).values()]
        tokens = [step * batch for step, _ in curves[0]]
        losses = [[curve[i][1] for curve in curves] for i in range(len(tokens))]
        (line,) = left.plot(tokens, [mean(values) for values in losses], label=name, color="black" if name == "dense" else None)
        color = line.get_color()
        left.fill_between(tokens, [min(values) for values in losses], [max(values) for values in losses], color=color, alpha=0.07)
    left.set(xlabel="tokens", ylabel="validation loss (nats per byte)", title="mean and range over seeds")
    left.legend(frameon=False, fontsize=8)
    found = [one for one in summary(outcome) if one["vs_dense"] is not None]
    paired = bool(found)
    for place, one in enumerate(found or summary(outcome)):
        values = [100 * value for value in one["vs_dense"]["values"]] if paired else one["validation_loss"]["values"]
        _dots(right, values, place, "#1668b8")
    _named(right, [one["name"] for one in found] or names)
    label = "validation loss, difference from dense (%)" if paired else "validation loss (nats per byte)"
    right.set(xlabel=label, title="at the end: every seed, and the mean")
    save_figure(figure, path)
    return path


def task_chart(found: Sequence[Record], path: StrPath) -> Path:
    """Exact answers of every seed, and their mean, a panel per task."""
    path = as_path("path", path)
    tasks = list(dict.fromkeys(name for one in found for name in one["tasks"]))
    figure, axes = new_figure(len(tasks), width=4.6)
    for axis, task in zip(axes, tasks, strict=True):
        for place, one in enumerate(found):
            if task in one["tasks"]:
                _dots(axis, [100 * value for value in one["tasks"][task]["values"]], place, "#1668b8")
        axis.set(xlabel="exact answers (%)", title=task, xlim=(-4, 104))
        _named(axis, [one["name"] for one in found])
    save_figure(figure, path)
    return path


def _dots(axis: Any, values: Sequence[float], place: int, color: Any) -> None:
    axis.plot(values, [place] * len(values), "o", color=color, alpha=0.45, markersize=5)
    if all(map(math.isfinite, values)):
        axis.plot([mean(values)], [place], "|", color=color, markersize=16, markeredgewidth=2)


def _named(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
