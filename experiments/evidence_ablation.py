"""What ablations say, guideline by guideline: every sentence is made from the numbers of a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

from experiments.ablate_report import loss_chart, mean_scores, plan_table, task_chart, with_spread
from experiments.ablate_settings import Record
from experiments.evidence_found import FAR, Found
from experiments.paired import Paired
from experiments.report_md import markdown, mebibytes
from experiments.tasks import heat_map
from s2attn.analysis.guidelines import GUIDELINES, Guideline
from s2attn.patterns import Or, Window

LOSS_GOAL = 0.01
"""By so much, as a share, a hybrid's validation loss may lie above the dense one."""

Says = Callable[[Found], Iterator[str]]


def ablation_sections(records: Mapping[str, Record]) -> list[str]:
    """The part of the page that comes from ablations: a section for what was run, for the results, and for every guideline."""
    found = [Found.of(name, record) for name, record in records.items()]
    parts = [
        "## What was run",
        *_each(found, what_was_run, "python -m experiments ablate"),
        "## Results",
        *_each(found, results, "python -m experiments ablate"),
    ]
    parts += ["## Passkey far out", *_each(found, far_out, "python -m experiments ablate --tasks passkey")]
    for key, says in SECTIONS.items():
        guideline = GUIDELINES[key]
        parts += [f"## {guideline.section}", f"The guideline: {guideline.says}. The experiment: `{guideline.experiment}`."]
        parts += _each(found, _complete(guideline, says), guideline.experiment)
    return parts


def _each(found: Sequence[Found], says: Says, command: str) -> list[str]:
    """What every record says; the page is the same with one record and with many, but for their names."""
    if not found:
        return [f"Nothing was measured yet; `{command}` would do that."]
    parts = []
    for one in found:
        said = list(says(one)) or [f"Not measured; `{command}` would do that."]
        parts += [*([f"**Record `{one.name}`.**"] if len(found) > 1 else []), *said]
    return parts


def _complete(guideline: Guideline, says: Says) -> Says:
    """What is said of a guideline, and which of its recipes the record does not have."""

    def all_of_it(found: Found) -> Iterator[str]:
        yield from says(found)
        missing = [f"`{name}`" for name in guideline.recipes if name not in found.names]
        if missing:
            yield f"Not measured: {', '.join(missing)}."

    return all_of_it


def what_was_run(found: Found) -> Iterator[str]:
    """The model, its tokens, the budget, the machine."""
    outcome, settings = found.outcome, found.outcome.settings
    if settings.is_tiny:
        yield "**Tiny sizes: this shows that everything works, and none of its numbers means anything.**"
    if outcome.open:
        names = ", ".join(f"`{name}` (seed {seed})" for name, seed in outcome.open)
        yield f"**Not finished: {len(outcome.open)} of {len(settings.recipes) * len(settings.seeds)} runs are missing: {names}.**"
    runs, model, text, tasks = list(outcome.runs.values()), settings.model, settings.text, settings.tasks
    if not runs:
        return
    said = (
        f"`{found.command}`: {model.layers} layers of width {model.width}, {model.heads} query heads on {model.kv_heads} KV heads of width "
        f"{model.head_dim}, {found.parameters:,} parameters. Every model "
    )
    if settings.reads_text:
        said += (
            f"reads {settings.text_tokens:,} tokens (bytes of text) at a context of {text.context:,}, for one seed the "
            "same ones in the same order from the same start"
        )
    if tasks.names:
        learned, asked = (", ".join(f"{length:,}" for length in one) for one in (tasks.curriculum.lengths, tasks.lengths))
        scaled = f"scaled ({tasks.stretch}) above that" if tasks.stretch else "never scaled"
        said += "; another one from that start " if settings.reads_text else ""
        said += (
            f"learns {' and '.join(tasks.names)} from {tasks.tokens:,} tokens at lengths {learned}, its "
            f"rotary positions {scaled}, and is asked {tasks.samples} sequences at each of the lengths {asked} and each of "
            f"{len(tasks.depths)} depths"
        )
    seeds = ", ".join(map(str, settings.seeds))
    yield (
        f"{said}. Every recipe but the dense one shall list {100 * settings.budget:g} % of a dense model's (query, key) pairs, within "
        f"{100 * settings.tolerance:g} %. Seeds: {seeds}."
    )
    yield from (f"Machine: {one}." for one in sorted({_machine(run["host"]) for run in runs if run["host"]}))
    yield markdown(plan_table(found.recipes, settings.tolerance))


