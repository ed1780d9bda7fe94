"""``s2attn generate``: a checkpoint of the lab's model writes on, and the text appears as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from s2attn.cache import CacheFull, SparseCache, pages_needed
from s2attn.core import StrPath, bad_value
from s2attn.lab.train import load_model
from s2attn.lab.training.tokens import Bytes, Tokenizer, read_tokens, tokenizer_in
from s2attn.nn.generation import NewToken, stream
from s2attn.nn.sampling import Sampling

LONGEST_CHARACTER = 4
"""Bytes in UTF-8, and so tokens at most."""


@dataclass(frozen=True)
class Source:
    """What is continued: a text or the contents of a file; behind the text of a saved cache, where one is named."""

    prompt: str = ""
    file: Path | None = None
    resume: Path | None = None

    def tokens(self, folder: Path) -> list[int]:
        """The tokens that are given, behind those of the cache."""
        if self.prompt and self.file is not None:
            raise bad_value("--prompt and --file", "must not be given together", f"{self.prompt!r} and {self.file}")
        return read_tokens(folder, self.prompt.encode() if self.file is None else self.file.read_bytes())


def stop_bytes(letters: str) -> list[int]:
    """The bytes that end a text."""
    if not letters.isascii():
        raise bad_value("--stop", "must hold characters of one byte each", repr(letters))
    return list(letters.encode())


def show_generation(folder: Path, source: Source, sampling: Sampling, *, chunk: int, save: Path | None, room: int) -> None:
    """Write the text to standard output as it comes, and what it cost to standard error."""
    model, tokenizer = load_model(folder).eval(), tokenizer_in(folder)
    if sampling.stop and not isinstance(tokenizer, Bytes):
        raise bad_value("--stop", "must be left out with a model of byte pairs", f"{len(sampling.stop)} characters")
    given = source.tokens(folder)
    if source.resume is not None:
        cache, sequence = _resumed(source.resume, len(given) + sampling.max_new_tokens, chunk=chunk, room=room)
        text = cache.tokens(sequence) + given
    elif given:
        room = max(room, len(given) + sampling.max_new_tokens)
        cache = SparseCache.for_model(model, max_tokens=room, chunk=chunk, hold=1)
        sequence, text = cache.open(), given
    else:
        raise bad_value("--prompt", "must hold something, or --file or --resume be given", "nothing")
    began = time.perf_counter()
    try:
        new = _write(stream(model, [text], sampling, chunk=chunk, cache=cache, sequences=[sequence]), tokenizer)
    except CacheFull as error:  # a cache from a file has the pages that it was made with
        raise bad_value("--chunk", "must not be larger than when the cache was made", f"{chunk}: {error}") from error
    seconds = time.perf_counter() - began
    unit = "bytes" if isinstance(tokenizer, Bytes) else "tokens"
    note = f"{len(new)} {unit} in {seconds:.1f} s; the cache never held more than {cache.bytes_most / 1e3:.0f} kB"
    note += f" ({cache.bytes_allocated / 1e3:.0f} kB allocated)"
    print(f"{note}, where a dense one ends with {cache.bytes_dense / 1e3:.0f} kB", file=sys.stderr)
    if save is not None:
        last = torch.tensor([new[-1:]])
        with torch.no_grad(), cache.step([sequence], last):  # so that the file holds the whole text
            model(last)
        cache.save(save)


def _resumed(path: StrPath, more: int, *, chunk: int, room: int) -> tuple[SparseCache, int]:
    """A saved cache with room for ``more`` tokens and for a text of ``room``, and the sequence to go on with."""
    cache = SparseCache.load(path)
    if not cache.ledger.sequences:
        raise bad_value("--resume", "must be a cache with a text in it", path)
    sequence = cache.ledger.sequences[0]
    longest = max(room, cache.length(sequence) + more)
    if longest <= cache.max_tokens:
        return cache, sequence
    names = ("num_kv_heads", "num_layers", "num_heads", "page_size", "heads", "hold")
    pages = pages_needed(cache.pattern, tokens=longest, chunk=chunk, **{name: getattr(cache, name) for name in names})
    try:
        return SparseCache.load(path, max_tokens=longest, num_pages=max(pages, cache.num_pages)), sequence
    except ValueError as error:  # a pattern that comes back to keys which were given back for the shorter text
        rule = f"must be at most {cache.max_tokens}, for which {path} was saved, since a longer text reads keys that were given back"
        raise bad_value("--room", rule, longest) from error


def _write(steps: Iterator[list[NewToken]], tokenizer: Tokenizer) -> list[int]:
    """Print tokens as they come, a character when it is whole."""
    new: list[int] = []
    shown = 0
    for (token,) in steps:
        new.append(token.token)
        text = tokenizer.decode(new[shown:]).decode("utf-8", errors="replace")
        if not text.endswith("\ufffd") or len(new) - shown >= LONGEST_CHARACTER:
            sys.stdout.write(text)
            sys.stdout.flush()
            shown = len(new)
    print(tokenizer.decode(new[shown:]).decode("utf-8", errors="replace"))
    return new
