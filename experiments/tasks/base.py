"""What all tasks share: a haystack of lower-case letters, pieces laid into it at a depth, and which tokens are the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_int

SCORED, TAUGHT = 1, 2
"""Marks of answer tokens: those that decide the score (and teach), and those that only teach."""


@dataclass(frozen=True)
class TaskBatch:
    """Token sequences with their answers; one token more than the model reads, so that inputs and targets are shifts of it.

    Attributes:
        tokens: int64 ``(B, length + 1)``; every token is a printable byte.
        asked: int64 of that shape: `SCORED` and `TAUGHT` tokens are answers, 0 is everything else.
        needed: int64 ``(B,)``: where the piece begins that the scored answer stands in, or its chain of pieces.
    """

    tokens: Tensor
    asked: Tensor
    needed: Tensor

    @property
    def inputs(self) -> Tensor:
        """What the model reads, ``(B, length)``."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """What it shall say after each token, ``(B, length)``."""
        return self.tokens[:, 1:]

    @property
    def loss_mask(self) -> Tensor:
        """Bool ``(B, length)``: the targets that are an answer."""
        return self.asked[:, 1:] > 0

    @property
    def score_mask(self) -> Tensor:
        """Bool ``(B, length)``: the targets that decide whether the answer is right."""
        return self.asked[:, 1:] == SCORED

    def text(self, row: int) -> str:
        """One sequence as text."""
        return bytes(self.tokens[row].tolist()).decode("ascii")

    def answer(self, row: int) -> str:
        """The scored answer of one sequence as text."""
        return bytes(self.tokens[row][self.asked[row] == SCORED].tolist()).decode("ascii")


@dataclass(frozen=True)
class Example:
    """One sequence as bytes, the spans ``(start, stop, SCORED or TAUGHT)`` of its answers, and where the needed piece begins."""

    text: bytes
    answers: tuple[tuple[int, int, int], ...]
    needed: int


@dataclass(frozen=True)
class Task:
    """A task: makes sequences of any length with the needed piece at any depth, from a seed alone.

    A subclass has a ``name``, its :meth:`shortest` length, and :meth:`example`.
    """

    name: ClassVar[str] = ""

    @property
    def shortest(self) -> int:
        """The fewest tokens that the task needs."""
        raise bad_kind("task", "must be a subclass of Task with shortest", self)

    def example(self, length: int, depth: float, rng: np.random.Generator) -> Example:
        """One sequence of ``length + 1`` tokens; ``length`` and ``depth`` are checked already."""
        raise bad_kind("task", "must be a subclass of Task with example", self)

    def batch(self, length: int, count: int, *, seed: int | Sequence[int], depth: float | None = None) -> TaskBatch:
        """``count`` sequences that a model reads ``length`` tokens of; sequence i depends on ``seed`` and i alone.

        Args:
            seed: one integer, or several, such as a seed and the number of a step.
            depth: where the needed piece stands: 0 is the start of the context, 1 right before the question; drawn evenly when None.

        Raises:
            ValueError: a length that the task does not fit into, or a depth outside 0 .. 1.
        """
        length, count = check_int("length", length, 1), check_int("count", count, 1)
        if length < self.shortest:
            raise bad_value("length", f"must be at least {self.shortest} for {self.name}", length)
        if depth is not None and not 0 <= depth <= 1:
            raise bad_value("depth", "must be from 0 to 1", depth)
        # Their number in front: numpy pads a seed with zeros, so (1, 2) and (1, 2, 0) would be the same.
        root = [1, seed] if isinstance(seed, int) else [len(seed), *seed]
        made = []
        for number in range(count):
            rng = np.random.default_rng([*root, number])
            # Drawn in any case, so that a depth that is given changes nothing else about the sequence.
            drawn = float(rng.random())
            made.append(self.example(length, drawn if depth is None else depth, rng))
        asked = torch.zeros(count, length + 1, dtype=torch.long)
        for row, one in zip(asked, made, strict=True):
            for start, stop, mark in one.answers:
                row[start:stop] = mark
        tokens = torch.frombuffer(bytearray(b"".join(one.text for one in made)), dtype=torch.uint8).view(count, length + 1).long()
        return TaskBatch(tokens, asked, torch.tensor([one.needed for one in made]))


def noise(rng: np.random.Generator, count: int) -> bytearray:
    """``count`` random lower-case letters: no piece, key or value of any task has one."""
    return bytearray(rng.integers(ord("a"), ord("z") + 1, count, dtype=np.uint8).tobytes())


def names(rng: np.random.Generator, count: int, letters: int) -> list[bytes]:
    """``count`` different names of ``letters`` capital letters."""
    numbers = rng.choice(26**letters, count, replace=False)
    return [bytes(ord("A") + int(number) // 26**i % 26 for i in range(letters)) for number in numbers]


def values(rng: np.random.Generator, count: int, digits: int) -> list[bytes]:
    """``count`` numbers of ``digits`` digits, all different while there are enough of them."""
    numbers = rng.choice(10**digits, count, replace=count > 10**digits)
    return [b"%0*d" % (digits, int(number)) for number in numbers]


def spread(rng: np.random.Generator, *, room: int, width: int, count: int, rank: int, depth: float) -> list[int]:
    """Where ``count`` pieces of ``width`` bytes begin within ``room`` bytes, in order and without overlap.

    Piece number ``rank`` leaves the share ``depth`` of the free bytes before it; the others fall where they may.

    >>> spread(np.random.default_rng(0), room=100, width=10, count=1, rank=0, depth=0.5)
    [45]
    """
    free = room - count * width
    at = round(depth * free)
    before = np.sort(rng.integers(0, at + 1, rank))
    after = np.sort(rng.integers(at, free + 1, count - 1 - rank))
    return [int(gap) + i * width for i, gap in enumerate([*before, at, *after])]
