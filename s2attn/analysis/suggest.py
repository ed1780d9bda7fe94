"""`suggest`: which layers or heads of a trained model can do with sinks and a window, within a loss that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from s2attn.analysis.asking import Asked, Subject
from s2attn.analysis.compare import Comparison, Masses, Text, likelihood, markdown, measured, read_texts, subject_of
from s2attn.core import Unsupported, bad_kind, bad_value, check_int
from s2attn.patterns import Dense, Pattern, PerHead, Recipe, Sink, Window
from s2attn.patterns.runs import Array

MOST_BUDGET = 1.0


@dataclass(frozen=True)
class Unit:
    """A layer, or a KV head of one, that was considered.

    Attributes:
        layer, head: its numbers; the head is None where whole layers were asked for.
        mass: attention mass that sinks and window keep, the mean over its query heads and all judged queries.
        worst: the same for the query of any of its heads that loses the most.
        sparse: whether the suggestion makes it sparse.
    """

    layer: int
    head: int | None
    mass: float
    worst: float
    sparse: bool = False


@dataclass(frozen=True, eq=False)
class Suggestion:
    """What `suggest` found; ``str(suggestion)`` is a table.

    Attributes:
        recipe: the recipe, to use or to save.
        budget: nats per token that it may cost.
        units: what was considered, those that keep the most mass first.
        tried: for each number of sparse units that was measured, the change of the negative log-likelihood.
        comparison: the recipe against the model as it stands, on the same texts.
        left: layers that were not considered, with the reasons.
    """

    recipe: Recipe
    budget: float
    units: tuple[Unit, ...]
    tried: tuple[tuple[int, float], ...]
    comparison: Comparison
    left: tuple[str, ...] = ()

    @property
    def sparse(self) -> int:
        """How many units are sparse."""
        return sum(unit.sparse for unit in self.units)

    def lines(self) -> list[list[str]]:
        """The units as rows of a table, the head of it first."""
        rows = [["layer", "KV head", "mass kept", "least query", "suggested"]]
        for unit in self.units:
            shares = (f"{100 * share:.2f} %" for share in (unit.mass, unit.worst))
            rows.append([str(unit.layer), "all" if unit.head is None else str(unit.head), *shares, "sparse" if unit.sparse else "dense"])
        return rows

    def sentence(self) -> str:
        """The figures of the whole model in one line."""
        found = self.comparison
        return (
            f"{self.sparse} of {len(self.units)} can be sparse at {found.nll_change:+.4f} nats a token (budget {self.budget:g}); "
            f"{100 * found.density.mean():.1f} % of dense attention's pairs are left, KL {found.kl:.4f}"
        )

    def __str__(self) -> str:
        notes = (f"- {note}" for note in (*self.left, *self.comparison.notes))
        return "\n".join([self.sentence(), *notes, *markdown(self.lines())])


def suggest(
    model: Any,
    tokens: Tensor | Sequence[Sequence[int]] | Sequence[int],
    budget: float,
    *,
    sink: int = 64,
    window: int = 512,
    by: str = "head",
    last: int | None = None,
) -> Suggestion:
    """Find layers or heads of a model that can see sinks and a window alone, at a cost that is measured and not predicted.

    The model reads the texts once, while the attention mass that sinks and a window would keep is measured in every layer. Heads are
    ordered by it. Then the model reads the texts with the first n heads sparse, n by bisection, until the most of them are found whose
    negative log-likelihood stays within the budget. That is about ``log2(heads) + 3`` readings; one head more would have been over the
    budget, another choice of as many heads may be better.

    Nothing but sinks with a window is ever suggested, and the unit that would lose the most stays dense: all else needs training. What a
    budget on these texts does not show is what these texts do not need: a model that must find things far back is to be probed on texts
    where things are far back.

    Args:
        model: as in `compare`, whose memory is needed here too.
        tokens: texts, longer than sinks and window together.
        budget: nats per token that the negative log-likelihood may rise by, 0 to 1; 0.01 is one per cent of perplexity.
        sink, window: tokens that a sparse head sees: the first ones, and the last ones.
        by: "head" to decide for each KV head, "layer" for whole layers.
        last: as in `compare`.

    Raises:
        ValueError, TypeError: texts that are too short, a budget out of range; before any measurement.
        Unsupported: as in `compare`, and a model of which no layer can be changed.

    >>> import torch
    >>> from experiments.model import LanguageModel, ModelConfig
    >>> model = LanguageModel(ModelConfig(layers=2)).eval()  # random weights: the numbers mean nothing
    >>> found = suggest(model, torch.arange(300) % 50, 0.5, sink=4, window=64)
    >>> len(found.units), found.comparison.nll_change <= 0.5
    (8, True)
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise bad_kind("budget", "must be a number of nats per token", budget)
    if not 0 <= budget <= MOST_BUDGET:
        raise bad_value("budget", f"must be 0 to {MOST_BUDGET:g} nats per token", budget)
    if by not in ("head", "layer"):
        raise bad_value("by", "must be 'head' or 'layer'", repr(by))
    pattern = Sink(check_int("sink", sink, 1)) | Window(check_int("window", window, 1))
    subject, texts = subject_of(model), read_texts(tokens, last, least=sink + window + 2)
    search = Search(subject, texts, pattern, by == "head")
    units, base = search.measure()
    count, tried = search.bisect(units, base, float(budget))
    units = [replace(unit, sparse=i < count) for i, unit in enumerate(units)]
    recipe = search.recipe(units)
    return Suggestion(recipe, float(budget), tuple(units), tuple(tried), measured(subject, recipe, texts), tuple(search.left.values()))


