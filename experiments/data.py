"""Real text that every machine has: the source files of the running Python's standard library, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy
import torch
from torch import Tensor

from s2attn.core import bad_value, check_int

EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
END_OF_FILE = 0
VOCABULARY = 256


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The ``.py`` files below ``root`` (the standard library when left out), without tests and installed packages, sorted.

    Raises:
        ValueError: there is none, as in an interpreter that is shipped without its sources.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    files = sorted(path for path in root.rglob("*.py") if path.is_file() and not EXCLUDED & set(path.relative_to(root).parts))
    if not files:
        raise bad_value("root", "must hold Python source files", root)
    return files


def is_validation(name: str, percent: int = 5) -> bool:
    """Whether the file of this relative name is for validation: decided by a hash of the name alone, so it never moves.

    >>> [name for name in ("abc.py", "heapq.py", "json/decoder.py", "shlex.py") if is_validation(name, percent=50)]
    ['heapq.py', 'json/decoder.py', 'shlex.py']
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < percent


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, in two parts that share no file.

    Attributes:
        train, validation: uint8 ``(total,)``; every file ends in a zero byte.
        train_files, validation_files: relative names, in the order of the bytes.
    """

    train: Tensor
    validation: Tensor
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]

    def describe(self) -> dict[str, int]:
        """Counts for a report."""
        return {
            "train_files": len(self.train_files),
            "train_bytes": self.train.numel(),
            "validation_files": len(self.validation_files),
            "validation_bytes": self.validation.numel(),
        }


def read_corpus(root: Path | None = None, *, percent: int = 5, max_files: int | None = None) -> Corpus:
    """Read the files of :func:`stdlib_files` and split them by file.

    Args:
        root: folder to read; the running Python's standard library when left out.
        percent: share of files, by the hash of their name, that is kept for validation.
        max_files: read only so many files of each part.

    Raises:
        ValueError: one of the parts would be empty.
    """
    base = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    names = [path.relative_to(base).as_posix() for path in stdlib_files(base)]
    parts: list[tuple[Tensor, tuple[str, ...]]] = []
    for wanted in (False, True):
        chosen = [name for name in names if is_validation(name, percent) == wanted][:max_files]
        text = b"".join((base / name).read_bytes().replace(b"\x00", b"") + bytes([END_OF_FILE]) for name in chosen)
        if not text:
            raise bad_value("percent", f"must leave files for training and validation (of {len(names)})", percent)
        parts.append((torch.frombuffer(bytearray(text), dtype=torch.uint8), tuple(chosen)))
    (train, train_files), (validation, validation_files) = parts
    return Corpus(train, validation, train_files, validation_files)


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step reads.

    Attributes:
        inputs, targets: int64 ``(B, T)``; the targets are the tokens that follow.
        cu_seqlens: int32 ``(documents + 1,)``, cumulative lengths of the documents that lie packed in the rows, one row behind the other;
            None where a row is one text.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        packed = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), packed)


class Feed(Protocol):
    """The data of a run: what each step reads, which depends on its number alone, and what it is judged on, always the same."""

    def train(self, step: int) -> Batch: ...

    def validation(self) -> list[Batch]: ...


@dataclass(frozen=True, eq=False)
class Windows:
    """Pieces of a text of bytes at random places, and evenly spaced pieces of another to judge on.

    Attributes:
        text, unseen: uint8 ``(total,)``; the second is for validation.
        windows: pieces to judge on.
    """

    text: Tensor
    unseen: Tensor
    batch: int
    context: int
    seed: int = 0
    windows: int = 12

    def train(self, step: int) -> Batch:
        return Batch(*train_batch(self.text, step, batch=self.batch, context=self.context, seed=self.seed))

    def validation(self) -> list[Batch]:
        return [Batch(*pair) for pair in validation_batches(self.unseen, windows=self.windows, context=self.context)]


def generator_of(seed: int, number: int) -> torch.Generator:
    """A generator of its own for each pair of numbers.

    >>> len({torch.rand(1, generator=generator_of(*pair)).item() for pair in ((0, 0), (0, 1), (1, 0), (1, 1))})
    4
    """
    # Both are mixed into 32 bits, because torch's generator on the CPU looks at no more of its seed.
    state = numpy.random.SeedSequence((check_int("seed", seed, 0), check_int("number", number, 0))).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def train_batch(text: Tensor, step: int, *, batch: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bytes and the bytes that follow, both int64 ``(batch, context)``, at random places that depend on ``seed`` and ``step`` alone.

    That makes the order the same for every model and lets training resume at any step without a saved state.
    """
    check_int("step", step, 0)
    if text.numel() <= context:
        raise bad_value("text", f"must be longer than the context of {context} bytes", text.numel())
    starts = torch.randint(text.numel() - context, (batch,), generator=generator_of(seed, step))
    rows = text[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def validation_batches(text: Tensor, *, windows: int, context: int, batch: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """``windows`` evenly spaced pieces of ``text``, always the same ones, as pairs like those of :func:`train_batch`."""
    last = text.numel() - context - 1
    if last < 0:
        raise bad_value("text", f"must be longer than the context of {context} bytes", text.numel())
    starts = torch.linspace(0, last, max(1, windows)).long()
    for piece in starts.split(batch):
        rows = text[piece[:, None] + torch.arange(context + 1)].long()
        yield rows[:, :-1], rows[:, 1:]
