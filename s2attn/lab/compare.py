"""`compare`: what a recipe does to a model that was trained without it, measured on texts, with no training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s2attn.core import Unsupported, bad_kind, bad_value, check_int
from s2attn.lab.asking import Asked, Native, Subject, Visit, fitting
from s2attn.lab.asking_transformers import Hosted, is_hosted
from s2attn.lab.density import dense_pairs, pairs_per_head
from s2attn.lab.stack import stack_of
from s2attn.patterns import Dense, Head, Local, Or, Pattern, Recipe, Sink, Window
from s2attn.patterns.runs import Array

ROWS = 256
"""Rows of logits that are turned into probabilities at a time."""


Progress = Callable[[int, int, str], None]
"""Is told, before each reading of a text, how many are done, how many there are at most, and what this one is for."""


class NeedsTraining(UserWarning):
    """A recipe holds patterns that a model has to be trained with."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found; ``str(comparison)`` is a table, ``to_dict()`` plain JSON values.

    Attributes:
        recipe: the recipe that was judged.
        predictions: how many next tokens were predicted.
        nll, nll_recipe: mean negative log-likelihood of a next token, in nats, of the model as it stands and under the recipe.
        kl: mean Kullback-Leibler divergence of the recipe's next-token probabilities from the model's own, in nats.
        mass: attention mass that is kept, ``(layers, heads)`` with a column for each query head: the mean over the judged queries of the
            share that the layer's own attention, with its own q and k, gives to keys which the recipe lets it see.
        worst: the same, for the query that loses the most.
        density: pairs of query and key that the recipe lists over those of dense attention, in the longest text, ``(layers, heads)``.
        notes: what to keep in mind; patterns that need training come first.
    """

    recipe: Recipe
    predictions: int
    nll: float
    nll_recipe: float
    kl: float
    mass: Array
    worst: Array
    density: Array
    notes: tuple[str, ...] = ()

    @property
    def nll_change(self) -> float:
        """Nats per token that the recipe costs; negative where it does better."""
        return self.nll_recipe - self.nll

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("predictions", "nll", "nll_recipe", "nll_change", "kl")}
        tables = {name: getattr(self, name).tolist() for name in ("mass", "worst", "density")}
        return {"recipe": self.recipe.to_dict(), **numbers, **tables, "notes": list(self.notes)}

    def lines(self) -> list[list[str]]:
        """The layers as rows of a table, the head of it first."""
        rows = [["layer", "pattern", "density", "mass kept", "least head", "least query"]]
        for layer in range(len(self.mass)):
            shares = (self.density[layer].mean(), self.mass[layer].mean(), self.mass[layer].min(), self.worst[layer].min())
            rows.append([str(layer), short(self.recipe.pattern(layer)), *(f"{100 * share:.2f} %" for share in shares)])
        return rows

    def sentence(self) -> str:
        """The figures of the whole model in one line."""
        change = f"({self.nll_change:+.4f} nats a token, {self.predictions} predictions)"
        return f"negative log-likelihood {self.nll:.4f} -> {self.nll_recipe:.4f} {change}; KL {self.kl:.4f}"

    def __str__(self) -> str:
        return "\n".join([self.sentence(), *(f"- {note}" for note in self.notes), *markdown(self.lines())])


def compare(
    model: Any,
    recipe: Recipe | Pattern,
    tokens: Tensor | Sequence[Sequence[int]] | Sequence[int],
    *,
    last: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure what a recipe does to a model, without training and without changing it.

    The model reads every text twice: as it stands, and with its attention replaced in the layers where the recipe says something else
    than the model has. It is a causal language model of Transformers that calls its attention through ``AttentionInterface``, or any
    callable from tokens ``(B, T)`` to logits ``(B, T, vocabulary)`` whose attention is `s2attn.SparseAttention`. A layer of the former
    counts as dense; where `Dense` stands in the recipe the model's own code runs, so that a dense recipe changes nothing at all. Before
    another layer is replaced its own output is compared with what we take it to compute, and a layer that does something else is refused.

    Sinks and a window in some heads or layers are reasonable for a pretrained model. All else needs training with it: that is warned of
    (`NeedsTraining`), and the numbers say how far the model is from it now.

    Memory: the logits of one text twice, in the model's type; never a matrix of queries and keys.

    Args:
        model: as above, in eval mode.
        recipe: the patterns to try; one pattern stands for all layers.
        tokens: texts as ``(texts, T)`` or ``(T,)``, int64, or as lists of different lengths; two tokens or more each.
        last: judge only the predictions of so many last tokens of each text, all of them when left out. Where the context is long they
            are what matters, and the logits of the others need no memory.
        progress: called as ``progress(done, total, what)`` before each reading of a text, and at the end.

    Raises:
        ValueError, TypeError: a recipe for another number of layers or heads; texts that are too short; before any measurement.
        Unsupported: a model whose attention cannot be seen, is in training mode, or does in a layer what we would lose, with the reason.

    >>> from s2attn import Dense, Recipe
    >>> from s2attn.lab.model import LanguageModel, ModelConfig
    >>> model = LanguageModel(ModelConfig(layers=2)).eval()  # random weights: the numbers mean nothing
    >>> found = compare(model, Recipe(Sink(4) | Window(64), dense_layers=[1]), torch.arange(200) % 50)
    >>> found.predictions, found.mass.shape, bool(found.mass[1].min() == 1)
    (199, (2, 8), True)
    """
    subject, texts = subject_of(model), read_texts(tokens, last)
    recipe = fitting(subject, recipe)
    steps = Steps(2 * len(texts), progress)
    found = measured(subject, recipe, texts, steps)
    steps.end()
    for note in needs_training(recipe, subject):
        warnings.warn(note, NeedsTraining, stacklevel=2)
    return found