@dataclass(eq=False)
class Search:
    """The readings of one call of `suggest`."""

    subject: Subject
    texts: Sequence[Text]
    pattern: Pattern
    heads: bool

    def __post_init__(self) -> None:
        self.left: dict[int, str] = {}

    def measure(self) -> tuple[list[Unit], float]:
        """The units, those that lose the least first, and the negative log-likelihood of the model as it stands."""
        mass, worst, nll = dict[int, Array](), dict[int, Array](), 0.0
        for text in self.texts:
            looked = Masses(lambda _: self.pattern, text.judged)

            def visit(asked: Asked, looked: Masses = looked) -> None:
                if asked.own == Dense() and asked.refusal is None:
                    looked(asked)
                else:
                    why = asked.refusal or "it does not see everything as it stands"
                    self.left[asked.layer] = f"layer {asked.layer} is left as it is: {why}"

            nll += likelihood(self.subject.logits(text.inputs, visit, text.judged), text.targets)
            for layer in looked.total:
                mass[layer] = mass.get(layer, 0.0) + looked.total[layer] / self.rows
                worst[layer] = looked.least[layer] if layer not in worst else worst[layer].clip(max=looked.least[layer])
        open_layers = [layer for layer in mass if layer not in self.left]  # a window may cut the longer texts alone
        if not open_layers:
            raise Unsupported("no layer of this model can be changed", {"model": list(self.left.values())})
        units = [unit for layer in open_layers for unit in self._units(layer, mass[layer], worst[layer])]
        return sorted(units, key=lambda unit: -unit.mass), nll / self.rows

    def bisect(self, units: Sequence[Unit], base: float, budget: float) -> tuple[int, list[tuple[int, float]]]:
        """How many units, in their order, stay within the budget where one more does not, never all of them; and all measurements."""
        tried: dict[int, float] = {0: 0.0}
        low, high = 0, max(1, len(units))  # `low` fits, `high` does not, or would leave nothing that sees everything
        step = high - 1
        while high - low > 1:
            sparse = [replace(unit, sparse=i < step) for i, unit in enumerate(units)]
            tried[step] = self.nll(self.recipe(sparse)) - base
            low, high = (step, high) if tried[step] <= budget else (low, step)
            step = (low + high) // 2
        return low, sorted(tried.items())

    def nll(self, recipe: Recipe) -> float:
        """Of a next token of the texts, under a recipe."""

        def visit(asked: Asked) -> Pattern | None:
            pattern = recipe.pattern(asked.layer)
            return None if pattern == asked.own else pattern

        sums = (likelihood(self.subject.logits(text.inputs, visit, text.judged), text.targets) for text in self.texts)
        return sum(sums) / self.rows

    def recipe(self, units: Sequence[Unit]) -> Recipe:
        """Dense but for the sparse units; layers that were left aside keep what they have."""
        layers: dict[int, Pattern] = {}
        for layer, known in enumerate(self.subject.layers):
            mine = [unit for unit in units if unit.layer == layer]
            sparse = {unit.head: self.pattern for unit in mine if unit.sparse and unit.head is not None}
            if mine and all(unit.sparse for unit in mine):
                layers[layer] = self.pattern
            elif sparse:
                layers[layer] = PerHead(sparse, default=Dense())
            elif known.own is None:
                raise Unsupported("a recipe cannot say what this model has", {f"layer {layer}": [str(known.refusal)]})
            elif known.own != Dense():
                layers[layer] = known.own
        return Recipe(Dense(), layers=layers)

    @property
    def rows(self) -> int:
        return sum(text.judged for text in self.texts)

    def _units(self, layer: int, mass: Array, worst: Array) -> list[Unit]:
        if not self.heads:
            return [Unit(layer, None, float(mass.mean()), float(worst.min()))]
        groups = self.subject.layers[layer].num_kv_heads
        both = zip(mass.reshape(groups, -1).mean(1), worst.reshape(groups, -1).min(1), strict=True)
        return [Unit(layer, head, float(kept), float(least)) for head, (kept, least) in enumerate(both)]
