"""The lists of a call in two: keys on the device, and keys on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.core import BLOCKS
from s2attn.layout import HeadRange, Layout, build_layout, default_block
from s2attn.layout.entries import Entries, entries_of, index_from
from s2attn.patterns import Pattern


def packed_layout(
    pattern: Pattern, num_heads: tuple[int, int], queries: Tensor, tokens: Tensor, page_size: int, *, layer: int, heads: HeadRange | None
) -> Layout:  # fmt: skip
    """What the last ``queries`` of sequences of so many ``tokens`` read, on the CPU; ``num_heads`` of q and of keys."""
    most = max(BLOCKS[0], default_block(pattern))
    block = next(size for size in reversed(BLOCKS) if size <= most and page_size % size == 0)
    cu_q, cu_k = (torch.cat((count.new_zeros(1), count.cumsum(0))) for count in (queries.long(), tokens.long()))
    return build_layout(pattern, *num_heads, block=block, layer=layer, heads=heads, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def split_by_page(layout: Layout, away: Tensor, page_size: int) -> tuple[Layout, Layout]:
    """Two layouts that list together what one did: pages that are here, and those that are ``away``.

    Args:
        layout: causal and packed, of the sequences of ``away``, on the CPU.
        away: ``(B, G, pages)`` bool, which pages of which KV head of each sequence.
    """
    here: list[Entries] = []
    there: list[Entries] = []
    for head in range(layout.heads):
        entries = entries_of(layout.rows, head)
        sequence = layout.k_spans.seq[entries.idx].long()
        page = torch.div(layout.k_spans.pos[entries.idx].long(), page_size, rounding_mode="floor")
        gone = away[sequence, head * away.shape[1] // layout.heads, page]
        for part, kept in ((here, ~gone), (there, gone)):
            part.append(Entries(entries.line[kept], entries.idx[kept], entries.tile[kept]))
    return _like(layout, here), _like(layout, there)


def _like(layout: Layout, heads: list[Entries]) -> Layout:
    index = index_from(heads, list(range(len(heads))), layout.rows.lines, layout.rows)
    part = Layout(layout.block, True, index, layout.tiles, layout.q_spans, layout.k_spans, True, layout.seqlen_q, layout.seqlen_k)
    return part.proven()  # some entries of a layout that holds its invariants
