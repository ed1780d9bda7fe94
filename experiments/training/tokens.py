"""Text to numbers: bytes, or byte pairs that were learned from the text (by the library `tokenizers`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.data import END_OF_FILE, VOCABULARY
from experiments.files import write_file
from s2attn.core import StrPath, as_path, bad_value, check_int, requires

END = END_OF_FILE
"""Stands before each document and after the last one; no text holds it."""
FILE = "tokenizer.json"
CHUNK = 256
"""Documents that are encoded at a time."""


class Tokenizer(Protocol):
    """Text to tokens and back; token `END` is kept for the ends of documents."""

    @property
    def size(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """The tokens of each text, int32."""
        ...

    def decode(self, tokens: Iterable[int]) -> bytes: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Bytes:
    """Every byte is a token.

    >>> Bytes().encode(["hi"])[0].tolist()
    [104, 105]
    """

    @property
    def size(self) -> int:
        return VOCABULARY

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        raw = (text.encode() for text in texts)
        return [torch.frombuffer(bytearray(text), dtype=torch.uint8).int() for text in raw]

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(tokens)

    def save(self, folder: StrPath) -> None:
        folder = as_path("folder", folder)
        """Nothing has to be kept."""


@dataclass(frozen=True, eq=False)
class BytePairs:
    """Byte pairs, from the bytes up: every text can be written."""

    inner: Any

    @classmethod
    def train(cls, texts: Sequence[str], vocabulary: int) -> BytePairs:
        """Learn a vocabulary from texts.

        Args:
            vocabulary: tokens, with the 256 bytes and the end; fewer when the texts do not give so many.
        """
        with requires("byte pairs cannot be learned", "tokenizers", "experiments"):
            from tokenizers import Tokenizer as Inner
            from tokenizers import decoders, models, pre_tokenizers, trainers
        if check_int("data.vocabulary", vocabulary, 1) <= VOCABULARY:
            raise bad_value("data.vocabulary", f"must be above {VOCABULARY}, for all bytes and the end of documents", vocabulary)
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        bytes_first = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=bytes_first, show_progress=False)
        inner.train_from_iterator(texts, trainer, length=len(texts))
        return cls._of(inner)

    @classmethod
    def load(cls, path: StrPath) -> BytePairs:
        """The tokenizer that :meth:`save` wrote.

        Raises:
            ValueError: the file is no tokenizer.
        """
        path = as_path("path", path)
        with requires("byte pairs cannot be read", "tokenizers", "experiments"):
            from tokenizers import Tokenizer as Inner
        try:
            return cls._of(Inner.from_file(str(path)))
        except Exception as error:  # the library raises bare exceptions
            rule = "must be a tokenizer that python -m experiments train wrote"
            raise bad_value(path.name, rule, f"{path} ({error})") from None

    @classmethod
    def _of(cls, inner: Any) -> BytePairs:
        inner.encode_special_tokens = True  # "<|end|>" in a text is text
        return cls(inner)

    @property
    def size(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [torch.tensor(text.ids, dtype=torch.int32) for text in encoded]

    def decode(self, tokens: Iterable[int]) -> bytes:
        return self.inner.decode(list(tokens), skip_special_tokens=False).encode()

    def save(self, folder: StrPath) -> None:
        folder = as_path("folder", folder)
        write_file(folder / FILE, self.inner.to_str())


def tokenizer_in(folder: StrPath) -> Tokenizer:
    """The tokenizer of a checkpoint: byte pairs where their file lies there, bytes elsewhere."""
    folder = as_path("folder", folder)
    return BytePairs.load(folder / FILE) if (folder / FILE).is_file() else Bytes()


def read_tokens(folder: StrPath, raw: bytes) -> list[int]:
    """The contents of a text file in the tokens of the model in ``folder``."""
    folder = as_path("folder", folder)
    tokenizer = tokenizer_in(folder)
    if isinstance(tokenizer, Bytes):  # any bytes will do
        return list(raw)
    return tokenizer.encode([raw.decode("utf-8", errors="replace")])[0].tolist()


@dataclass(frozen=True, eq=False)
class Tokens:
    """Documents as one row of numbers.

    Attributes:
        flat: int32 ``(total,)``; before each document stands `END`.
        starts: int64 ``(documents + 1,)``, where the documents begin, and the total.
        text_bytes: of the texts, in UTF-8.
    """

    flat: Tensor
    starts: Tensor
    text_bytes: int

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer) -> Tokens:
        """The tokens of documents.

        >>> Tokens.of(["ab", "c"], Bytes()).flat.tolist()
        [0, 97, 98, 0, 99]
        """
        end = torch.tensor([END], dtype=torch.int32)
        parts = [part for i in range(0, len(texts), CHUNK) for part in tokenizer.encode(texts[i : i + CHUNK])]
        lengths = torch.tensor([0, *(part.numel() + 1 for part in parts)])
        flat = torch.cat([piece for part in parts for piece in (end, part)])
        return cls(flat, lengths.cumsum(0), sum(len(text.encode()) for text in texts))

    @property
    def total(self) -> int:
        return self.flat.numel()

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and of where documents begin."""
        digest = hashlib.sha256(self.flat.numpy().tobytes())
        digest.update(self.starts.numpy().tobytes())
        return digest.hexdigest()[:16]