@dataclass(frozen=True)
class Text:
    """A text, and how many of its last tokens are predicted for judgement."""

    tokens: Tensor
    judged: int

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:-1]

    @property
    def targets(self) -> Tensor:
        return self.tokens[-self.judged :]


@dataclass(eq=False)
class Steps:
    """Counts readings, for whoever wants to see the progress."""

    total: int
    progress: Progress | None
    done: int = 0

    def __post_init__(self) -> None:
        if self.progress is not None and not callable(self.progress):
            raise bad_kind("progress", "must be a function of (done, total, what) or None", self.progress)

    def __call__(self, what: str) -> None:
        """The next reading begins."""
        if self.progress is not None:
            self.progress(self.done, self.total, what)
        self.done += 1

    def end(self) -> None:
        if self.progress is not None:
            self.progress(self.total, self.total, "done")


def measured(subject: Subject, recipe: Recipe, texts: Sequence[Text], steps: Steps) -> Comparison:
    """`compare`, with its arguments checked."""
    shape = (len(subject.layers), subject.layers[0].num_heads)
    kept, worst, sums, rows = np.zeros(shape), np.ones(shape), np.zeros(3), 0
    for text in texts:
        looked = Masses(recipe.pattern, text.judged)
        steps("reads as the model stands")
        own = subject.logits(text.inputs, looked, text.judged)
        steps("reads with the recipe")
        changed = subject.logits(text.inputs, answering(recipe), text.judged)
        sums += judged(own, changed, text.targets)
        rows += text.judged
        for layer in range(shape[0]):
            kept[layer] += looked.total.get(layer, np.full(shape[1], text.judged))
            worst[layer] = np.minimum(worst[layer], looked.least.get(layer, 1.0))
    density = densities(subject, recipe, max(len(text.inputs) for text in texts))
    notes = needs_training(recipe, subject)
    if recipe != Recipe(Dense()) and (density == 1).all():
        notes.append(
            f"the recipe leaves no key out of texts of {max(len(text.tokens) for text in texts)} tokens: this says nothing about it"
        )
    nll, nll_recipe, kl = (float(one) / rows for one in sums)
    return Comparison(recipe, rows, nll, nll_recipe, kl, kept / rows, worst, density, tuple(notes))


def answering(recipe: Recipe | None) -> Visit:
    """Answers for the layers where a recipe says something else than the model has; None leaves the model as it stands."""

    def visit(asked: Asked) -> Pattern | None:
        pattern = asked.own if recipe is None else recipe.pattern(asked.layer)
        return None if pattern == asked.own else pattern

    return visit


@dataclass(eq=False)
class Masses:
    """Looks at each layer that a recipe changes, and adds up what is kept of its attention mass: per query head ``(H,)``."""

    pattern: Callable[[int], Pattern]
    rows: int

    def __post_init__(self) -> None:
        self.total: dict[int, Array] = {}
        self.least: dict[int, Array] = {}

    def __call__(self, asked: Asked) -> None:
        pattern = self.pattern(asked.layer)
        if pattern != asked.own:
            kept = asked.kept(pattern, self.rows).double()[0]
            self.total[asked.layer], self.least[asked.layer] = kept.sum(-1).cpu().numpy(), kept.amin(-1).cpu().numpy()


def judged(own: Tensor, changed: Tensor, targets: Tensor) -> Array:
    """Sums over rows of logits: both negative log-likelihoods of ``targets``, and the divergence of ``changed`` from ``own``."""
    divergence = 0.0
    for start in range(0, len(targets), ROWS):
        p, q = (x[start : start + ROWS].float().log_softmax(-1) for x in (own, changed))
        # A token that the model gives no probability adds nothing, whatever the recipe gives it.
        apart = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).nan_to_num(nan=0.0, posinf=torch.inf)
        divergence += float(apart.double().sum())
    return np.array([likelihood(own, targets), likelihood(changed, targets), divergence])