def _machine(host: Record) -> str:
    names = [host[key] for key in ("gpu", "processor") if host.get(key)]
    return f"{', '.join(names)}, {host['cores']} cores, torch {host['torch']}, s2attn {host['s2attn']}"


def results(found: Found) -> Iterator[str]:
    """The table of all recipes, and the pictures."""
    if not found.recipes:
        return
    far = found.far
    tasks = list(found.tasks)
    head = ["recipe", "density", "seeds", "loss", "vs dense (%)", *(f"{task} (%)" for task in tasks)]
    lines = [[*head, *(f"{task} at {far:,} (%)" for task in tasks if far), "step memory", "KV cache"]]
    for one in found.summary:
        name = one["name"]
        unequal = "" if one["equal_pairs"] or name == "dense" else " (!)"
        line = [name, f"{100 * one['density']:.1f} %{unequal}", str(len(one["seeds"])), with_spread(one["validation_loss"], 1, 3)]
        line.append(with_spread(one["vs_dense"], 100, 2, sign="+") if name != "dense" else "")
        line += [with_spread(one["tasks"].get(task), 100, 0) for task in tasks]
        line += [f"{100 * found.mean_at(name, task, far):.0f}" for task in tasks if far]
        lines.append([*line, mebibytes(one["step_bytes"]), mebibytes(one["cache_bytes"])])
    at = f" *At {far:,}*: {FAR} times the length that the curriculum starts with, over all depths." if far else ""
    yield (
        "Means and standard deviations over seeds. *Loss* is the validation loss in nats per byte, *vs dense* its difference from the "
        "dense one of the same seed; (!) marks pairs that are not equal. Tasks: share of exact answers over all lengths and depths." + at
    )
    yield markdown(lines)
    yield from _unfinished_learning(found)
    for path, alt in picture_names(found).items():
        yield f"![{alt}](evidence/{path})"


def _unfinished_learning(found: Found) -> Iterator[str]:
    """How steep the losses still are at the end, without which a loss below the dense one reads as more than it is."""
    text = found.outcome.settings.text
    curves = [run["text"]["validation"] for run in found.outcome.runs.values() if run["text"] is not None]
    ends = [curve[-2:] for curve in curves if len(curve) > 1]
    if not ends:
        return
    steps = max(last[0] - before[0] for before, last in ends)
    changes = [last[1] / before[1] - 1 for before, last in ends]
    said = (
        f"Over the last {steps * text.batch * text.context:,} tokens the validation losses changed by {100 * min(changes):+.1f} % to "
        f"{100 * max(changes):+.1f} %."
    )
    below = [f"`{name}`" for name in found.sparse if (off := found.loss_beside(name, "dense")) is not None and off.mean < 0]
    if below and max(changes) < 0:
        verb = "ends" if len(below) == 1 else "end"
        said += (
            f" All of them still fall: that {', '.join(below)} {verb} below dense says that a model learned faster from so few tokens, and "
            "not that it would end below."
        )
    yield said


def telling(found: Found) -> list[str]:
    """The recipes whose depth and length maps are shown: dense, and of the others the best and the worst over all tasks."""
    if not found.tasks:
        return []
    means = {name: mean(mean(found.exact(name, task).values()) for task in found.tasks) for name in found.sparse}
    chosen = [*(["dense"] if "dense" in found.names else []), *([max(means, key=means.__getitem__)] if means else [])]
    chosen += [min(means, key=means.__getitem__)] if means else []
    return list(dict.fromkeys(chosen))


