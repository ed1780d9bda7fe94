"""One layout of several sequences as two: the keys of a prefix that they share, for all queries together, and every sequence's own keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2attn.core import bad_value, check_int
from s2attn.layout.convert import sorted_entries
from s2attn.layout.entries import Entries, entries_of, first_with_same_lists, index_from
from s2attn.layout.index import spans_of
from s2attn.layout.layout import Layout
from s2attn.layout.tiles import TileTable


@dataclass(frozen=True, eq=False)
class Cascade:
    """Two packed layouts that list together what one did, on the CPU.

    Attributes:
        shared: one sequence: the prefix, and behind it as many tokens as there are queries, which nobody lists. The queries are those of
            all sequences, one after another, in blocks that pay no heed to where a sequence begins: a block of the prefix is listed once
            for all queries of a block, and a mask tile says which of them see what.
        own: the sequences, without the blocks of the prefix.
    """

    shared: Layout
    own: Layout


def split_prefix(layout: Layout, prefix: int) -> Cascade:
    """Split a packed, causal layout at a position before all of its queries.

    The split is exact for every pattern: what each query sees of the prefix is looked up at the query's own position, so that queries of
    different sequences may stand at different ones.

    Args:
        prefix: tokens, a multiple of the layout's block.
    """
    if not layout.packed or not layout.causal:
        raise bad_value("layout", "must be causal and of packed sequences", layout)
    if check_int("prefix", prefix, 0) % layout.block:
        raise bad_value("prefix", f"must be a multiple of the layout's block ({layout.block})", prefix)
    layout, block, total = layout.to("cpu"), layout.block, layout.seqlen_q
    q_spans, k_spans = spans_of([total], block, [prefix]), spans_of([prefix + total], block)
    same = first_with_same_lists(layout.rows)
    heads = sorted(set(same))
    shared, own, tiles = [], [], TileTable(block)
    for head in heads:
        entries = entries_of(layout.rows, head)
        before = layout.k_spans.pos[entries.idx] < prefix
        if bool((layout.q_spans.pos[entries.line] < prefix).any()):
            raise bad_value("prefix", "must end before the first query that sees anything", prefix)
        own.append(_some(entries, ~before))
        shared.append(_stacked(layout, _some(entries, before), q_spans.length.long(), tiles))
    which = [heads.index(head) for head in same]
    parts = (layout.tiles, layout.q_spans, layout.k_spans, True)
    return Cascade(
        # Both hold their invariants by construction, which tests prove.
        Layout(block, True, index_from(shared, which, len(q_spans), layout.rows), tiles.tensor(), q_spans, k_spans, True).proven(),
        Layout(block, True, index_from(own, which, layout.rows.lines, layout.rows), *parts).proven(),
    )


def _some(entries: Entries, kept: Tensor) -> Entries:
    return Entries(entries.line[kept], entries.idx[kept], entries.tile[kept])


def _stacked(layout: Layout, entries: Entries, lengths: Tensor, tiles: TileTable) -> Entries:
    """Entries of the prefix for blocks of consecutive queries, whatever sequences they are of; ``lengths`` of these blocks."""
    block, count = layout.block, layout.q_spans.length[entries.line].long()
    entry = torch.repeat_interleave(torch.arange(len(count)), count)  # one for each query of an entry
    place = torch.arange(len(entry)) - (count.cumsum(0) - count)[entry]
    token = layout.q_spans.start[entries.line].long()[entry] + place
    seen = torch.ones(len(entry), block, dtype=torch.bool)
    tile = entries.tile[entry]
    seen[tile >= 0] = layout.tiles[tile[tile >= 0], place[tile >= 0]]
    blocks = max(1, len(layout.k_spans))
    code = (
        torch.div(token, block, rounding_mode="floor") * blocks
        + torch.div(layout.k_spans.pos[entries.idx], block, rounding_mode="floor")[entry]
    )
    found, back = torch.unique(code, return_inverse=True)
    masks = torch.zeros(len(found), block, block, dtype=torch.bool)
    masks[back, token % block] = seen
    line, idx = torch.div(found, blocks, rounding_mode="floor"), found % blocks
    exists = torch.arange(block) < lengths[line][:, None]
    kind = torch.from_numpy(tiles.number(masks.numpy(), np.broadcast_to(exists.numpy()[:, :, None], masks.shape)))
    kept = kind != TileTable.EMPTY
    return sorted_entries(line[kept], idx[kept], kind[kept])
