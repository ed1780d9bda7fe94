"""How the next token is drawn from logits: for each text by its own rules, and from a number of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_int

_FIRST_SORTED = 256


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
    """The next token of each row of ``logits`` ``(texts, vocabulary)``, from its rules and the position that it will have.

    Rows are processed together, and each is drawn as it would be alone.

    Raises:
        ValueError: logits with NaN, or a row to draw from whose largest logit is infinite.
    """
    if bool(logits.isnan().any()):
        raise bad_value("logits", "must hold no NaN", "NaN")
    tokens = logits.argmax(dim=-1).tolist()
    rows = [i for i, how in enumerate(sampling) if how.temperature > 0]
    for draw_rows, chosen in (
        (_draw_from_all, [i for i in rows if sampling[i].top_k is None and sampling[i].top_p is None]),
        (_draw_from_top_k, [i for i in rows if sampling[i].top_k is not None]),
        (_draw_from_top_p, [i for i in rows if sampling[i].top_k is None and sampling[i].top_p is not None]),
    ):
        if chosen:
            given = logits.detach() if len(chosen) == len(logits) else logits.detach()[chosen]
            given = given if given.dtype == torch.float64 else given.float()
            top = given.amax(dim=-1, keepdim=True)
            if not bool(top.isfinite().all()):
                raise bad_value("logits", "must have a finite largest value in each row to draw from", "an infinite one")
            numbers = [uniform(sampling[i].seed, positions[i]) for i in chosen]
            found = draw_rows(given - top, [sampling[i] for i in chosen], torch.tensor(numbers, dtype=torch.float64))
            for i, token in zip(chosen, found.tolist(), strict=True):
                tokens[i] = token
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that belongs to a seed and a position, the same on every machine.

    >>> round(uniform(0, 5), 6), round(uniform(0, 6), 6)
    (0.302992, 0.424712)
    """
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _draw_from_all(logits: Tensor, how: list[Sampling], numbers: Tensor) -> Tensor:
    """Tokens from the whole vocabulary, in its order: nothing has to be sorted."""
    heat = torch.tensor([one.temperature for one in how], device=logits.device)
    return _pick((logits / heat[:, None]).softmax(dim=-1).cpu().double(), numbers)


def _draw_from_top_k(logits: Tensor, how: list[Sampling], numbers: Tensor) -> Tensor:
    """Tokens from the likeliest ``top_k`` of each row, and of these from the share ``top_p``."""
    count = min(max(one.top_k or 1 for one in how), logits.shape[-1])
    values, tokens = _likeliest(logits, count)
    allowed = torch.arange(count) < torch.tensor([one.top_k or 1 for one in how])[:, None]
    shares = _scaled(values, how).masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return _pick_within(shares, tokens, how, numbers)


def _draw_from_top_p(logits: Tensor, how: list[Sampling], numbers: Tensor) -> Tensor:
    """Tokens from the share ``top_p`` of each row; only as many are sorted as hold it."""
    heat = torch.tensor([one.temperature for one in how], device=logits.device)
    total = (logits / heat[:, None]).logsumexp(dim=-1).cpu().double()
    wanted = torch.tensor([one.top_p or 1.0 for one in how], dtype=torch.float64)
    count = min(_FIRST_SORTED, logits.shape[-1])
    while True:
        values, tokens = _likeliest(logits, count)
        shares = (_scaled(values, how) - total[:, None]).exp()
        if count == logits.shape[-1] or bool((shares.sum(dim=-1) >= wanted).all()):
            return _pick_within(shares, tokens, how, numbers)
        count = min(8 * count, logits.shape[-1])


def _scaled(values: Tensor, how: list[Sampling]) -> Tensor:
    return values.double() / torch.tensor([one.temperature for one in how], dtype=torch.float64)[:, None]


def _pick_within(shares: Tensor, tokens: Tensor, how: list[Sampling], numbers: Tensor) -> Tensor:
    """Tokens from the fewest of ``shares`` ``(rows, count)``, falling, that hold each row's ``top_p``."""
    wanted = torch.tensor([math.inf if one.top_p is None else one.top_p for one in how], dtype=torch.float64)
    before = shares.cumsum(dim=-1) - shares
    places = _pick(shares.masked_fill(before >= wanted[:, None], 0.0), numbers)
    return tokens.gather(1, places[:, None])[:, 0]


def _pick(shares: Tensor, numbers: Tensor) -> Tensor:
    """Where the cumulative share of each row passes its number in [0, 1); a share of 0 is never picked."""
    total = shares.cumsum(dim=-1)
    places = torch.searchsorted(total, numbers[:, None] * total[:, -1:], right=True)[:, 0]
    # The product may be rounded up to the total: the last share above 0 then.
    last = shares.shape[-1] - 1 - (shares.flip(-1) > 0).int().argmax(dim=-1)
    return torch.minimum(places, last)


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and numbers ``(rows, count)`` of the likeliest tokens on the host, falling; of equal ones the lowest number comes first."""
    values, tokens = logits.topk(count, dim=-1)
    least = values[:, -1:]
    tied = ((logits >= least).sum(dim=-1) > count).nonzero()[:, 0].tolist()  # topk takes any of them
    for row in tied:
        above = tokens[row][values[row] > least[row]]
        equal = (logits[row] == least[row]).nonzero()[: count - len(above), 0]
        tokens[row] = torch.cat([above, equal])
    tokens = tokens.sort(dim=-1).values
    values, order = logits.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return values.cpu(), tokens.gather(1, order).cpu()