def picture_names(found: Found) -> dict[str, str]:
    """The pictures of a record, by file name, with what they show."""
    names = {f"{found.name}-losses.png": "validation loss"} if found.recipes and found.outcome.settings.reads_text else {}
    if found.recipes and found.tasks:
        names[f"{found.name}-tasks.png"] = "exact answers"
    return {**names, **{f"{found.name}-heat-{name}.png": f"{name}, by depth and length" for name in telling(found)}}


def ablation_pictures(records: Mapping[str, Record], folder: Path) -> None:
    """Draw what :func:`picture_names` promises."""
    for name, record in records.items():
        folder.mkdir(parents=True, exist_ok=True)
        found = Found.of(name, record)
        draw = {
            f"{name}-losses.png": lambda path, found=found: loss_chart(found.outcome, path),
            f"{name}-tasks.png": lambda path, found=found: task_chart(found.summary, path),
        }
        for recipe in telling(found):
            scores = [mean_scores(list(found.scores(recipe, task).values())) for task in found.tasks]
            heat_map(scores, folder / f"{name}-heat-{recipe}.png", title=recipe)
        for file in picture_names(found):
            if file in draw:
                draw[file](folder / file)


def spread_words(difference: Paired) -> str:
    """How a difference compares with the seeds.

    >>> spread_words(Paired((1.0, 1.1))), spread_words(Paired((1.0,)))
    ("beyond the seeds' spread", 'of one seed, which has no spread')
    """
    words = {True: "beyond the seeds' spread", False: "within the seeds' spread", None: "of one seed, which has no spread"}
    return words[difference.beyond]


def beside(found: Found, name: str, other: str) -> Iterator[str]:
    """One recipe beside another: loss and every task, by paired differences."""
    if not {name, other} <= set(found.names):
        return
    loss = found.loss_beside(name, other)
    differences = [] if loss is None else [(loss, f"loss {loss.text('%')}, {spread_words(loss)}")]
    for task in found.tasks:
        more = found.exact_beside(name, other, task)
        if more is not None:
            differences.append((more, f"{task} {more.text('points', digits=1)}, {spread_words(more)}"))
    if not differences:
        return
    count, said = len(differences[0][0].values), [words for _, words in differences]
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    unequal = "" if "dense" in (name, other) or found.equal(name, other) else " (their pairs are not equal)"
    yield f"* `{name}` beside `{other}`{unequal}, {seeds}: {'; '.join(said)}."


