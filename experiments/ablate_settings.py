"""What an ablation compares, as values: the model, its text, the tasks, the recipes, the budget of pairs, the seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiments.ablate_match import Matched, Shape, designs, match
from experiments.model import ModelConfig
from experiments.tasks import Curriculum, Stretch, task_named
from experiments.tasks.score import DEPTHS
from experiments.train import TrainConfig
from s2attn.core import bad_value, check_int

Record = dict[str, Any]
SIZES = ("tiny", "small", "large")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Scored:
    """Which tasks are learned, along which lengths, and where they are scored.

    Attributes:
        names: of `TASKS`; none leaves the tasks out.
        train: steps, learning rate and warm-up; batch and context follow the curriculum.
        stretch: scale rotary positions by this method at lengths above the curriculum's end; None leaves them as they are.
    """

    names: tuple[str, ...]
    train: TrainConfig
    curriculum: Curriculum
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = DEPTHS
    samples: int = 8
    stretch: str | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            task = task_named(name)
            if task.shortest > min(self.curriculum.start, *self.lengths):
                raise bad_value("task lengths", f"must be at least {task.shortest} for {name}", (self.curriculum.start, *self.lengths))
        if self.stretch is not None:
            Stretch(self.curriculum.end, self.stretch)

    @property
    def tokens(self) -> int:
        """Tokens that a model reads while it learns."""
        return self.train.steps * self.curriculum.step_tokens if self.names else 0


SMALL = ModelConfig(layers=8, width=64, heads=4, kv_heads=2, head_dim=16, hidden=192)
LARGE = ModelConfig(layers=16, width=512, heads=8, kv_heads=4, head_dim=64, hidden=1536)
TINY = ModelConfig(layers=4, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48)


@dataclass(frozen=True)
class AblateSettings:
    """Everything that an ablation does, as values; :meth:`of` has two sizes of it.

    Attributes:
        text: the training of the language models, of which the validation loss comes.
        reads_text: False leaves that training out, and only the tasks are learned; pairs are still counted at the context of ``text``.
        budget: listed pairs of every recipe over those of a dense model, all layers together.
        tolerance: greatest difference from the budget that counts as equal.
        block: tokens of the grid that patterns live on.
        seeds: of weights, data and tasks; a run of its own for each recipe and seed.
        max_files: read only so many files of text; None reads all.
        device: "cpu" or "cuda", where models are trained and asked.
    """

    size: str
    model: ModelConfig
    text: TrainConfig
    tasks: Scored
    budget: float
    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tolerance: float = 0.02
    block: int = 16
    max_files: int | None = None
    device: str = "cpu"
    reads_text: bool = True

    def __post_init__(self) -> None:
        known = designs(self.model.layers)
        for name in self.recipes:
            if name not in known:
                raise bad_value("recipes", f"must be among {', '.join(known)}", repr(name))
        if not self.recipes or not self.seeds:
            raise bad_value("recipes and seeds", "must not be empty", (self.recipes, self.seeds))
        for name in ("recipes", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise bad_value(name, "must not repeat", getattr(self, name))
        for seed in self.seeds:
            check_int("seeds", seed, 0)
        if not self.reads_text and not self.tasks.names:
            raise bad_value("steps and tasks", "must not leave out both", "neither")
        if self.device not in DEVICES:
            raise bad_value("device", f"must be one of {', '.join(DEVICES)}", repr(self.device))

    @classmethod
    def of(cls, size: str) -> AblateSettings:
        """A whole ablation: ``tiny`` runs in seconds and measures nothing, ``small`` is for a machine of two cores, ``large`` for a
        graphics card: 50M parameters, 100M tokens of text for each recipe, tasks up to 128k.

        >>> AblateSettings.of("small").text.context, AblateSettings.of("large").text.context, AblateSettings.of("tiny").is_tiny
        (1024, 8192, True)
        """
        if size not in SIZES:
            raise bad_value("size", f"must be one of {', '.join(SIZES)}", repr(size))
        if size == "tiny":
            learning = TrainConfig(steps=4, warmup=1, eval_every=2, eval_windows=2, batch=1, context=256)
            tasks = Scored(("passkey", "recall"), learning, Curriculum(64, 128, 256), (64, 128), (0.0, 1.0), samples=2)
            return cls(size, TINY, learning, tasks, 0.6, tuple(designs(TINY.layers)), seeds=(0, 1), max_files=4)
        if size == "large":
            kind = TrainConfig(precision="bfloat16", recompute=True)
            text = replace(kind, steps=1600, warmup=80, batch=8, context=8192, learning_rate=1e-3, eval_every=200, eval_windows=16)
            learning = replace(kind, steps=1200, warmup=40, learning_rate=1e-3, weight_decay=0.01)
            tasks = Scored(("passkey", "recall"), learning, Curriculum(4096, 131072, 131072), (16384, 32768, 65536, 131072))
            return cls(size, LARGE, text, tasks, 0.3, tuple(designs(LARGE.layers)), block=64, device="cuda")
        text = TrainConfig(steps=1000, batch=1, context=1024, eval_every=200, eval_windows=32)
        learning = TrainConfig(steps=1200, warmup=40, learning_rate=3e-3, weight_decay=0.01)
        tasks = Scored(("passkey", "recall"), learning, Curriculum(64, 1024, 1024), (256, 512, 1024, 2048))
        return cls(size, SMALL, text, tasks, 0.3, tuple(designs(SMALL.layers)))

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def shape(self) -> Shape:
        """What pairs are counted over: the model at the context of its text."""
        return Shape.of(self.model, self.text.context, self.block)

    @property
    def text_tokens(self) -> int:
        """Tokens of text that a model reads."""
        return self.text.steps * self.text.batch * self.text.context if self.reads_text else 0

    def with_steps(self, text: int | None = None, tasks: int | None = None) -> AblateSettings:
        """The same with other numbers of steps, warmed up and validated in proportion; 0 on text leaves it out."""
        made = self
        steps = None if text is None else check_int("steps", text, 0)
        if steps == 0:
            made = replace(made, reads_text=False)
        elif steps is not None:
            made = replace(made, text=replace(made.text, steps=steps, warmup=steps // 20, eval_every=max(1, -(-steps // 8))))
        if tasks is not None:
            steps = check_int("task steps", tasks, 1)
            made = replace(made, tasks=replace(made.tasks, train=replace(made.tasks.train, steps=steps, warmup=steps // 30)))
        return made

    def with_precision(self, precision: str) -> AblateSettings:
        """The same, trained in float32 or bfloat16; answers to the tasks are judged in float32 in any case."""
        learning = replace(self.tasks.train, precision=precision)
        return replace(self, text=replace(self.text, precision=precision), tasks=replace(self.tasks, train=learning))

    def facts(self) -> Record:
        """The settings that every run of a folder must share, as plain JSON values: all but the lists of recipes and seeds."""
        values = asdict(replace(self, model=self.model.with_recipe(SMALL.recipe)))
        for name in ("recipes", "seeds", "size", *(("reads_text",) if self.reads_text else ())):
            del values[name]
        values["model"] = json.loads(self.model.with_recipe(SMALL.recipe).to_json())
        return json.loads(json.dumps(values))

    @classmethod
    def from_facts(cls, facts: Record, size: str, recipes: Sequence[str], seeds: Sequence[int]) -> AblateSettings:
        """The settings of which :meth:`facts` are the rest.

        >>> tiny = AblateSettings.of("tiny")
        >>> AblateSettings.from_facts(tiny.facts(), tiny.size, tiny.recipes, tiny.seeds) == tiny
        True
        """
        asked, curriculum = facts["tasks"], Curriculum(**facts["tasks"]["curriculum"])
        lists: Record = {name: tuple(asked[name]) for name in ("names", "lengths", "depths")}
        tasks: Record = {**asked, **lists, "train": TrainConfig(**asked["train"]), "curriculum": curriculum}
        model, text = ModelConfig.from_json(json.dumps(facts["model"])), TrainConfig(**facts["text"])
        parts: Record = {"model": model, "text": text, "tasks": Scored(**tasks)}
        return cls(**{**facts, **parts}, size=size, recipes=tuple(recipes), seeds=tuple(seeds))

    def matched(self) -> list[Matched]:
        """The recipes with their parameters, all of equal pairs where that is possible."""
        return [match(name, self.shape, self.budget, tolerance=self.tolerance) for name in self.recipes]
