"""What patterns shall reach in training, and what the records say about it: met, missed, or not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from experiments.ablate_settings import Record
from experiments.evidence_ablation import LOSS_GOAL, spread_words
from experiments.evidence_found import FAR, Found
from experiments.paired import Paired
from experiments.report_md import markdown

Reading = tuple[str, bool]
"""What a record says of a target, and whether that meets it."""


@dataclass(frozen=True)
class Target:
    """One line of what is wanted.

    Attributes:
        read: what a record says; nothing where it did not measure that.
    """

    goal: str
    read: Callable[[Found], Iterator[Reading]]


def _near_dense(found: Found) -> Iterator[Reading]:
    for name in found.hybrids:
        off = found.loss_beside(name, "dense")
        if off is not None:
            yield f"`{name}`: {off.text('%')}, {_seeds(off)}", off.mean <= LOSS_GOAL


def _seeds(difference: Paired) -> str:
    count = len(difference.values)
    return f"{count} seed{'s' if count > 1 else ''}"


def _perfect(found: Found) -> Iterator[Reading]:
    length = found.far
    if length is None or "passkey" not in found.tasks:
        return
    for name in found.hybrids:
        rows = found.at(name, "passkey", length).values()
        lowest = min(min(row) for row in rows)
        yield f"`{name}` at {length:,} tokens: {100 * lowest:.0f} % at the worst depth and seed of {len(rows)}", lowest == 1


def _heterogeneous(found: Found) -> Iterator[Reading]:
    # Unequal pairs compare two budgets, and a single seed has no spread: neither measures this.
    loss = found.loss_beside("s2", "homogeneous") if {"s2", "homogeneous"} <= set(found.names) else None
    if loss is None or loss.beyond is None or not found.equal("s2", "homogeneous"):
        return
    yield f"loss: {loss.text('%')}, {spread_words(loss)}, {_seeds(loss)}", loss.beyond and loss.mean < 0
    for task in found.tasks:
        more = found.exact_beside("s2", "homogeneous", task)
        if more is not None and more.beyond is not None:
            yield f"{task}: {more.text('points', digits=1)}, {spread_words(more)}, {_seeds(more)}", more.beyond and more.mean > 0


def _large(found: Found) -> Iterator[Reading]:
    settings = found.outcome.settings
    longest = max(settings.text.context, *(settings.tasks.lengths if settings.tasks.names else ()), 0)
    if settings.device == "cuda" and found.parameters >= 50_000_000 and settings.text_tokens >= 100_000_000 and longest >= 131072:
        yield from _near_dense(found)


TARGETS: Sequence[Target] = (
    Target("hybrid S2 within 1 % of the dense validation loss at equal tokens, in the mean of the seeds", _near_dense),
    Target(f"hybrid S2: a perfect passkey at {FAR} times the length that training starts with, at every depth in every seed", _perfect),
    Target("different heads (`s2`) beat equal ones (`homogeneous`) at equal pairs, beyond the seeds' spread", _heterogeneous),
    Target("the first of these with 50M parameters, 100M tokens and a context of 128k, on a graphics card", _large),
)


def ablation_targets(records: Mapping[str, Record]) -> list[list[str]]:
    """A line per target and reading: what is wanted, what was found, in which record, and whether that meets it."""
    lines = []
    everything = [Found.of(name, record) for name, record in records.items()]
    for target in TARGETS:
        readings = [(found.name, *reading) for found in everything for reading in target.read(found)]
        lines += [[target.goal, text, f"`{name}`", "met" if met else "**missed**"] for name, text, met in readings]
        if not readings:
            lines.append([target.goal, "-", "-", "not measured"])
    return lines


TARGET_HEAD = ["target", "found", "record", "reached"]


def targets_table(lines: Sequence[Sequence[str]]) -> str:
    """The targets of all kinds of records."""
    return markdown([TARGET_HEAD, *lines])
