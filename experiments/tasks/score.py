"""Scores: whether a model's answer is right, at every depth and length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.model import LanguageModel
from experiments.tasks.base import Task, TaskBatch
from experiments.tasks.rope import METHODS, stretched
from s2attn.core import bad_value, check_int

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Scores:
    """How often a model is right at one task.

    Attributes:
        lengths, depths, samples: what was asked: ``samples`` sequences at every length and depth.
        exact: ``[length][depth]``: share of sequences whose whole scored answer is right.
        tokens: ``[length][depth]``: share of the scored tokens that are right.
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    exact: tuple[tuple[float, ...], ...]
    tokens: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> float:
        """Share of all sequences that are right."""
        return sum(map(sum, self.exact)) / (len(self.lengths) * len(self.depths))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_dict` reads them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        grids = {name: tuple(tuple(row) for row in data[name]) for name in ("exact", "tokens")}
        return cls(data["task"], tuple(data["lengths"]), tuple(data["depths"]), data["samples"], **grids)


@dataclass(frozen=True)
class Stretch:
    """Scale rotary positions for lengths above ``trained``, by ``length / trained``; ``method`` as in `stretched`."""

    trained: int
    method: str = "ntk"

    def __post_init__(self) -> None:
        check_int("Stretch trained", self.trained, 1)
        if self.method not in METHODS:
            raise bad_value("Stretch method", f"must be one of {', '.join(METHODS)}", repr(self.method))

    def model(self, model: LanguageModel, length: int) -> LanguageModel:
        """``model``, or a stretched copy of it where ``length`` is above the trained one."""
        return model if length <= self.trained else stretched(model, length / self.trained, self.method)


@torch.no_grad()
def right_answers(model: nn.Module, batch: TaskBatch) -> Tensor:
    """Per sequence the share of scored tokens that are the likeliest under the model, float ``(B,)``; 1.0 is an exact answer.

    The right tokens before each one are given (teacher-forced argmax), one call for all. For an exact answer that says the same as greedy
    decoding from the question: as long as every token so far was the likeliest, both have read the same. The one exception is
    `Copy`, whose scored span is judged after a right beginning.
    """
    model.eval()
    device = next((weight.device for weight in model.parameters()), batch.tokens.device)
    scored = batch.score_mask
    said = model(batch.inputs.to(device)).argmax(-1).to(batch.tokens.device)
    right = (said == batch.targets) & scored
    return right.sum(1) / scored.sum(1)


def score_task(
    model: LanguageModel,
    task: Task,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    samples: int = 8,
    seed: int = 0,
    batch: int = 8,
    stretch: Stretch | None = None,
) -> Scores:
    """Ask ``samples`` sequences at every length and depth; the same ones for every model.

    Args:
        lengths: tokens that the model reads.
        depths: from 0, the start of the context, to 1, right before the question.
        seed: of the sequences; training draws its own from a seed and a step, so that none is met again.
        batch: sequences of one call.
        stretch: rotary scaling of lengths above the trained one; none when left out.

    Raises:
        ValueError: no length or depth, or a length that the task does not fit into.
    """
    if not lengths or not depths:
        raise bad_value("lengths and depths", "must not be empty", (tuple(lengths), tuple(depths)))
    samples, batch = check_int("samples", samples, 1), check_int("batch", batch, 1)
    exact, tokens = [], []
    for length in lengths:
        longer = model if stretch is None else stretch.model(model, length)
        found = [_right_at(longer, task, length, depth, samples=samples, seed=seed, batch=batch) for depth in depths]
        exact.append(tuple((right == 1).float().mean().item() for right in found))
        tokens.append(tuple(right.mean().item() for right in found))
    return Scores(task.name, tuple(lengths), tuple(depths), samples, tuple(exact), tuple(tokens))


def _right_at(model: LanguageModel, task: Task, length: int, depth: float, *, samples: int, seed: int, batch: int) -> Tensor:
    # Three numbers make a seed that no step of a training has: those are pairs.
    parts = [task.batch(length, min(batch, samples - first), seed=(seed, first, length), depth=depth) for first in range(0, samples, batch)]
    return torch.cat([right_answers(model, part) for part in parts])
