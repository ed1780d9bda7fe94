"""`generate` and `stream`: texts from any model whose attention is `SparseAttention`, through a `SparseCache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2attn.cache import CacheFull, SparseCache
from s2attn.cache.probe import device_of
from s2attn.core import bad_kind, bad_value, check_int
from s2attn.nn.sampling import Sampling, draw, per_text

Model = Callable[[Tensor], Tensor]
LIKELIEST = Sampling()


@dataclass(frozen=True, eq=False)
class NewToken:
    """A token as it is written.

    Attributes:
        text: number of its prompt.
        token: the token.
        finish: why it is the text's last: "stop" or "length"; None while the text goes on.
        logits: the row ``(vocabulary,)`` that it was drawn from.
        sequence: its text's number in the cache that the call was given; None where there was none.
    """

    text: int
    token: int
    finish: str | None
    logits: Tensor
    sequence: int | None = None


@dataclass(frozen=True)
class Generated:
    """A text that was written.

    Attributes:
        prompt, new: its tokens, as given and as written.
        finish: why it ended, "stop" or "length"; None where a full cache cut it short.
        sequence: its number in the cache that the call was given; None where there was none.
    """

    prompt: list[int]
    new: list[int]
    finish: str | None
    sequence: int | None

    @property
    def tokens(self) -> list[int]:
        """The whole text: what a later call is given to go on."""
        return self.prompt + self.new


@dataclass(eq=False)
class _Text:
    number: int
    prompt: list[int]
    sampling: Sampling
    sequence: int
    new: list[int] = field(default_factory=list)
    finish: str | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.new

    def result(self, given: bool) -> Generated:
        return Generated(self.prompt, self.new, self.finish, self.sequence if given else None)

    def write(self, token: int) -> None:
        self.new.append(token)
        if token in self.sampling.stop:
            self.finish = "stop"
        elif len(self.new) == self.sampling.max_new_tokens:
            self.finish = "length"


def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling | Sequence[Sampling] = LIKELIEST,
    *,
    chunk: int = 512,
    cache: SparseCache | None = None,
    sequences: Sequence[int] | None = None,
    cascade: bool = False,
) -> list[Generated]:
    """Continue some texts, all of them together, each until its own end.

    The model is any callable from int64 tokens ``(B, T)`` to logits ``(B, T, vocabulary)`` whose attention is `SparseAttention` with
    numbered layers, and whose other parts look at one token at a time; `s2attn.nn.positions` tells it where its tokens stand, and
    `s2attn.nn.look_back` what stood before. It runs as it is: call ``model.eval()`` before. Prompts of different lengths are padded at the
    right while they are read, which changes nothing; while texts are written nothing is padded.

    Args:
        model: as above.
        prompts: whole texts, one token or more each. Where a sequence of the cache holds a text's beginning, only the rest is read. One
            that holds all of it takes the last token back, for which the cache must have been made with ``hold=1`` or more.
        sampling: how texts are drawn and when they end, for all of them or for each.
        chunk: tokens of a prompt that are read at a time.
        cache: where keys and values are kept; by default one that has room for these texts and is dropped afterwards.
        sequences: the cache's sequence for each text; new ones by default, which stay open at the end, and are freed when anything but
            `CacheFull` is raised.
        cascade: read the pages that all sequences share, as forks do, once for all of them: `s2attn.decode_cascade`.

    Returns:
        A `Generated` for each prompt, in order.

    Raises:
        ValueError, TypeError: bad arguments, before the model is called: also a sequence that holds something else than a beginning of
            its text.
        CacheFull: the cache has no page left. Its sequences are as they were before the step that failed, and the error's ``texts`` are
            the `Generated` so far: make room, and go on with their tokens and sequences.

    >>> from s2attn.lab.model import LanguageModel, ModelConfig  # any module does
    >>> model = LanguageModel(ModelConfig()).eval()
    >>> texts = generate(model, [[72, 101], [108]], [Sampling(max_new_tokens=3), Sampling(max_new_tokens=5, temperature=0.8, top_k=9)])
    >>> [(text.prompt, len(text.new), text.finish) for text in texts]
    [([72, 101], 3, 'length'), ([108], 5, 'length')]
    """
    texts = _texts(prompts, sampling)
    given = cache is not None
    for _ in _stream(_Feed(model, _checked_cache(model, texts, chunk, cache, sequences), chunk, cascade), texts, given, sequences):
        pass
    return [text.result(given) for text in texts]


def stream(
    model: Model,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling | Sequence[Sampling] = LIKELIEST,
    *,
    chunk: int = 512,
    cache: SparseCache | None = None,
    sequences: Sequence[int] | None = None,
    cascade: bool = False,
) -> Iterator[list[NewToken]]:
    """The tokens of `generate` as they are written: a list for each step, with the next token of every text that goes on.

    Arguments and errors are those of `generate`, and bad arguments are refused at once. An iterator that is closed early leaves the
    given sequences open, with the tokens that the model has read, and frees those that it opened itself.
    """
    texts = _texts(prompts, sampling)
    feed = _Feed(model, _checked_cache(model, texts, chunk, cache, sequences), chunk, cascade)
    return _stream(feed, texts, cache is not None, sequences)


def _texts(prompts: Sequence[Sequence[int] | Tensor], sampling: Sampling | Sequence[Sampling]) -> list[_Text]:
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, (Sequence, Tensor)) or not len(prompts):
        raise bad_value("prompts", "must be a list of one or more texts, each a list of tokens", repr(prompts)[:80])
    read = []
    for i, prompt in enumerate(prompts):
        tokens = prompt.tolist() if isinstance(prompt, Tensor) and prompt.dim() == 1 and not prompt.is_floating_point() else prompt
        if isinstance(tokens, (Tensor, str)) or not isinstance(tokens, Sequence) or not len(tokens):
            raise bad_value(f"prompts[{i}]", "must hold one or more tokens, as integers", repr(prompt)[:80])
        read.append([check_int(f"prompts[{i}]", token, 0) for token in tokens])
    each = per_text(sampling, len(read))
    return [_Text(i, tokens, how, -1) for i, (tokens, how) in enumerate(zip(read, each, strict=True))]


def _checked_cache(model: Model, texts: list[_Text], chunk: int, cache: SparseCache | None, sequences: Sequence[int] | None) -> SparseCache:
    """The cache, with room for the texts; given sequences hold beginnings of theirs."""
    check_int("chunk", chunk, 1)
    if cache is None:
        if sequences is not None:
            raise bad_value("sequences", "must be left out where no cache is given", sequences)
        longest = max(len(text.prompt) + text.sampling.max_new_tokens - 1 for text in texts)
        cache = SparseCache.for_model(model, max_tokens=longest, sequences=len(texts), chunk=chunk)
    if not isinstance(cache, SparseCache):
        raise bad_kind("cache", "must be a SparseCache", cache)
    for text in texts:
        most = cache.max_tokens + 1 - len(text.prompt)  # the last token that is written need not be read
        if most < 1:
            rule = f"must have at most {cache.max_tokens} tokens, max_tokens of the cache"
            raise bad_value(f"prompts[{text.number}]", rule, len(text.prompt))
        if text.sampling.max_new_tokens > most:
            rule = f"must be at most {most} for prompts[{text.number}], by max_tokens of the cache ({cache.max_tokens})"
            raise bad_value("max_new_tokens", rule, text.sampling.max_new_tokens)
    if sequences is not None:
        chosen = list(sequences)
        if len(chosen) != len(texts) or len(set(chosen)) < len(chosen):
            raise bad_value("sequences", f"must be {len(texts)} different ones, one for each prompt", chosen)
        for text, sequence in zip(texts, chosen, strict=True):
            known = cache.tokens(sequence)
            if known != text.prompt[: len(known)]:
                rule = f"must begin with the {len(known)} tokens that sequence {sequence} of the cache holds"
                raise bad_value(f"prompts[{text.number}]", rule, f"{len(text.prompt)} tokens")
            text.sequence = sequence
            if len(known) == len(text.prompt):
                cache.ledger.check_rollback(sequence, 1)
    return cache


@dataclass(frozen=True, eq=False)
class _Feed:
    """A model that reads pieces of texts into its cache."""

    model: Model
    cache: SparseCache
    chunk: int
    cascade: bool

    def prompts(self, texts: list[_Text]) -> Tensor:
        """Read all prompts, a chunk of each at a time, and return the logits ``(texts, vocabulary)`` after them."""
        left = {text.number: text.prompt[self.cache.length(text.sequence) :] for text in texts}
        rows: dict[int, Tensor] = {}
        while left:
            reading = [text for text in texts if text.number in left]
            found = self.pieces(reading, [left[text.number][: self.chunk] for text in reading])
            for text, row in zip(reading, found, strict=True):
                left[text.number] = left[text.number][self.chunk :]
                if not left[text.number]:
                    del left[text.number]
                    rows[text.number] = row
        return torch.stack([rows[text.number] for text in texts])

    def pieces(self, texts: list[_Text], pieces: list[list[int]]) -> Tensor:
        """Read the next piece of each text, and return the logits after it."""
        counts = [len(piece) for piece in pieces]
        padded = [piece + [0] * (max(counts) - len(piece)) for piece in pieces]
        rows = torch.tensor(padded, device=device_of(self.model, self.cache.k_pages.device))
        with self.cache.step([text.sequence for text in texts], rows, counts, cascade=self.cascade):
            logits = self.model(rows)
            if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != rows.shape:
                rule = f"must return logits of shape ({', '.join(map(str, rows.shape))}, vocabulary)"
                raise bad_value("model", rule, tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__)
            return logits[torch.arange(len(rows)), torch.tensor(counts) - 1]


@torch.no_grad()
def _stream(feed: _Feed, texts: list[_Text], given: bool, sequences: Sequence[int] | None) -> Iterator[list[NewToken]]:
    cache, opened = feed.cache, []
    try:
        for text in texts:
            if sequences is None:
                text.sequence = cache.open()
                opened.append(text.sequence)
            elif cache.length(text.sequence) == len(text.prompt):
                cache.rollback(text.sequence, 1)  # its last token is read again, since its logits are not kept
        logits, live = feed.prompts(texts), texts
        while live:
            drawn = draw(logits, [text.sampling for text in live], [len(text.prompt) + len(text.new) for text in live])
            for text, token in zip(live, drawn, strict=True):
                text.write(token)
            yield [
                NewToken(text.number, text.new[-1], text.finish, row, text.sequence if given else None)
                for text, row in zip(live, logits, strict=True)
            ]
            for text in live:
                if text.finish and not given:
                    cache.free(text.sequence)
            live = [text for text in live if not text.finish]
            if live:
                logits = feed.pieces(live, [text.new[-1:] for text in live])
    except CacheFull as error:
        error.texts = [text.result(given) for text in texts]
        raise
    except BaseException:  # also GeneratorExit, of an iterator that is closed
        for sequence in set(opened).intersection(cache.ledger.sequences):
            cache.free(sequence)
        raise
