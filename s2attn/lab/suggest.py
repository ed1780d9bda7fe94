"""`suggest`: which layers or heads of a trained model can do with sinks and a window, within a loss that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from s2attn.core import Unsupported, bad_kind, bad_value, check_int
from s2attn.lab.asking import Asked, Subject
from s2attn.lab.compare import (
    Comparison,
    Masses,
    Progress,
    Steps,
    Text,
    answering,
    likelihood,
    markdown,
    measured,
    read_texts,
    subject_of,
)
from s2attn.lab.needles import Needle, needles
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


@dataclass(frozen=True)
class Found:
    """A needle: the share of the text before it, and whether the model said it as it stands and under the suggestion."""

    depth: float
    before: bool
    after: bool


@dataclass(frozen=True, eq=False)
class Suggestion:
    """What `suggest` found; ``str(suggestion)`` is a table.

    Attributes:
        recipe: the recipe, to use or to save.
        budget: nats per token that it may cost.
        units: what was considered, in the order in which they become sparse: by their worst query.
        tried: for each number of sparse units that was measured, the change of the negative log-likelihood.
        comparison: the recipe against the model as it stands, on the same texts.
        left: layers that were not considered, with the reasons.
        lost: numbers of sparse units that stayed within the budget and lost a needle.
        needles: numbers that were hidden at several depths, and whether the model found them before and after.
    """

    recipe: Recipe
    budget: float
    units: tuple[Unit, ...]
    tried: tuple[tuple[int, float], ...]
    comparison: Comparison
    left: tuple[str, ...] = ()
    lost: tuple[int, ...] = ()
    needles: tuple[Found, ...] = ()

    @property
    def sparse(self) -> int:
        """How many units are sparse."""
        return sum(unit.sparse for unit in self.units)

    def lines(self) -> list[list[str]]:
        """The units as rows of a table, the head of it first."""
        rows = [["layer", "KV head", "least query", "mass kept", "suggested"]]
        for unit in self.units:
            shares = (f"{100 * share:.2f} %" for share in (unit.worst, unit.mass))
            rows.append([str(unit.layer), "all" if unit.head is None else str(unit.head), *shares, "sparse" if unit.sparse else "dense"])
        return rows

    def sentence(self) -> str:
        """The figures of the whole model in one line."""
        found = self.comparison
        return (
            f"{self.sparse} of {len(self.units)} can be sparse at {found.nll_change:+.4f} nats a token (budget {self.budget:g}); "
            f"{100 * found.density.mean():.1f} % of dense attention's pairs are left, KL {found.kl:.4f}"
        )

    def notes(self) -> list[str]:
        """The needles first, then the layers that were left and what the comparison says."""
        if not self.needles:
            needles = "no needles were looked for: whether the model still finds what stands far back is not known"
        else:
            depths = ", ".join(f"{100 * one.depth:.0f} %" for one in self.needles)
            before, after = (sum(found) for found in zip(*((one.before, one.after) for one in self.needles), strict=True))
            needles = f"needles at {depths} of the text: {before} of {len(self.needles)} found before, {after} after"
            needles += "" if before else "; a model that finds none shows no loss of them"
        return [needles, *self.left, *self.comparison.notes]

    def __str__(self) -> str:
        return "\n".join([self.sentence(), *(f"- {note}" for note in self.notes()), *markdown(self.lines())])


def suggest(
    model: Any,
    tokens: Tensor | Sequence[Sequence[int]] | Sequence[int],
    budget: float,
    *,
    sink: int = 64,
    window: int = 512,
    by: str = "head",
    last: int | None = None,
    tokenizer: Any = None,
    depths: int = 4,
    progress: Progress | None = None,
) -> Suggestion:
    """Find layers or heads of a model that can see sinks and a window alone, at a cost that is measured and not predicted.

    The model reads the texts once, while the attention mass that sinks and a window would keep is measured in
    every layer. Heads are ordered by the query that would lose the most: a head that retrieves looks near nearly
    always, so that its mean says little. Then the model reads the texts with the first n heads sparse, n by
    bisection, until the most of them are found whose negative log-likelihood stays within the budget and who, given
    a tokenizer, lose no needle that the model finds as it stands. That is about ``log2(heads) + 3``
    readings of texts and needles; one head more would have been too many, another choice of as many heads may be
    better.

    A needle is a number, hidden in the longest text where neither sinks nor window show it to the question at the
    end. Without a tokenizer a budget does not show what these texts do not need.

    Nothing but sinks with a window is ever suggested, and the unit that would lose the most stays dense: all else
    needs training.

    Args:
        model: as in `compare`, whose memory is needed here too.
        tokens: texts, longer than sinks and window together.
        budget: nats per token that the negative log-likelihood may rise by, 0 to 1; 0.01 is one per cent of perplexity.
        sink, window: tokens that a sparse head sees: the first ones, and the last ones.
        by: "head" to decide for each KV head, "layer" for whole layers.
        last: as in `compare`.
        tokenizer: of the model, from Transformers; needles are written with it, as a chat where it has a chat template.
        depths: needles, evenly spread over the text; 0 for none.
        progress: as in `compare`; the total is the most it can be.

    Raises:
        ValueError, TypeError: texts that are too short, a budget out of range; before any measurement.
        Unsupported: as in `compare`, and a model of which no layer can be changed.

    >>> import torch
    >>> from s2attn.lab.model import LanguageModel, ModelConfig
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
    hidden: list[Needle] = []
    if check_int("depths", depths, 0) and tokenizer is not None:
        longest = max((text.tokens for text in texts), key=len)
        hidden = needles(tokenizer, longest.tolist(), first=sink, last=window, count=depths)
    search = Search(subject, texts, hidden, pattern, by == "head", progress)
    units, base = search.measure()
    count, tried = search.bisect(units, base, float(budget))
    units = [replace(unit, sparse=i < count) for i, unit in enumerate(units)]
    recipe = search.recipe(units)
    found = measured(subject, recipe, texts, search.steps)
    search.steps.end()
    same = zip(hidden, search.found[0], search.found[count], strict=True)
    return Suggestion(
        recipe,
        float(budget),
        tuple(units),
        tuple(tried),
        found,
        tuple(search.left.values()),
        tuple(search.lost),
        tuple(Found(needle.depth, before, after) for needle, before, after in same),
    )


