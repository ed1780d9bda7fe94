"""The tasks: passkey, needle among needles, associative recall, copy, and variable tracking (RULER, arXiv:2404.06654, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.tasks.base import SCORED, TAUGHT, Example, Task, names, noise, spread, values
from s2attn.core import bad_value, check_int


def _check(task: Task, **least: int) -> None:
    for name, minimum in least.items():
        check_int(f"{type(task).__name__} {name}", getattr(task, name), minimum)


def _laid(rng: np.random.Generator, room: int, starts: list[int], pieces: list[bytes]) -> bytes:
    """Noise of ``room`` bytes with the pieces at their starts."""
    text = noise(rng, room)
    for start, piece in zip(starts, pieces, strict=True):
        text[start : start + len(piece)] = piece
    return bytes(text)


@dataclass(frozen=True)
class Passkey(Task):
    """One number in noise: ``... #4821; ... ?#4821`` (arXiv:2305.16300, section 4.2).

    >>> Passkey(digits=2).batch(20, 1, seed=0, depth=0.0).text(0)
    '#75;ucxayqxdvlrvr?#75'
    """

    name: ClassVar[str] = "passkey"
    digits: int = 4

    def __post_init__(self) -> None:
        _check(self, digits=1)

    @property
    def shortest(self) -> int:
        return 2 * self.digits + 3

    def example(self, length: int, depth: float, rng: np.random.Generator) -> Example:
        (value,) = values(rng, 1, self.digits)
        room = length + 1 - 2 - self.digits
        starts = spread(rng, room=room, width=self.digits + 2, count=1, rank=0, depth=depth)
        text = _laid(rng, room, starts, [b"#" + value + b";"]) + b"?#" + value
        return Example(text, ((len(text) - self.digits, len(text), SCORED),), starts[0])


@dataclass(frozen=True)
class Needle(Task):
    """One of several named numbers in noise: ``... :AB=4821; ... :CD=0713; ... ?:AB=4821`` (RULER's multi-key needle)."""

    name: ClassVar[str] = "needle"
    keys: int = 4
    digits: int = 4

    def __post_init__(self) -> None:
        _check(self, keys=1, digits=1)
        if self.keys > 26**2:
            raise bad_value("Needle keys", f"must be at most {26**2}, the names of two letters", self.keys)

    @property
    def _width(self) -> int:
        return self.digits + 5

    @property
    def shortest(self) -> int:
        return self.keys * self._width + 5 + self.digits - 1

    def example(self, length: int, depth: float, rng: np.random.Generator) -> Example:
        keys, numbers = names(rng, self.keys, 2), values(rng, self.keys, self.digits)
        rank = round(depth * (self.keys - 1))
        room = length + 1 - 5 - self.digits
        starts = spread(rng, room=room, width=self._width, count=self.keys, rank=rank, depth=depth)
        pieces = [b":" + key + b"=" + number + b";" for key, number in zip(keys, numbers, strict=True)]
        text = _laid(rng, room, starts, pieces) + b"?:" + keys[rank] + b"=" + numbers[rank]
        return Example(text, ((len(text) - self.digits, len(text), SCORED),), starts[rank])


@dataclass(frozen=True)
class Recall(Task):
    """Associative recall: pairs in noise, then several names of which each asks for its number: ``.,AB48.,CD07.?,CD07,AB48``.

    The first name asked stands at the depth and is scored; the others only teach, several answers per sequence (as in
    arXiv:2312.04927, section 3).
    """

    name: ClassVar[str] = "recall"
    pairs: int = 8
    queries: int = 4

    def __post_init__(self) -> None:
        _check(self, pairs=1, queries=1)
        if self.pairs > 26**2:
            raise bad_value("Recall pairs", f"must be at most {26**2}, the names of two letters", self.pairs)
        if self.queries > self.pairs:
            raise bad_value("Recall queries", f"must be at most the pairs ({self.pairs})", self.queries)

    @property
    def shortest(self) -> int:
        return 5 * (self.pairs + self.queries)

    def example(self, length: int, depth: float, rng: np.random.Generator) -> Example:
        pieces = [b"," + key + value for key, value in zip(names(rng, self.pairs, 2), values(rng, self.pairs, 2), strict=True)]
        rank = round(depth * (self.pairs - 1))
        room = length + 1 - 1 - 5 * self.queries
        starts = spread(rng, room=room, width=5, count=self.pairs, rank=rank, depth=depth)
        others = [number for number in rng.permutation(self.pairs) if number != rank][: self.queries - 1]
        text = _laid(rng, room, starts, pieces) + b"?" + b"".join(pieces[number] for number in [rank, *others])
        ends = [room + 1 + 5 * (number + 1) for number in range(self.queries)]
        answers = tuple((end - 2, end, SCORED if i == 0 else TAUGHT) for i, end in enumerate(ends))
        return Example(text, answers, starts[rank])


@dataclass(frozen=True)
class Copy(Task):
    """Random letters, and the same again: ``[qwerty|qwerty``; all of the copy teaches, the ``span`` letters at the depth are scored."""

    name: ClassVar[str] = "copy"
    span: int = 8

    def __post_init__(self) -> None:
        _check(self, span=1)

    @property
    def shortest(self) -> int:
        return 2 * self.span + 1

    def example(self, length: int, depth: float, rng: np.random.Generator) -> Example:
        count = (length - 1) // 2
        letters = bytes(noise(rng, count))
        # An odd token stands in front.
        head = b"." * (length - 1 - 2 * count) + b"["
        text = head + letters + b"|" + letters
        first, at = len(head) + count + 1, round(depth * (count - self.span))
        scored = (first + at, first + at + self.span)
        answers = ((first, scored[0], TAUGHT), (*scored, SCORED), (scored[1], len(text), TAUGHT))
        return Example(text, answers, len(head) + at)


@dataclass(frozen=True)
class Tracking(Task):
    """Variables that are assigned to each other: ``... !AB=48; ... !CD=AB; ... !EF=CD; ... ?!EF=48`` (RULER's variable tracking).

    The last name of a chain of ``hops`` copies asks for the number at its start, through other chains. The depth is that of the number;
    the copies come after it, in order.
    """

    name: ClassVar[str] = "tracking"
    hops: int = 2
    chains: int = 2

    def __post_init__(self) -> None:
        _check(self, hops=1, chains=1)
        if self._count > 26**2:
            raise bad_value("Tracking chains", f"must leave a name of two letters to each of chains x (hops + 1) <= {26**2}", self._count)

    @property
    def _count(self) -> int:
        return self.chains * (self.hops + 1)

    @property
    def shortest(self) -> int:
        return 7 * self._count + 6

    def example(self, length: int, depth: float, rng: np.random.Generator) -> Example:
        chain = self.hops + 1
        known, numbers = names(rng, self._count, 2), values(rng, self.chains, 2)
        rank = round(depth * (self._count - chain))
        room = length + 1 - 7
        starts = spread(rng, room=room, width=7, count=self._count, rank=rank, depth=depth)
        later = np.sort(rng.choice(np.arange(rank + 1, self._count), self.hops, replace=False))
        places = {0: [rank, *later]}
        free = rng.permutation([place for place in range(self._count) if place not in places[0]])
        places |= {other: sorted(free[(other - 1) * chain : other * chain]) for other in range(1, self.chains)}
        pieces = [b""] * self._count
        for number, slots in places.items():
            own = known[number * chain : (number + 1) * chain]
            for place, name, source in zip(slots, own, [numbers[number], *own], strict=False):
                pieces[place] = b"!" + name + b"=" + source + b";"
        text = _laid(rng, room, starts, pieces) + b"?!" + known[self.hops] + b"=" + numbers[0]
        return Example(text, ((len(text) - 2, len(text), SCORED),), starts[rank])


TASKS: Mapping[str, Callable[[], Task]] = {kind.name: kind for kind in (Passkey, Needle, Recall, Copy, Tracking)}


def task_named(name: str) -> Task:
    """The task of this name with its usual settings.

    >>> task_named("needle")
    Needle(keys=4, digits=4)
    """
    if name not in TASKS:
        raise bad_value("task", f"must be one of {', '.join(TASKS)}", repr(name))
    return TASKS[name]()
