"""Causal attention under Megatron's context parallelism, where a rank holds one early and one late chunk of every sequence.

A sequence is cut into ``2 * cp`` chunks; rank r has chunk r and chunk ``2 * cp - 1 - r``, so that every rank has the same number of causal
pairs. Keys and values are gathered, and each of the two chunks attends to the beginning of the sequence that ends with it: there its
queries stand at the end of the keys, which is where `s2attn.attention` expects them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from s2attn.core import bad_value

Attend = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None], Tensor]
"""Causal attention of q over k and v, tokens first; with the cumulative lengths of queries and of keys when sequences are packed."""


@dataclass(frozen=True)
class _Part:
    """One of the two chunks of packed sequences: which local rows ask, which gathered rows they see, and the lengths of both."""

    queries: Tensor
    keys: Tensor
    lengths: tuple[Tensor, Tensor]


def zigzag_attention(q: Tensor, k: Tensor, v: Tensor, attend: Attend, group: Any, cu_seqlens: Tensor | None = None) -> Tensor:
    """Attention of this rank's queries over the whole context, with gradients that reach every rank's keys.

    Args:
        q, k, v: this rank's tokens first, ``(S / cp, batch, heads, head_dim)``, or packed ``(total / cp, heads, head_dim)``.
        attend: what computes one chunk.
        group: the context-parallel process group.
        cu_seqlens: of packed sequences, over all ranks; every length a multiple of ``2 * cp``.

    Returns:
        What `attend` gives, for this rank's queries in their order.
    """
    rows, ranks = q.shape[0], group.size()
    if rows % 2:
        raise bad_value("query", f"must have an even number of tokens on each of {ranks} context-parallel ranks, two chunks", rows)
    parts: tuple[_Part, ...] = ()
    if cu_seqlens is not None:  # read at every call: memory may have been refilled unseen
        numbers = tuple(cu_seqlens.tolist())
        parts = _packed_parts(numbers, rows, group.rank(), ranks, cu_seqlens.device)
    # One exchange for keys and values, and one for their gradients, in the same order on all ranks.
    gathered = gather_from_sequence_parallel_region(torch.stack((k, v), 1), group=group)
    if parts:
        outs = []
        for part in parts:
            keys, values = gathered.index_select(0, part.keys).unbind(1)
            outs.append(attend(q.index_select(0, part.queries), keys, values, part.lengths))
        order = torch.cat([part.queries for part in parts]).argsort()
        return torch.cat(outs).index_select(0, order)
    half, rank = rows // 2, group.rank()
    chunks = gathered.unflatten(0, (ranks, 2, half))
    keys, values = torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten(0, 1).unbind(1)
    seen = ((rank + 1) * half, (2 * ranks - rank) * half)
    return torch.cat([attend(own, keys[:end], values[:end], None) for own, end in zip(q.split(half), seen, strict=True)])


@lru_cache(maxsize=16)
def _packed_parts(numbers: tuple[int, ...], rows: int, rank: int, ranks: int, device: torch.device) -> tuple[_Part, _Part]:
    """The two parts of every call with these lengths: all layers of a step share them."""
    if numbers[0] != 0 or numbers[-1] != rows * ranks or any(b < a for a, b in pairwise(numbers)):
        rule = f"must rise from 0 to the {rows * ranks} tokens of all {ranks} context-parallel ranks"
        raise bad_value("cu_seqlens", rule, list(numbers))
    if any(number % (2 * ranks) for number in numbers):
        rule = f"must have lengths that are multiples of {2 * ranks}, two chunks for each of {ranks} context-parallel ranks"
        raise bad_value("cu_seqlens", rule, list(numbers))
    edges = torch.tensor(numbers, device=device) // (2 * ranks)  # of one chunk of every sequence, laid end to end
    chunk = edges.diff()
    local = 2 * edges[:-1]
    parts = []
    for half, number in enumerate((rank, 2 * ranks - 1 - rank)):
        chunks = torch.arange(number + 1, device=edges.device)
        late = chunks >= ranks
        owner = torch.where(late, 2 * ranks - 1 - chunks, chunks)
        starts = owner * rows + local[:, None] + late * chunk[:, None]
        keys = _runs(starts.flatten(), chunk.repeat_interleave(number + 1), (number + 1) * rows // 2)
        lengths = (edges, edges * (number + 1))
        parts.append(_Part(_runs(local + half * chunk, chunk, rows // 2), keys, lengths))
    return parts[0], parts[1]


def _runs(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """The numbers ``start, start + 1, ...`` of every run, one run after another."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths, output_size=total) + torch.arange(total, device=starts.device)