def likelihood(logits: Tensor, targets: Tensor) -> float:
    """The sum over rows of the negative log-likelihood of ``targets``."""
    if int(targets.max()) >= logits.shape[-1]:
        raise bad_value("tokens", f"must be below {logits.shape[-1]}, the vocabulary of the model", int(targets.max()))
    right = targets.to(logits.device)
    rows = range(0, len(right), ROWS)
    return sum(float(F.cross_entropy(logits[i : i + ROWS].float(), right[i : i + ROWS], reduction="none").double().sum()) for i in rows)


def densities(subject: Subject, recipe: Recipe, length: int) -> Array:
    """Listed pairs over dense ones, ``(layers, heads)``."""
    first = subject.layers[0]
    stack = stack_of(recipe, first.num_heads, first.num_kv_heads, length, layers=len(subject.layers))
    return np.array([pairs_per_head(stack, layer) for layer in range(len(subject.layers))]) / dense_pairs(stack)


def needs_training(recipe: Recipe, subject: Subject) -> list[str]:
    """What in a recipe a pretrained model has to be trained with: all but sinks with a window in a part of the heads."""
    first, said = subject.layers[0], dict[str, list[int]]()
    some_dense, changed = False, False
    for layer, known in enumerate(subject.layers):
        pattern = recipe.pattern(layer)
        kinds = {kind_of(pattern.at(Head(h, first.num_heads, first.num_kv_heads, layer))) for h in range(first.num_heads)}
        some_dense |= "dense" in kinds
        if pattern == known.own:
            continue
        changed, wrong = True, kinds & {"window", "other"}
        if wrong:
            why = "has a window without sinks" if wrong == {"window"} else "is more than sinks and a window"
            said.setdefault(f"{short(pattern)} {why}", []).append(layer)
    notes = [f"NEEDS TRAINING: {why} (layers {ranges(layers)})" for why, layers in said.items()]
    if changed and not some_dense:
        notes.append("NEEDS TRAINING: no head of any layer sees everything")
    return notes


def kind_of(pattern: Pattern) -> str:
    """What one head's pattern is to a pretrained model: "dense", "streaming" (sinks and a window), "window", or "other"."""
    parts = set(map(type, pattern.parts if isinstance(pattern, Or) else (pattern,)))
    if Dense in parts:
        return "dense"
    if not parts <= {Sink, Window, Local} or parts == {Sink}:
        return "other"
    return "streaming" if Sink in parts else "window"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in few words.

    >>> ranges([0, 1, 2, 5])
    '0 to 2, 5'
    """
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def short(pattern: Pattern) -> str:
    """A pattern in at most 80 characters."""
    text = repr(pattern)
    return text if len(text) <= 80 else f"{text[:77]}..."


def subject_of(model: Any) -> Subject:
    """A model as one that can be looked at."""
    if not callable(model):
        raise bad_kind("model", "must be a causal language model", model)
    if getattr(model, "training", False):
        why = "it is in training mode, whose dropout would be measured too: call model.eval()"
        raise Unsupported("a model is judged as it is used", {type(model).__name__: [why]})
    return Hosted(model) if is_hosted(model) else Native(model)


def read_texts(tokens: Any, last: int | None, least: int = 2) -> list[Text]:
    """Texts of at least ``least`` tokens each."""
    if isinstance(tokens, Tensor):
        if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.dim() not in (1, 2):
            raise bad_value("tokens", "must be integers (texts, T) or (T,)", f"{tokens.dtype} {tuple(tokens.shape)}")
        if tokens.numel() and int(tokens.min()) < 0:
            raise bad_value("tokens", "must be integers from 0 on", int(tokens.min()))
        texts = list(tokens.long().reshape(-1, tokens.shape[-1]))
    else:
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence) or not len(tokens):
            raise bad_value("tokens", "must be one or more texts of integers", repr(tokens)[:60])
        several = [tokens] if isinstance(tokens[0], int) else tokens
        if any(isinstance(text, (str, bytes)) or not isinstance(text, (Sequence, Tensor)) for text in several):
            raise bad_value("tokens", "must be one or more texts of integers", repr(tokens)[:60])
        texts = [torch.tensor([check_int("tokens", token, 0) for token in text], dtype=torch.int64) for text in several]
    shortest = min((len(text) for text in texts), default=0)
    if shortest < least:
        raise bad_value("tokens", f"must be texts of {least} tokens or more", f"{len(texts)} texts, the shortest of {shortest}")
    if last is not None and check_int("last", last, 1) >= shortest:
        raise bad_value("last", f"must be at most {shortest - 1}, the predictions of the shortest text", last)
    return [Text(text, len(text) - 1 if last is None else last) for text in texts]


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as a Markdown table, whose head comes first."""
    head, *rest = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return [head, "|" + "---|" * len(lines[0]), *rest]