@dataclass(eq=False)
class Search:
    """The readings of one call of `suggest`."""

    subject: Subject
    texts: Sequence[Text]
    needles: Sequence[Needle]
    pattern: Pattern
    heads: bool
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.left: dict[int, str] = {}
        self.found: dict[int, list[bool]] = {}
        """For numbers of sparse units, which needles are found."""
        self.lost: list[int] = []
        units = sum(layer.num_kv_heads if self.heads else 1 for layer in self.subject.layers)
        once = len(self.texts) + len(self.needles)
        self.steps = Steps(once * (1 + units.bit_length()) + 2 * len(self.texts), self.progress)

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

            self.steps("measures the attention mass")
            nll += likelihood(self.subject.logits(text.inputs, visit, text.judged), text.targets)
            for layer in looked.total:
                mass[layer] = mass.get(layer, 0.0) + looked.total[layer] / self.rows
                worst[layer] = looked.least[layer] if layer not in worst else worst[layer].clip(max=looked.least[layer])
        open_layers = [layer for layer in mass if layer not in self.left]  # a window may cut the longer texts alone
        if not open_layers:
            raise Unsupported("no layer of this model can be changed", {"model": list(self.left.values())})
        units = [unit for layer in open_layers for unit in self._units(layer, mass[layer], worst[layer])]
        self.found[0] = self.look(None)
        return sorted(units, key=lambda unit: (-unit.worst, -unit.mass)), nll / self.rows

    def bisect(self, units: Sequence[Unit], base: float, budget: float) -> tuple[int, list[tuple[int, float]]]:
        """How many units, in their order, stay within the budget and lose no needle where one more does not; and all measurements.

        Never all of the units.
        """
        tried: dict[int, float] = {0: 0.0}
        low, high = 0, max(1, len(units))  # `low` fits, `high` does not, or would leave nothing that sees everything
        step = high - 1
        while high - low > 1:
            sparse = [replace(unit, sparse=i < step) for i, unit in enumerate(units)]
            recipe = self.recipe(sparse)
            tried[step] = self.nll(recipe) - base
            fits = tried[step] <= budget
            if fits:
                self.found[step] = self.look(recipe)
                fits = all(after >= before for before, after in zip(self.found[0], self.found[step], strict=True))
                self.lost += [] if fits else [step]
            low, high = (step, high) if fits else (low, step)
            step = (low + high) // 2
        return low, sorted(tried.items())

    def nll(self, recipe: Recipe) -> float:
        """Of a next token of the texts, under a recipe."""

        total = 0.0
        for text in self.texts:
            self.steps("tries a recipe")
            total += likelihood(self.subject.logits(text.inputs, answering(recipe), text.judged), text.targets)
        return total / self.rows

    def look(self, recipe: Recipe | None) -> list[bool]:
        """Which needles the model finds, under a recipe or as it stands."""
        found = []
        for needle in self.needles:
            self.steps("looks for a needle")
            found.append(needle.found(self.subject, answering(recipe)))
        return found

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
