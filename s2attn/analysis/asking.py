"""What the layers of a model ask of attention, for whoever wants to measure it or to answer in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from s2attn.cache.probe import device_of
from s2attn.core import Unsupported
from s2attn.integrations.spec import read_spec
from s2attn.ops.attention import attention
from s2attn.ops.step import LayerCall, plain_look_back, plain_positions, taking
from s2attn.patterns import Dense, Pattern, Recipe


@dataclass(frozen=True, eq=False)
class Asked:
    """One layer's question, while a model reads whole texts.

    Attributes:
        layer: its number, from 0 on.
        q, k, v: ``(B, T, H, D)``, ``(B, T, G, D)``, ``(B, T, G, Dv)``.
        own: what it sees as the model stands; None where no pattern says that.
        scoring: ``scale`` and ``softcap``; ``sinks`` are the logits of its heads' sinks.
        refusal: why its pattern cannot be changed; None where it can.
        answer: the model's own output ``(B, T, H, Dv)``.
        foreign: whether ``answer`` is computed by somebody else's attention, which has to be checked before ours takes its place.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    own: Pattern | None
    scoring: dict[str, Any]
    sinks: Tensor | None
    refusal: str | None
    answer: Callable[[], Tensor]
    foreign: bool = False

    def attend(self, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` with another pattern."""
        self.check(pattern)
        how: Any = {**self.scoring, "sinks": self.sinks, "layer": self.layer}
        return attention(self.q, self.k, self.v, pattern, **how, return_lse=True)

    def kept(self, pattern: Pattern, rows: int) -> Tensor:
        """The share of the attention mass that is left, for the last ``rows`` queries of each head ``(B, H, rows)``, in float32.

        The mass is that over the keys which the layer sees as the model stands; sinks take no part. It is the difference of two lse, so
        that no matrix of queries and keys is ever held: attention itself streams.
        """
        self.check(pattern)
        assert self.own is not None  # or it would have been refused
        q = self.q[:, -rows:]
        how: Any = {**self.scoring, "layer": self.layer, "return_lse": True}
        out, whole = attention(q, self.k, self.v, self.own, **how)
        if self.foreign:
            with_sinks = out if self.sinks is None else attention(q, self.k, self.v, self.own, **how, sinks=self.sinks)[0]
            self._compare(with_sinks, self.answer()[:, -rows:])
        _, left = attention(q, self.k, self.v, pattern if self.own == Dense() else self.own & pattern, **how)
        return torch.where(whole > -torch.inf, (left - whole).exp(), 1.0)

    def check(self, pattern: Pattern) -> None:
        """Refuse to answer for a layer that does something which we would lose."""
        if self.refusal is not None and pattern != self.own:
            raise Unsupported("a layer's attention cannot be changed", {f"layer {self.layer}": [self.refusal]})

    def _compare(self, ours: Tensor, own: Tensor) -> None:
        # Rounding stays far below half of the digits of a type; another scale, bias or mask does not.
        most = torch.finfo(own.dtype).eps ** 0.5
        apart = float((ours.double() - own.double()).norm() / own.double().norm().clamp(min=1e-30))
        if not apart <= most:
            why = f"its own output is {apart:.1e} away from causal softmax attention over all keys, and rounding is at most {most:.1e}"
            raise Unsupported("a layer's attention cannot be changed", {f"layer {self.layer}": [why]})


Visit = Callable[[Asked], "Pattern | None"]
"""Looks at a layer's question, and says with which pattern it is answered; None leaves it to the model."""


@dataclass(frozen=True)
class Layer:
    """A layer as it asked once: its heads, its own pattern, and why that cannot be changed."""

    num_heads: int
    num_kv_heads: int
    own: Pattern | None
    refusal: str | None


class Subject(Protocol):
    """A model that reads texts while somebody looks at its attention."""

    @property
    def layers(self) -> tuple[Layer, ...]: ...

    def logits(self, text: Tensor, visit: Visit, rows: int) -> Tensor:
        """The last ``rows`` rows of logits ``(rows, vocabulary)`` of one text ``(T,)``."""
        ...


@dataclass(eq=False)
class Answering:
    """The step in which a model of `SparseAttention` modules is looked at."""

    visit: Visit
    asked: list[int] = field(default_factory=list)

    positions = staticmethod(plain_positions)
    look_back = staticmethod(plain_look_back)

    def attend(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        how: Any = {"causal": call.causal, "scale": call.scale, "softcap": call.softcap, "backend": call.backend}

        def answer() -> tuple[Tensor, Tensor]:
            given: Any = {**how, "sinks": call.sinks, "layer": call.layer, "heads": call.heads}
            return attention(q, k, v, call.pattern, **given, return_lse=True)

        own = call.pattern if isinstance(call.pattern, Pattern) else None
        reasons = {
            "it attends in both directions": not call.causal,
            f"it has a selector ({type(call.pattern).__name__}), not a pattern": own is None,
            "it holds a part of the heads of its layer": call.heads is not None,
        }
        refusal = "; ".join(why for why, holds in reasons.items() if holds) or None
        self.asked.append(call.layer)
        asked = Asked(call.layer, q, k, v, own, how, call.sinks, refusal, lambda: answer()[0])
        pattern = self.visit(asked)
        return answer() if pattern is None else asked.attend(pattern)


@dataclass(eq=False)
class Native:
    """A callable from tokens ``(B, T)`` to logits, whose attention is `SparseAttention`."""

    model: Callable[[Tensor], Tensor]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return found_layers(self, self.model)

    @torch.no_grad()
    def logits(self, text: Tensor, visit: Visit, rows: int) -> Tensor:
        with taking(Answering(visit)):
            out = self.model(text[None].to(device_of(self.model, text.device)))
        if not isinstance(out, Tensor) or out.dim() != 3:
            why = f"it returns {type(out).__name__}, not logits (B, T, vocabulary); a model of Transformers must come without a wrapper"
            raise Unsupported("this model cannot be judged", {type(self.model).__name__: [why]})
        return out[0, -rows:]


def found_layers(subject: Any, model: Any) -> tuple[Layer, ...]:
    """The layers that ask when a model reads two tokens.

    Raises:
        Unsupported: nobody asked; a number that is left out or asks twice; layers that differ in their heads.
    """
    found: list[tuple[int, Layer]] = []

    def note(asked: Asked) -> None:
        found.append((asked.layer, Layer(asked.q.shape[2], asked.k.shape[2], asked.own, asked.refusal)))

    subject.logits(torch.zeros(2, dtype=torch.int64), note, 1)
    numbers = [number for number, _ in found]
    name = type(model).__name__
    if not found:
        why = "no layer asks s2attn.nn.SparseAttention or Transformers' attention interface"
        raise Unsupported("this model's attention cannot be looked at", {name: [why]})
    if sorted(numbers) != list(range(len(numbers))):
        raise Unsupported("layers must ask once each, under the numbers 0 and on", {name: [f"these asked: {numbers}"]})
    layers = tuple(layer for _, layer in sorted(found, key=lambda pair: pair[0]))
    heads = {(layer.num_heads, layer.num_kv_heads) for layer in layers}
    if len(heads) > 1:
        raise Unsupported("a recipe is for layers with equal heads", {name: [f"its layers have (heads, KV heads) {sorted(heads)}"]})
    return layers


def fitting(subject: Subject, recipe: Recipe | Pattern) -> Recipe:
    """The recipe, or an error where it is for another number of layers or heads."""
    first = subject.layers[0]
    return read_spec(recipe, num_layers=len(subject.layers), num_heads=first.num_heads, num_kv_heads=first.num_kv_heads)
