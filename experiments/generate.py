"""Text from the lab's model of bytes, timed, and the proof that the cache it was written with changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.model import LanguageModel
from s2attn.cache import SparseCache
from s2attn.nn.generation import stream
from s2attn.nn.sampling import Sampling


@dataclass(frozen=True)
class Continuation:
    """What a model wrote, and what it cost.

    Attributes:
        new: the bytes written, without the prompt.
        logits: float ``(new, vocabulary)``, from which each byte was drawn.
        prefill_seconds, decode_seconds: for the prompt and the first byte, and for all others.
    """

    prompt: bytes
    new: bytes
    logits: Tensor
    prefill_seconds: float
    decode_seconds: float

    @property
    def text(self) -> str:
        return self.new.decode("utf-8", errors="replace")


def generate(
    model: LanguageModel,
    prompt: bytes,
    sampling: Sampling,
    *,
    chunk: int = 512,
    cache: SparseCache | None = None,
    on_byte: Callable[[], None] = lambda: None,
) -> Continuation:
    """Continue ``prompt`` as `s2attn.stream` does, keep all logits, and take the time.

    Args:
        chunk: bytes of the prompt that are read at a time.
        cache: where keys and values are kept, in a sequence of its own; one that is dropped afterwards by default.
        on_byte: called after each byte, for a progress bar.
    """
    model.eval()
    rows, written = [], bytearray()
    began = middle = time.perf_counter()
    for (token,) in stream(model, [list(prompt)], sampling, chunk=chunk, cache=cache):
        middle = time.perf_counter() if not rows else middle
        rows.append(token.logits)
        written.append(token.token)
        on_byte()
    return Continuation(prompt, bytes(written), torch.stack(rows), middle - began, time.perf_counter() - middle)


@torch.no_grad()
def cache_error(model: LanguageModel, continuation: Continuation) -> float:
    """Largest difference between the logits made with the cache and those of one call without it, relative to the largest logit."""
    model.eval()
    whole = continuation.prompt + continuation.new[:-1]
    plain = model(torch.tensor([list(whole)]))[0, len(continuation.prompt) - 1 :]
    return float((continuation.logits - plain).abs().max() / plain.abs().max())
