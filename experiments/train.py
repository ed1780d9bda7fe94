"""Training of small models, alone or side by side: same data in the same order, steps taken in turn so that their times compare."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from experiments.data import Batch, Feed
from experiments.files import read_tensors, write_file
from experiments.model import Block, LanguageModel, ModelConfig
from experiments.place import ALONE, Place
from s2attn.core import StrPath, as_path, bad_value, check_int

Log = Callable[[dict[str, Any]], None]
PRECISIONS = ("float32", "bfloat16")
MOST = 2**31 - 1
"""Steps, rows or tokens; more is taken for a mistake."""
TRAINING: dict[str, type] = {"step": int, "history": list, "optimizer": dict, "generators": list}
"""What ``training.pt`` holds."""


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train; the learning rate warms up linearly and then falls along a cosine to a tenth.

    Attributes:
        batch: rows of a step, over all processes.
        context: tokens of a row.
        precision: "float32", or "bfloat16": autocast over weights that stay float32.
        compile: compile each block; ``compile_backend`` is torch's name of who does it.
        recompute: run each block again in the backward pass instead of keeping what is inside it (gradient checkpointing).
    """

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
    precision: str = "float32"
    compile: bool = False
    compile_backend: str = "inductor"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "eval_every", "eval_windows"):
            check_int(name, getattr(self, name), 1, MOST)
        check_int("warmup", self.warmup, 0, MOST)
        check_int("seed", self.seed, 0, 2**63 - 1)
        if not self.learning_rate > 0:
            raise bad_value("learning_rate", "must be positive", self.learning_rate)
        if not self.clip > 0:
            raise bad_value("clip", "must be positive", self.clip)
        if not self.weight_decay >= 0:
            raise bad_value("weight_decay", "must not be negative", self.weight_decay)
        if self.precision not in PRECISIONS:
            raise bad_value("precision", f"must be one of {', '.join(PRECISIONS)}", repr(self.precision))

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
        place: the device, and the processes that share the work; the model is moved there.
        history: one dict per step, ``{"step", "loss", "seconds", "rate", "gradient_norm"}``, and per evaluation,
            ``{"step", "validation_loss"}``; nats per token.
    """

    name: str
    model: LanguageModel
    config: TrainConfig
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    place: Place = ALONE

    def __post_init__(self) -> None:
        if self.config.batch % self.place.ranks:
            raise bad_value("batch", f"must be a multiple of the processes ({self.place.ranks})", self.config.batch)
        self.model.recompute = self.config.recompute
        if self.config.compile:
            compile_blocks(self.model, self.config.compile_backend)
        self.place.spread(self.model, self.model.blocks)
        matrices = [weight for weight in self.model.parameters() if weight.dim() >= 2]
        vectors = [weight for weight in self.model.parameters() if weight.dim() < 2]
        groups = [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), fused=True)

    def advance(self, feed: Feed) -> dict[str, Any]:
        """Take one step and return its entry of the history."""
        config = self.config
        batch = feed.train(self.step).to(self.place.device)
        began = time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        mean = self.place.total(loss.item())[0] / self.place.ranks
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.step += 1
        spent = {"seconds": time.perf_counter() - began, "rate": config.rate(self.step - 1), "gradient_norm": norm.item()}
        return self._note({"step": self.step, "loss": mean, **spent})

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per token, in the precision of the configuration."""
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            logits = self.model(batch.inputs, batch.cu_seqlens)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())

    @torch.no_grad()
    def evaluate(self, feed: Feed) -> dict[str, Any]:
        """Mean loss over what the feed keeps back."""
        self.model.eval()
        batches, place = feed.validation(), self.place
        total = 0.0
        for first in range(0, len(batches), place.ranks):
            mine = first + place.rank  # sharded weights need every process in every turn, whether or not its batch counts
            loss = self.loss(batches[min(mine, len(batches) - 1)].to(place.device)).item()
            total += loss if mine < len(batches) else 0.0
        return self._note({"step": self.step, "validation_loss": place.total(total)[0] / len(batches)})

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

    def state(self, **more: Any) -> RunState:
        """Everything that :meth:`resume` needs, put together from all processes, each of which must call it.

        Args:
            more: plain values that shall be kept too.
        """
        weights, optimizer = get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        generators = self.place.gather(random_state(self.place.device))
        state = {"step": self.step, "history": self.history, "optimizer": optimizer, "generators": generators, **more}
        return RunState(self.model.config, weights, state)

    def save(self, folder: Path) -> None:
        """Write ``config.json`` (with the recipe), ``weights.pt``, and ``training.pt``, from which :meth:`resume` goes on."""
        state = self.state()
        self.place.first_does(lambda: state.write(folder))

    @classmethod
    def resume(cls, folder: Path, name: str, config: TrainConfig, place: Place = ALONE) -> Run:
        """The run that :meth:`save` wrote; it continues as if it had never stopped.

        Raises:
            ValueError: the folder holds no run of this model, or files of another kind.
        """
        rule = "must be the state of a training run of this model"
        state = read_tensors(folder / "training.pt", rule, TRAINING)
        run = cls(name, load_model(folder), config, place=place)
        weights = read_tensors(folder / "weights.pt", "must hold the weights of this model", {})
        options = StateDictOptions(full_state_dict=True)
        try:
            set_state_dict(
                run.model,
                run.optimizer,
                model_state_dict=weights,
                optim_state_dict=state["optimizer"],
                options=options,
            )
            if len(state["generators"]) == place.ranks:
                set_random_state(place.device, state["generators"][place.rank])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            came = f"{folder / 'training.pt'} ({type(error).__name__}: {str(error)[:80]})"
            raise bad_value("training.pt", rule, came) from error
        run.step, run.history = state["step"], state["history"]
        return run


