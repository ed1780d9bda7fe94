"""Learning tasks along a curriculum of lengths, with the lab's own optimizer and schedule; every step reads equally many tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from s2attn.core import bad_value, check_int
from s2attn.lab.tasks.base import Task, TaskBatch
from s2attn.lab.train import Run

Log = Callable[[dict[str, Any]], None]


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


def learn(run: Run, tasks: Sequence[Task], curriculum: Curriculum, log: Log = lambda entry: None) -> None:
    """Train ``run`` on the answers of ``tasks`` until its last step; a run that was saved on the way goes on from there.

    Args:
        log: gets the entry of every step: ``{"step", "loss", "right", "task", "length", "seconds"}``, loss in nats per answer token and
            ``right`` the share of answer tokens that the model held likeliest.

    Raises:
        ValueError: no task, or one that does not fit into the first length.
    """
    if not tasks:
        raise bad_value("tasks", "must name one task at least", "none")
    for task in tasks:
        if task.shortest > curriculum.start:
            raise bad_value("Curriculum start", f"must be at least {task.shortest} for {task.name}", curriculum.start)
    while run.step < run.config.steps:
        number = run.step
        batch = curriculum.batch(tasks, number, steps=run.config.steps, seed=run.config.seed)
        entry = {**_step(run, batch), "task": tasks[number % len(tasks)].name, "length": batch.inputs.shape[1]}
        run.history.append(entry)
        log(entry)


def _step(run: Run, batch: TaskBatch) -> dict[str, Any]:
    began = time.perf_counter()
    run.model.train()
    for group in run.optimizer.param_groups:
        group["lr"] = run.config.rate(run.step)
    asked = batch.loss_mask
    logits, answers = run.model(batch.inputs)[asked].float(), batch.targets[asked]
    loss = F.cross_entropy(logits, answers)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip)
    run.optimizer.step()
    run.step += 1
    right = (logits.argmax(-1) == answers).float().mean().item()
    return {"step": run.step, "loss": loss.item(), "right": right, "seconds": time.perf_counter() - began}