def _list(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield "\n".join(lines)


def heads_differ(found: Found) -> Iterator[str]:
    """Different stripes beside equal ones."""
    yield from _list([*beside(found, "s2", "homogeneous"), *beside(found, "s2", "dense"), *beside(found, "homogeneous", "dense")])


def dense_layers(found: Found) -> Iterator[str]:
    """Hybrids beside dense, and what each more dense layer buys."""
    lines = []
    for name in found.hybrids:
        off = found.loss_beside(name, "dense")
        near = "" if off is None else f" That is {'' if off.mean <= LOSS_GOAL else 'not '}within {100 * LOSS_GOAL:g} % of the dense loss."
        lines += [f"{line}{near}" for line in beside(found, name, "dense")]
    chain = [*(["s2"] if "s2" in found.names else []), *found.hybrids]
    for fewer, more in pairwise(chain):
        lines += beside(found, more, fewer)
    yield from _list(lines)


def covers(found: Found) -> Iterator[str]:
    """A window beside the recipes that read far keys, length by length, and depth by depth far out."""
    yield from _list([line for name in found.sparse if name != "window" for line in beside(found, name, "window")])
    lengths = found.outcome.settings.tasks.lengths
    for task in found.tasks if found.recipes else ():
        shares = {name: [found.mean_at(name, task, length) for length in lengths] for name in found.names}
        yield f"Exact answers to {task} (%) by length, over all depths and seeds:"
        head = ["recipe", *(f"{length:,}" for length in lengths)]
        yield markdown([head, *([name, *(f"{100 * share:.0f}" for share in row)] for name, row in shares.items())])
        yield from _list(list(_window_by_length(task, lengths, {name: row for name, row in shares.items() if name != "dense"})))


def _window_by_length(task: str, lengths: Sequence[int], shares: Mapping[str, Sequence[float]]) -> Iterator[str]:
    others = {name: row for name, row in shares.items() if name != "window"}
    if "window" not in shares or not others:
        return
    for i, length in enumerate(lengths):
        row = {name: one[i] for name, one in others.items()}
        best, own = max(row, key=row.__getitem__), shares["window"][i]
        above = sum(share > own for share in row.values())
        yield (
            f"* {task} at {length:,}: `window` {100 * own:.0f} %, {above} of the {len(row)} other sparse recipes above it, "
            f"the best `{best}` with {100 * row[best]:.0f} %."
        )


def far_out(found: Found) -> Iterator[str]:
    """Which recipes know the passkey at every depth, in every seed, at the length that is far for the curriculum."""
    length, tasks = found.far, found.outcome.settings.tasks
    if length is None or "passkey" not in tasks.names or not found.recipes:
        return
    end = tasks.curriculum.end
    known = f"it goes on to {end:,}, so models have met this length" if length <= end else f"it ends at {end:,}, below this length"
    yield f"{length:,} tokens are {FAR} times the {tasks.curriculum.start} that the curriculum starts with ({known})."
    perfect = {name: all(share == 1 for row in found.at(name, "passkey", length).values() for share in row) for name in found.names}
    right = ", ".join(f"`{name}`" for name, whole in perfect.items() if whole)
    yield f"Perfect at all {len(tasks.depths)} depths in every seed: {right or 'none'}."
    lines = [["recipe", "seeds", *(f"depth {100 * depth:.0f} %" for depth in tasks.depths), "lowest of a seed"]]
    for name in found.names:
        rows = found.at(name, "passkey", length).values()
        means = [f"{100 * mean(column):.0f}" for column in zip(*rows, strict=True)]
        lines.append([name, str(len(rows)), *means, f"{100 * min(min(row) for row in rows):.0f}"])
    yield f"Exact answers (%) by depth, means over seeds:\n\n{markdown(lines)}"


def local_window(found: Found) -> Iterator[str]:
    """A window alone, half of the pairs, and the narrowest one, by its width."""
    lines = []
    for one in found.recipes:
        pattern = one.recipe.default
        widths = [part.n for part in (pattern.parts if isinstance(pattern, Or) else (pattern,)) if isinstance(part, Window)]
        if one.name in ("stripes", "s2", "window") and widths:
            lines.append(f"* The window of `{one.name}` is {widths[0]} tokens wide.")
    pairs = (("window", "dense"), ("s2", "window"), ("stripes", "s2"), ("stripes", "dense"))
    yield from _list([*lines, *(line for pair in pairs for line in beside(found, *pair))])


def far_keys(found: Found) -> Iterator[str]:
    """Designs that thin out with distance beside equal stripes."""
    lines = [line for name in ("ranges", "power", "dilated", "longnet") for line in beside(found, name, "s2")]
    yield from _list(lines)


def stays_dropped(found: Found) -> Iterator[str]:
    """What a server keeps, beside the loss."""
    lines = [["recipe", "density", "KV cache", "of the dense one", "loss vs dense (%)"]]
    for one in found.summary:
        kept, whole = one["cache_bytes"], one["dense_cache_bytes"]
        share = "-" if kept is None else f"{100 * kept / whole:.0f} %"
        density = f"{100 * one['density']:.1f} %"
        loss = with_spread(one["vs_dense"], 100, 2, sign="+") if one["name"] != "dense" else ""
        lines.append([one["name"], density, mebibytes(kept), share, loss])
    if len(lines) > 1:
        yield markdown(lines)


SECTIONS: Mapping[str, Says] = {
    "heads": heads_differ,
    "union": covers,
    "dense": dense_layers,
    "window": local_window,
    "far": far_keys,
    "dropped": stays_dropped,
}
"""What an ablation says of each guideline that one can put to the test."""
