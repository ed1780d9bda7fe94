"""What an ablation's record says, as the numbers that the page of evidence compares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from experiments.ablate import Outcome
from experiments.ablate_match import Matched
from experiments.ablate_record import outcome_of
from experiments.ablate_report import losses_of, runs_of, score_of, summary
from experiments.ablate_settings import Record
from experiments.model import LanguageModel
from experiments.paired import Paired, paired
from experiments.tasks import Scores

FAR = 8
"""So many times the length that a curriculum starts with is where a model shall still answer."""


@dataclass(frozen=True)
class Found:
    """One record, read.

    Attributes:
        name: of its file.
    """

    name: str
    outcome: Outcome
    command: str

    @classmethod
    def of(cls, name: str, record: Record) -> Found:
        return cls(name, outcome_of(record), record["command"])

    @property
    def recipes(self) -> list[Matched]:
        """Those that have a finished run."""
        return [one for one in self.outcome.recipes if runs_of(self.outcome, one.name)]

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.recipes]

    @property
    def sparse(self) -> list[str]:
        """All but the dense reference."""
        return [name for name in self.names if name != "dense"]

    @property
    def hybrids(self) -> list[str]:
        """S2 with dense layers among the others, the fewest first."""
        found = [one for one in self.recipes if one.name.startswith("s2") and one.recipe.dense_layers]
        return [one.name for one in sorted(found, key=lambda one: len(one.recipe.dense_layers))]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.outcome.settings.tasks.names

    @property
    def far(self) -> int | None:
        """The length that is :data:`FAR` times the start of the curriculum; None where nothing was asked there."""
        tasks = self.outcome.settings.tasks
        length = FAR * tasks.curriculum.start
        return length if tasks.names and length in tasks.lengths else None

    @cached_property
    def parameters(self) -> int:
        """Of every model."""
        return LanguageModel(self.outcome.settings.model).num_parameters

    @cached_property
    def summary(self) -> list[Record]:
        return summary(self.outcome)

    def equal(self, *names: str) -> bool:
        """Whether these list equally many pairs."""
        return all(one.equal(self.outcome.settings.tolerance) for one in self.recipes if one.name in names)

    def loss(self, name: str) -> dict[int, float]:
        """Validation loss by seed."""
        return losses_of(runs_of(self.outcome, name))

    def scores(self, name: str, task: str) -> dict[int, Scores]:
        """The scores of a recipe by seed."""
        return {seed: score_of(run, task) for seed, run in runs_of(self.outcome, name).items()}

    def exact(self, name: str, task: str) -> dict[int, float]:
        """Exact answers over all lengths and depths, by seed."""
        return {seed: one.mean for seed, one in self.scores(name, task).items()}

    def at(self, name: str, task: str, length: int) -> dict[int, tuple[float, ...]]:
        """Exact answers of every depth at one length, by seed."""
        return {seed: one.exact[one.lengths.index(length)] for seed, one in self.scores(name, task).items()}

    def mean_at(self, name: str, task: str, length: int) -> float:
        """Exact answers at one length, over all depths and seeds."""
        return mean(share for row in self.at(name, task, length).values() for share in row)

    def loss_beside(self, name: str, other: str) -> Paired | None:
        """The loss over that of another recipe, less 1."""
        return paired(self.loss(name), self.loss(other), relative=True)

    def exact_beside(self, name: str, other: str, task: str) -> Paired | None:
        """Exact answers above those of another recipe."""
        return paired(self.exact(name, task), self.exact(other, task))
