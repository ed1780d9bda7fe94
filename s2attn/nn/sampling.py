"""How the next token is drawn from logits: for each text by its own rules, and from a number of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_int


@dataclass(frozen=True)
class Sampling:
    """How a text goes on, and when it ends.

    The number that draws a token depends on the seed and the token's position alone. So a text does not depend on what is written beside
    it, and one that goes on from a saved cache is the one that a single call writes.

    Args:
        max_new_tokens: the most tokens that are written.
        stop: tokens that end a text; the one that did is its last.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from so many of the likeliest tokens.
        top_p: draw from the fewest of the likeliest tokens that have this share of the probability together.
        seed: any integer from 0 on.

    >>> Sampling(max_new_tokens=64, stop=[0], temperature=0.8, top_p=0.95)
    Sampling(max_new_tokens=64, stop=(0,), temperature=0.8, top_k=None, top_p=0.95, seed=0)
    """

    max_new_tokens: int = 128
    stop: Sequence[int] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens, 1)
        check_int("seed", self.seed, 0)
        object.__setattr__(self, "stop", tuple(check_int("stop", token, 0) for token in self.stop))
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature < math.inf:
            raise bad_value("temperature", "must be a number, 0 or more", self.temperature)
        if self.top_k is not None:
            check_int("top_k", self.top_k, 1)
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise bad_value("top_p", "must be a number above 0 and at most 1", self.top_p)


def per_text(sampling: Sampling | Sequence[Sampling], texts: int) -> list[Sampling]:
    """One for each text; where one is given for all of them, text i draws with the seed plus i."""
    if isinstance(sampling, Sampling):
        return [replace(sampling, seed=sampling.seed + i) for i in range(texts)]
    given = list(sampling)
    if not all(isinstance(one, Sampling) for one in given):
        raise bad_kind("sampling", "must be a Sampling, or one for each prompt", sampling)
    if len(given) != texts:
        raise bad_value("sampling", f"must be one, or one for each of the {texts} prompts", len(given))
    return given


def draw(logits: Tensor, sampling: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """The next token of each text, from its row of ``logits`` ``(texts, vocabulary)`` and the position that it will have."""
    if bool(logits.isnan().any()):
        raise bad_value("logits", "must hold no NaN", "NaN")
    tokens = logits.argmax(dim=-1).tolist()
    for i, (how, position) in enumerate(zip(sampling, positions, strict=True)):
        if how.temperature > 0:
            tokens[i] = _draw_one(logits[i], how, uniform(how.seed, position))
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that belongs to a seed and a position, the same on every machine.

    >>> round(uniform(0, 5), 6), round(uniform(0, 6), 6)
    (0.302992, 0.424712)
    """
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _draw_one(logits: Tensor, how: Sampling, number: float) -> int:
    """The token at which the cumulative probability, likeliest first, passes ``number``; in float64."""
    scores, order = (logits.detach().double().cpu() / how.temperature).sort(descending=True, stable=True)
    scores = scores[: how.top_k]
    share = scores.softmax(0)
    if how.top_p is not None:
        share = share[share.cumsum(0) - share < how.top_p]
    total = share.cumsum(0)
    place = int(torch.searchsorted(total, number * total[-1], right=True))
    return int(order[min(place, len(total) - 1)])
