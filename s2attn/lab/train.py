"""Training of small models side by side: same data in the same order, steps taken in turn so that their times compare."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2attn.core import bad_value, check_int
from s2attn.lab.data import train_batch, validation_batches
from s2attn.lab.model import LanguageModel, ModelConfig

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainConfig:
    """How long and on what to train; the learning rate warms up linearly and then falls along a cosine to a tenth."""

    steps: int = 150
    batch: int = 2
    context: int = 2048
    learning_rate: float = 4e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 50
    eval_windows: int = 12

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "eval_every", "eval_windows"):
            check_int(name, getattr(self, name), 1)
        check_int("warmup", self.warmup, 0)
        if not self.learning_rate > 0:
            raise bad_value("learning_rate", "must be positive", self.learning_rate)

    def rate(self, step: int) -> float:
        """The learning rate of the step of this number.

        >>> config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
        >>> [round(config.rate(step), 2) for step in (0, 9, 55, 100)]
        [0.1, 1.0, 0.55, 0.1]
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@dataclass
class Run:
    """One model in training: what it needs to go on, and what it has seen.

    Attributes:
        history: one dict per step, ``{"step", "loss", "seconds"}``, and per evaluation, ``{"step", "validation_loss"}``; nats per byte.
    """

    name: str
    model: LanguageModel
    config: TrainConfig
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        matrices = [weight for weight in self.model.parameters() if weight.dim() >= 2]
        vectors = [weight for weight in self.model.parameters() if weight.dim() < 2]
        groups = [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), fused=True)

    def advance(self, text: Tensor) -> dict[str, Any]:
        """Take one step on ``text`` (uint8) and return its entry of the history."""
        config = self.config
        inputs, targets = train_batch(text, self.step, batch=config.batch, context=config.context, seed=config.seed)
        began = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        loss = byte_loss(self.model(inputs), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        return self._note({"step": self.step, "loss": loss.item(), "seconds": time.perf_counter() - began})

    def evaluate(self, text: Tensor) -> dict[str, Any]:
        """Mean loss over evenly spaced windows of ``text``."""
        loss = validation_loss(self.model, text, windows=self.config.eval_windows, context=self.config.context)
        return self._note({"step": self.step, "validation_loss": loss})

    def _note(self, entry: dict[str, Any]) -> dict[str, Any]:
        self.history.append(entry)
        return entry

    def summary(self) -> dict[str, Any]:
        """The last validation loss, as nats and bits per byte, and the median speed."""
        seconds = [entry["seconds"] for entry in self.history if "seconds" in entry]
        losses = [entry["validation_loss"] for entry in self.history if "validation_loss" in entry]
        middle = median(seconds) if seconds else math.nan
        return {
            "name": self.name,
            "parameters": self.model.num_parameters,
            "steps": self.step,
            "bytes_read": self.step * self.config.batch * self.config.context,
            "validation_loss": losses[-1] if losses else math.nan,
            "bits_per_byte": losses[-1] / math.log(2) if losses else math.nan,
            "step_seconds": middle,
            "bytes_per_second": self.config.batch * self.config.context / middle,
            "train_seconds": sum(seconds),
        }

    def save(self, folder: Path) -> None:
        """Write ``config.json`` (with the recipe), ``weights.pt``, and ``training.pt`` from which :meth:`resume` goes on."""
        save_model(self.model, folder)
        torch.save({"step": self.step, "history": self.history, "optimizer": self.optimizer.state_dict()}, folder / "training.pt")

    @classmethod
    def resume(cls, folder: Path, name: str, config: TrainConfig) -> Run:
        """The run that :meth:`save` wrote; it continues as if it had never stopped."""
        run = cls(name, load_model(folder), config)
        state = torch.load(folder / "training.pt", weights_only=True)
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.history = state["step"], state["history"]
        return run


def byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; logits ``(B, T, vocabulary)``, targets int64 ``(B, T)``."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def validation_loss(model: LanguageModel, text: Tensor, *, windows: int, context: int) -> float:
    """Mean loss of ``model`` in nats per byte over ``windows`` evenly spaced pieces of ``text``."""
    model.eval()
    losses = [byte_loss(model(inputs), targets).item() for inputs, targets in validation_batches(text, windows=windows, context=context)]
    return sum(losses) / len(losses)


def train_in_turn(runs: Sequence[Run], train: Tensor, validation: Tensor, log: Log, *, seconds: float = math.inf) -> None:
    """Train all ``runs`` to their end, a step of each in turn; ``log`` gets every entry of every history, with the run's name.

    Who goes first changes every step, so that no run has the warm caches of the other for itself.

    Args:
        seconds: whenever the planned steps turn out not to fit into them, the end of all runs is brought forward.
    """
    began, config = time.perf_counter(), runs[0].config
    planned = config.steps
    while any(run.step < run.config.steps for run in runs):
        now = min(run.step for run in runs)
        if now and now % 10 == 0 and seconds < math.inf:
            config = replace(config, steps=steps_that_fit(runs, planned, seconds - (time.perf_counter() - began)))
            for run in runs:
                run.config = config
        order = list(runs) if now % 2 == 0 else list(reversed(runs))
        for run in order:
            if run.step == now:
                log({"run": run.name, **run.advance(train)})
        if (now + 1) % config.eval_every == 0 or now + 1 == config.steps:
            for run in runs:
                log({"run": run.name, **run.evaluate(validation)})


def steps_that_fit(runs: Sequence[Run], planned: int, left: float) -> int:
    """The planned number of steps, or as many as fit into ``left`` seconds at the speed of the last ten steps, one at least."""
    # The median: a hiccup of the machine has cost its time already and says nothing about the steps to come.
    speed = sum(median([entry["seconds"] for entry in run.history if "seconds" in entry][-10:]) for run in runs)
    return min(planned, runs[0].step + max(1, int(min(left / speed, planned))))


def save_model(model: LanguageModel, folder: Path) -> None:
    """Write ``config.json``, which holds the recipe, and ``weights.pt`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(model.config.to_json() + "\n", encoding="utf-8")
    torch.save(model.state_dict(), folder / "weights.pt")


def load_model(folder: Path) -> LanguageModel:
    """The model that :func:`save_model` wrote; only tensors are unpickled.

    Raises:
        ValueError: the folder holds no checkpoint, or its configuration cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise bad_value("folder", "must hold config.json and weights.pt", folder)
    try:
        config = ModelConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise bad_value("config.json", f"must describe a model ({error})", folder) from None
    model = LanguageModel(config)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model
