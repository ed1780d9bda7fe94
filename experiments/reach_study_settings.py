"""What a study of reach runs, as values: patterns with their numbers of layers, the model, how it learns and where it is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiments.model import ModelConfig
from experiments.tasks import Curriculum
from experiments.train import TrainConfig
from s2attn.core import bad_value, check_int
from s2attn.patterns import Dense, Dilated, Local, LongNet, Pattern, Power, Recipe, Sink, Stride, Window

Record = dict[str, Any]
SIZES = ("tiny", "small")
DIGITS = 10
"""Different pieces: a guess is right once in so many times."""


@dataclass(frozen=True)
class Subject:
    """A pattern that every layer has, and the numbers of layers that it is tried with."""

    meaning: str
    pattern: Pattern
    layers: tuple[int, ...]


def subjects(length: int, block: int) -> Mapping[str, Subject]:
    """The patterns of the study by name, for contexts of ``length`` tokens on a grid of ``block`` tokens."""
    blocks = length // block
    stride, window = blocks // 4, length // 8
    return {
        "window": Subject("the last eighth of the context", Window(window), (1, 2, 4, 6)),
        "power": Subject("the first block, and distances 0, 1, 2, 4, ... blocks", Sink(block) | Power(block=block), (1, 2, 3, 4)),
        "stride": Subject("two blocks, and every fourth of a context, alike in all heads", _strided(stride, 0, block), (1, 2, 4)),
        "s2": Subject("two blocks, and as many far ones, others in every head and layer", _strided(stride, "head", block), (1, 2)),
        "dilated": Subject("every second block, by distance", Dilated(2, block=block), (1, 4)),
        "longnet": Subject("aligned segments that double while they thin out", LongNet(segment=4, levels=4, block=block), (1, 2, 4)),
        "dense": Subject("everything", Dense(), (1,)),
    }


def _strided(stride: int, offset: int | str, block: int) -> Pattern:
    return Local(2, block=block) | Stride(stride, offset, block=block)


@dataclass(frozen=True)
class Case:
    """One model of the study."""

    pattern: str
    layers: int
    seed: int

    @property
    def name(self) -> str:
        """Of its file.

        >>> Case("power", 2, 0).name
        'power-layers2-seed0'
        """
        return f"{self.pattern}-layers{self.layers}-seed{self.seed}"


@dataclass(frozen=True)
class ReachSettings:
    """Everything that a study of reach does, as values; :meth:`of` has two sizes of it.

    Attributes:
        model: its recipe and number of layers are those of each case.
        train: steps, learning rate and warm-up; batch and context follow the curriculum.
        block: tokens of the grid that patterns live on.
        place_every, question_every: tokens between the places of the piece, and between the tokens that are asked, when a model is judged.
        samples: sequences per place, a multiple of the digits, each of which is the piece equally often.
        patterns: names of `subjects`.
        deepest: leave cases of more layers out.
        seeds: of weights and data; a run of its own for each case and seed.
    """

    size: str
    model: ModelConfig
    train: TrainConfig
    curriculum: Curriculum
    patterns: tuple[str, ...]
    block: int = 16
    place_every: int = 16
    question_every: int = 12
    samples: int = 40
    deepest: int = 6
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        known = subjects(self.length, self.block)
        for name in self.patterns:
            if name not in known:
                raise bad_value("patterns", f"must be among {', '.join(known)}", repr(name))
        for name in ("patterns", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise bad_value(name, "must be one or more, none twice", values)
        for seed in self.seeds:
            check_int("seeds", seed, 0)
        for name in ("place_every", "question_every", "samples", "deepest"):
            check_int(name, getattr(self, name), 1)
        if self.samples % DIGITS:
            raise bad_value("samples", f"must be a multiple of {DIGITS}", self.samples)
        if not self.questions:
            raise bad_value("place_every", f"must leave a question behind the first place in {self.length} tokens", self.place_every)

    @classmethod
    def of(cls, size: str) -> ReachSettings:
        """A whole study: ``tiny`` runs in seconds and measures nothing, ``small`` is for one core.

        >>> ReachSettings.of("small").length, ReachSettings.of("tiny").is_tiny
        (512, True)
        """
        if size not in SIZES:
            raise bad_value("size", f"must be one of {', '.join(SIZES)}", repr(size))
        if size == "tiny":
            model = ModelConfig(layers=1, width=16, heads=2, kv_heads=2, head_dim=8, hidden=16, vocabulary=128, look_back=0)
            train = TrainConfig(steps=4, warmup=1, weight_decay=0.01)
            named = tuple(subjects(128, 16))
            return cls(size, model, train, Curriculum(32, 128, 128), named, place_every=32, question_every=24, samples=10, deepest=2)
        model = ModelConfig(layers=1, width=48, heads=4, kv_heads=4, head_dim=16, hidden=96, vocabulary=128, look_back=0)
        train = TrainConfig(steps=400, warmup=20, learning_rate=3e-3, weight_decay=0.01)
        return cls(size, model, train, Curriculum(32, 512, 2048), tuple(subjects(512, 16)))

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def length(self) -> int:
        """Tokens that a model reads at last, and when it is judged."""
        return self.curriculum.end

    @property
    def places(self) -> tuple[int, ...]:
        """Where the piece stands when a model is judged."""
        return tuple(range(self.place_every // 2, self.length, self.place_every))

    @property
    def questions(self) -> tuple[int, ...]:
        """Which tokens are asked then: the last one, and others before it."""
        return tuple(reversed(range(self.length - 1, self.places[0], -self.question_every))) if self.places else ()

    @property
    def cases(self) -> list[Case]:
        """All of a seed come before the next seed."""
        known = subjects(self.length, self.block)
        depths = [(name, layers) for name in self.patterns for layers in known[name].layers if layers <= self.deepest]
        return [Case(name, layers, seed) for seed in self.seeds for name, layers in depths]

    def config(self, case: Case) -> ModelConfig:
        """The model of a case, with its recipe."""
        return replace(self.model, layers=case.layers, recipe=Recipe(subjects(self.length, self.block)[case.pattern].pattern))

    def with_steps(self, steps: int) -> ReachSettings:
        """The same with another number of steps, warmed up in proportion."""
        steps = check_int("steps", steps, 1)
        return replace(self, train=replace(self.train, steps=steps, warmup=steps // 20))

    def facts(self) -> Record:
        """The settings that every run of a folder must share, as plain JSON values: all but what tells its cases apart."""
        values = asdict(replace(self, model=self.model.with_recipe(Recipe(Dense()))))
        for name in ("patterns", "deepest", "seeds", "size"):
            del values[name]
        values["model"] = json.loads(self.model.with_recipe(Recipe(Dense())).to_json())
        for name in ("layers", "recipe"):
            del values["model"][name]
        for name in ("batch", "context", "eval_every", "eval_windows", "seed"):
            del values["train"][name]
        return json.loads(json.dumps(values))
