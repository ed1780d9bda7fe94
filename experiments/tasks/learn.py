"""Learning tasks along a curriculum of lengths, by the training loop of the lab; every step reads equally many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.data import Batch, Feed
from experiments.tasks.base import Task, TaskBatch
from experiments.train import Run
from s2attn.core import bad_value, check_int

Log = Callable[[dict[str, Any]], None]
IGNORED = -100
"""The target that `torch.nn.functional.cross_entropy` leaves out."""


@dataclass(frozen=True)
class Curriculum:
    """Lengths that double from ``start`` to ``end``, each for an equal share of the steps.

    Args:
        start, end: tokens that a model reads at first and at last; ``end`` is ``start`` doubled some times.
        step_tokens: tokens of every step, whatever the length: the shorter the sequences, the more of them.

    >>> lengths = Curriculum(64, 256, step_tokens=512)
    >>> [lengths.length(step, steps=6) for step in range(6)], lengths.count(128)
    ([64, 64, 128, 128, 256, 256], 4)
    """

    start: int
    end: int
    step_tokens: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "step_tokens"):
            check_int(f"Curriculum {name}", getattr(self, name), 1)
        if self.lengths[-1] != self.end:
            raise bad_value("Curriculum end", f"must be start ({self.start}) doubled some times", self.end)
        if self.step_tokens % self.end:
            raise bad_value("Curriculum step_tokens", f"must be a multiple of end ({self.end})", self.step_tokens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The stages, shortest first."""
        made = [self.start]
        while made[-1] < self.end:
            made.append(2 * made[-1])
        return tuple(made)

    def length(self, step: int, steps: int) -> int:
        """The length of step number ``step`` of ``steps``."""
        stages = self.lengths
        return stages[min(len(stages) - 1, step * len(stages) // steps)]

    def count(self, length: int) -> int:
        """Sequences of ``length`` in a step."""
        return self.step_tokens // length

    def batch(self, tasks: Sequence[Task], step: int, *, steps: int, seed: int) -> TaskBatch:
        """The sequences of a step: the tasks take turns; the same for every model, and for one that goes on after a stop."""
        length = self.length(step, steps)
        return tasks[step % len(tasks)].batch(length, self.count(length), seed=(seed, step))


@dataclass(frozen=True, eq=False)
class Questions(Feed):
    """The data of a run that learns tasks: what is not an answer has the target `IGNORED`, which no loss counts.

    Attributes:
        steps: of the run, which the curriculum divides among its lengths.
    """

    tasks: Sequence[Task]
    curriculum: Curriculum
    steps: int
    seed: int = 0

    def train(self, step: int) -> Batch:
        return _only_answers(self.curriculum.batch(self.tasks, step, steps=self.steps, seed=self.seed))

    def validation(self) -> list[Batch]:
        """A batch of every task at the last length; no step of the run asks these."""
        later = range(self.steps, self.steps + len(self.tasks))
        return [_only_answers(self.curriculum.batch(self.tasks, step, steps=self.steps, seed=self.seed)) for step in later]


def _only_answers(batch: TaskBatch) -> Batch:
    return Batch(batch.inputs.contiguous(), batch.targets.where(batch.loss_mask, IGNORED))


def learn(run: Run, tasks: Sequence[Task], curriculum: Curriculum, log: Log = lambda entry: None) -> None:
    """Train ``run`` on the answers of ``tasks`` until its last step; a run that was saved on the way goes on from there.

    Args:
        log: gets the entry of every step, that of `Run.advance` with ``"task"`` and ``"length"``; its loss is in nats per answer token.

    Raises:
        ValueError: no task, or one that does not fit into the first length.
    """
    if not tasks:
        raise bad_value("tasks", "must name one task at least", "none")
    for task in tasks:
        if task.shortest > curriculum.start:
            raise bad_value("Curriculum start", f"must be at least {task.shortest} for {task.name}", curriculum.start)
    feed = Questions(tuple(tasks), curriculum, run.config.steps, run.config.seed)
    while run.step < run.config.steps:
        number = run.step
        entry = run.advance(feed)
        entry.update(task=tasks[number % len(tasks)].name, length=curriculum.length(number, run.config.steps))
        log(entry)
