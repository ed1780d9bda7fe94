"""Counting allowed (query, key) pairs without looking at tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from s2attn.layout.layout import Layout


def count_pairs(layout: Layout) -> Tensor:
    """Allowed pairs of each head, ``(heads,)`` int64: whole blocks by their size, partial ones by their tiles' set bits."""
    rows, length = layout.rows, layout.q_spans.length.long()
    full = (rows.full.long() * length).sum(dim=1) * layout.block
    bits = layout.tiles.flatten(1).sum(dim=1)
    running = torch.cat([bits.new_zeros(1), bits[rows.tile.long()].cumsum(0)])
    partial_end = rows.tile_ptr + rows.counts - rows.full
    return full + (running[partial_end] - running[rows.tile_ptr]).sum(dim=1)


def dense_pairs(layout: Layout) -> int:
    """Pairs that dense attention over the same sequences has, under the layout's causality."""
    if not layout.causal:
        # Each sequence is a full rectangle.
        queries = _per_sequence(layout.q_spans.seq, layout.q_spans.length)
        keys = _per_sequence(layout.k_spans.seq, layout.k_spans.length)
        size = min(len(queries), len(keys))
        return int((queries[:size] * keys[:size]).sum())
    first, length = layout.q_spans.pos.long(), layout.q_spans.length.long()
    # A query at position p >= 0 sees p + 1 keys; queries before the first key see none.
    low, high = torch.clamp(first, min=0), first + length
    seen = (high * (high + 1) - low * (low + 1)) // 2
    return int(torch.where(high > 0, seen, torch.zeros_like(seen)).sum())


def _per_sequence(seq: Tensor, length: Tensor) -> Tensor:
    sequences = int(seq.max()) + 1 if len(seq) else 0
    return torch.zeros(sequences, dtype=torch.int64, device=seq.device).index_add_(0, seq.long(), length.long())