def compile_blocks(model: LanguageModel, backend: str) -> None:
    """Compile each block of a model: its forward alone, so that what FSDP hangs around a block stays outside."""
    plain = Block.forward
    for number, block in enumerate(model.blocks):
        # The compiler counts versions by code object, and takes for variable what differs among them. Blocks differ in layer and pattern,
        # so each gets a code object of its own.
        code = plain.__code__.replace(co_name=f"forward_{number}")
        own = FunctionType(code, plain.__globals__, code.co_name, plain.__defaults__)
        block.forward = torch.compile(MethodType(own, block), fullgraph=True, backend=backend)


@dataclass(frozen=True, eq=False)
class RunState:
    """A run as it is written to the disk.

    Attributes:
        weights: of the model, by name.
        training: step, history, the optimizer's tensors by the names of the weights, and the states of torch's generators.
    """

    config: ModelConfig
    weights: dict[str, Any]
    training: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write ``config.json``, ``weights.pt`` and ``training.pt``.

        Raises:
            OSError: a file could not be written; what stood there before is as it was.
        """
        write_model(self.config, self.weights, folder)
        write_file(folder / "training.pt", self.training)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, on the CPU and on the device."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Set what :func:`random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def train_in_turn(
    runs: Sequence[Run], feed: Feed, log: Log, *, seconds: float = math.inf, after: Callable[[], None] = lambda: None
) -> None:
    """Train all ``runs`` to their end, a step of each in turn; ``log`` gets every entry of every history, with the run's name.

    Who goes first changes every step, so that no run has the warm caches of the other for itself.

    Args:
        seconds: whenever the planned steps turn out not to fit into them, the end of all runs is brought forward.
        after: called when all runs have taken a step, and have been judged where it is time for that.
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
                log({"run": run.name, **run.advance(feed)})
        if (now + 1) % config.eval_every == 0 or now + 1 == config.steps:
            for run in runs:
                log({"run": run.name, **run.evaluate(feed)})
        after()


def steps_that_fit(runs: Sequence[Run], planned: int, left: float) -> int:
    """The planned number of steps, or as many as fit into ``left`` seconds at the speed of the last ten steps, one at least."""
    # The median: a hiccup of the machine has cost its time already and says nothing about the steps to come.
    speed = sum(median([entry["seconds"] for entry in run.history if "seconds" in entry][-10:]) for run in runs)
    return min(planned, runs[0].step + max(1, int(min(left / speed, planned))))


def save_model(model: LanguageModel, folder: StrPath) -> None:
    """Write ``config.json``, which holds the recipe, and ``weights.pt`` into ``folder``."""
    folder = as_path("folder", folder)
    write_model(model.config, model.state_dict(), folder)


def write_model(config: ModelConfig, weights: dict[str, Any], folder: StrPath) -> None:
    """Write what :func:`load_model` reads."""
    folder = as_path("folder", folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "config.json", config.to_json() + "\n")
    write_file(folder / "weights.pt", weights)


def load_model(folder: StrPath) -> LanguageModel:
    """The model that :func:`save_model` wrote; only tensors are unpickled.

    Raises:
        ValueError: the folder holds no checkpoint, or its configuration cannot be read.
    """
    folder = as_path("folder", folder)
    if not (folder / "config.json").is_file():
        raise bad_value("folder", "must hold config.json and weights.pt", folder)
    try:
        config = ModelConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
        model = LanguageModel(config)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise bad_value("config.json", f"must describe a model ({error})", folder) from None
    rule = "must hold the weights of the model in config.json"
    weights = read_tensors(folder / "weights.pt", rule, {})
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        raise bad_value("weights.pt", rule, f"{folder / 'weights.pt'} ({said[:200]})") from None
    return model
