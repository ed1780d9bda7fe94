"""Rows of a batch, taken apart and put together again: slots in another order, sequences that share a row, a cache seen as pages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def take(x: Tensor, order: Tensor) -> Tensor:
    """``x`` ``(B, S, heads, width)`` with the slots of every row in this order ``(B, S)``."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def put(out: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """The slots back in their places, with 0 where they are not ``real`` ``(B, S)``."""
    out = torch.where(real[:, :, None, None], out, 0)
    return torch.zeros_like(out).scatter(1, order[:, :, None, None].expand(-1, -1, *out.shape[2:]), out)


def places_of(x: Tensor) -> Tensor:
    """0 and on, for the slots of ``x`` ``(B, S, ...)``."""
    return torch.arange(x.shape[1], device=x.device)


def as_pages(x: Tensor, length: int, size: int) -> Tensor:
    """``(B, G, S, width)`` as pages ``(B * G * length / size, size, G, width)``, the heads all of one memory.

    Without a copy where S is ``length``; the pages of KV head g of row b are ``(b * G + g) * length / size`` and on.
    """
    kv_heads, width = x.shape[1], x.shape[3]
    x = pad(x, (0, 0, 0, length - x.shape[2])) if length != x.shape[2] else x
    return x.contiguous().view(-1, size, 1, width).expand(-1, -1, kv_heads, -1)


def document_starts(positions: Tensor, real: Tensor | None = None) -> Tensor:
    """The tokens that begin a document, by the rule of this integration for packed rows.

    A document begins at the first token of a row, where positions decrease, and where a position 0
    follows a position 0, as after a document of one token. Gaps, larger steps and repeated positions
    begin none, nor does a repeated 0 where later positions of the same document repeat too
    (0, 0, 1, 1).

    Args:
        positions: ``(B, T)`` integers.
        real: ``(B, T)`` bool, which of them count: adjacent ones in each row. All by default.

    Returns:
        ``(B, T)`` bool.

    >>> document_starts(torch.tensor([[0, 1, 2, 0, 0, 1], [0, 0, 1, 1, 5, 9]])).int().tolist()
    [[1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    """
    real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    if positions.shape[1] == 1:  # a decoding step
        return real
    before, now = positions[:, :-1], positions[:, 1:]
    both = real[:, :-1] & real[:, 1:]
    falls = pad(both & (now < before), (1, 0))
    repeats = pad(both & (now == before), (1, 0))
    run = falls.cumsum(1)
    repeated = (repeats & (positions != 0)).to(run.dtype)
    repeated = torch.zeros_like(run).scatter_reduce(1, run, repeated, "amax").gather(1, run) > 0
    first = real & ~pad(real[:, :-1], (1, 0))
    return first | falls | (repeats & (positions == 0) & ~repeated)


def boundaries(starts: Tensor) -> Tensor:
    """Cumulative lengths ``(sequences + 1,)`` of sequences that begin where ``starts`` is true."""
    starts = starts.flatten()
    return torch.cat([starts.nonzero()[:, 0], torch.tensor([len(starts)], device=starts.device)])
