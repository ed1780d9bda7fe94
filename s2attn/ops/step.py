"""The slot that a cache and the modules of a model share: while a step is on, attention goes through the cache, layer by layer."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from s2attn.core import bad_value
from s2attn.layout import HeadRange
from s2attn.ops.selector import Selector
from s2attn.patterns import Pattern


@dataclass(frozen=True)
class LayerCall:
    """What a module that attends is made of: its place in the model, what its queries see, and how they score.

    The fields are the arguments of `s2attn.nn.SparseAttention`, and ``sinks`` is its parameter.
    """

    pattern: Pattern | Selector
    num_heads: int
    num_kv_heads: int
    layer: int
    causal: bool
    heads: HeadRange | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    backend: str


class Step(Protocol):
    """What stands in for attention, and knows the places of the new tokens ``(B, T)``, while a model runs once."""

    def attend(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` for the new tokens of one layer, shaped as those of `s2attn.attention`."""
        ...

    def positions(self, tokens: Tensor) -> Tensor:
        """The position of each new token in its sequence, int64 ``(B, T)``."""
        ...

    def look_back(self, tokens: Tensor, count: int) -> Tensor:
        """``(B, count + T)``: the new tokens behind the ``count`` before them; 0 where there is none."""
        ...


class Ask(Protocol):
    """Calls a method of the step that is on: "attend", "positions" or "look_back"."""

    def __call__(self, what: str, *arguments: Any) -> Any: ...


class _Slot(threading.local):
    step: Step | None = None
    ask: Ask | None = None


_slot = _Slot()


def _ask(what: str, *arguments: Any) -> Any:
    return getattr(_slot.step, what)(*arguments)


@lru_cache(maxsize=1)
def _ask_untraced() -> Ask:
    return torch.compiler.disable(_ask)


def current_step() -> Ask | None:
    """How to reach the step that is on in this thread.

    A compiled model calls it as it stands, outside of its graphs: what a step answers changes with every token.
    """
    return _slot.ask


@contextmanager
def taking(step: Step) -> Iterator[None]:
    """Let modules find ``step`` inside the block; one at a time in each thread."""
    if _slot.step is not None:
        raise bad_value("step", "must begin after the one before has ended", "a step inside another one")
    # Whoever compiles has loaded the compiler; nobody else shall wait for it.
    _slot.step, _slot.ask = step, _ask_untraced() if "torch._dynamo" in sys.modules else _ask
    try:
        yield
    finally:
        _slot.step = _slot.ask = None


def plain_positions(tokens: Tensor) -> Tensor:
    """Positions ``(B, T)`` where no cache is: every row begins at its first token."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])


def plain_look_back(tokens: Tensor, count: int) -> Tensor:
    """``(B, count + T)`` where no cache is: nothing stands before a row."""
    return torch.cat((tokens.new_zeros(len(tokens), count), tokens), dim=1)
