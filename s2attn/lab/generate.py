"""Text from a model with a cache: chunked prefill, then one byte at a time, and the proof that the cache changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.core import bad_value, check_int
from s2attn.lab.model import Cache, KeyValueCache, LanguageModel


@dataclass(frozen=True)
class Continuation:
    """What a model wrote, and what it cost.

    Attributes:
        new: the bytes written, without the prompt.
        logits: float ``(new, vocabulary)``, from which each byte was drawn.
        prefill_seconds, decode_seconds: for the whole prompt, and for all new bytes.
    """

    prompt: bytes
    new: bytes
    logits: Tensor
    prefill_seconds: float
    decode_seconds: float

    @property
    def text(self) -> str:
        return self.new.decode("utf-8", errors="replace")


@torch.no_grad()
def prefill(model: LanguageModel, tokens: Tensor, cache: KeyValueCache, *, chunk: int = 512) -> Tensor:
    """Feed ``tokens`` ``(B, T)`` to the cache in chunks and return all logits ``(B, T, vocabulary)``."""
    check_int("chunk", chunk, 1)
    return torch.cat([model(piece, cache) for piece in tokens.split(chunk, dim=1)], dim=1)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: bytes,
    count: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    chunk: int = 512,
    cache: KeyValueCache | None = None,
    on_byte: Callable[[], None] = lambda: None,
) -> Continuation:
    """Continue ``prompt`` by ``count`` bytes, drawn from the ``top_k`` likeliest ones, with a cache.

    Args:
        temperature: divides the logits; 0 always takes the likeliest byte.
        seed: equal seeds write equal texts.
        chunk: bytes of the prompt that are fed at a time.
        cache: where keys and values are kept, a `Cache` of the needed length by default. The prompt follows what it holds already.
        on_byte: called after each byte, for a progress bar.
    """
    if not prompt:
        raise bad_value("prompt", "must hold one byte or more", "none")
    if temperature < 0:
        raise bad_value("temperature", "must be 0 or more", temperature)
    check_int("count", count, 1)
    check_int("top_k", top_k, 1)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(model.config, len(prompt) + count) if cache is None else cache
    began = time.perf_counter()
    last = prefill(model, torch.tensor([list(prompt)]), cache, chunk=chunk)[0, -1]
    middle = time.perf_counter()
    rows, written = [], bytearray()
    for i in range(count):
        rows.append(last)
        written.append(_draw(last, temperature, top_k, generator))
        on_byte()
        if i + 1 < count:
            last = model(torch.tensor([[written[-1]]]), cache)[0, -1]
    return Continuation(prompt, bytes(written), torch.stack(rows), middle - began, time.perf_counter() - middle)


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, places = logits.topk(min(top_k, logits.numel()))
    return int(places[torch.multinomial((values / temperature).softmax(0), 1, generator=generator)])


@torch.no_grad()
def cache_error(model: LanguageModel, continuation: Continuation) -> float:
    """Largest difference between the logits made with the cache and those of one call without it, relative to the largest logit."""
    model.eval()
    whole = continuation.prompt + continuation.new[:-1]
    plain = model(torch.tensor([list(whole)]))[0, len(continuation.prompt) - 1 :]
    return float((continuation.logits - plain).abs().max() / plain.abs().max())
