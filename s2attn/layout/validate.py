"""The invariants of `Layout`, checked on tensors, each by its number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2attn.core import BLOCKS
from s2attn.layout.entries import entries_of, first_with_same_lists

if TYPE_CHECKING:
    from s2attn.layout.layout import Layout


def broken_invariant(layout: Layout) -> tuple[str, str] | None:
    """The first invariant that does not hold, as (its statement, what came), or None."""
    for check in (_shapes, _spans, _pointers, _entries, _tiles):
        broken = check(layout)
        if broken is not None:
            return broken
    return None


def _shapes(layout: Layout) -> tuple[str, str] | None:
    heads, lines = layout.rows.full.shape if layout.rows.full.dim() == 2 else (-1, -1)
    expected = {
        "rows.ptr": (layout.rows.ptr, torch.int64, (heads, lines + 1)),
        "rows.full": (layout.rows.full, torch.int32, (heads, lines)),
        "rows.tile_ptr": (layout.rows.tile_ptr, torch.int64, (heads, lines)),
        "rows.idx": (layout.rows.idx, torch.int32, (layout.rows.idx.numel(),)),
        "rows.tile": (layout.rows.tile, torch.int32, (layout.rows.tile.numel(),)),
        "tiles": (layout.tiles, torch.bool, (layout.tiles.shape[0], layout.block, layout.block)),
    }
    for axis, spans, blocks in (("q_spans", layout.q_spans, lines), ("k_spans", layout.k_spans, len(layout.k_spans))):
        for name in ("start", "length", "seq", "pos"):
            expected[f"{axis}.{name}"] = (getattr(spans, name), torch.int32, (blocks,))
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != layout.device:
            came = f"{name} of {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            return f"I1 {name} is {dtype} {shape} on {layout.device}", came
    if heads < 1 or layout.block not in BLOCKS:
        return "I1 at least one head, block one of 16, 32, 64, 128, 256", f"heads {heads}, block {layout.block}"
    return None


def _spans(layout: Layout) -> tuple[str, str] | None:
    for name, spans, total in (("q_spans", layout.q_spans, layout.seqlen_q), ("k_spans", layout.k_spans, layout.seqlen_k)):
        if spans.total != total:
            return "I6 spans cover seqlen_q and seqlen_k", f"{name} cover {spans.total} tokens of {total}"
        if not len(spans):
            continue
        start, length, seq, pos = (part.long() for part in spans.tensors())
        same = seq[1:] == seq[:-1]
        good = (
            int(start[0]) == 0
            and bool((start[1:] == start[:-1] + length[:-1]).all())
            and bool(((length >= 1) & (length <= layout.block)).all())
            and bool((length[:-1][same] == layout.block).all())
            and bool((seq[1:] >= seq[:-1]).all())
            and bool((pos[1:][same] == pos[:-1][same] + layout.block).all())
            and int(seq[0]) >= 0
        )
        if name == "k_spans":
            good = good and int(pos[0]) == 0 and bool((pos[1:][~same] == 0).all())
        if not good:
            return "I6 spans are consecutive, each 1 to block tokens, only a sequence's last one shorter", name
    return None


def _pointers(layout: Layout) -> tuple[str, str] | None:
    rows = layout.rows
    if not rows.lines:
        return None
    count, partial = rows.counts, rows.counts - rows.full
    if bool((count < 0).any()) or int(rows.ptr.min()) < 0 or int(rows.ptr.max()) > rows.idx.numel():
        return "I2 ptr never decreases inside a head and stays inside idx", f"{int(rows.ptr.min())} .. {int(rows.ptr.max())}"
    if bool((rows.full < 0).any()) or bool((partial < 0).any()):
        return "I3 0 <= full <= entries of the line", f"{int(rows.full.min())} full; {int(partial.min())} others"
    if int(rows.tile_ptr.min()) < 0 or int((rows.tile_ptr + partial).max()) > rows.tile.numel():
        return "I5 tile_ptr stays inside tile", f"{int(rows.tile_ptr.min())} .. {int((rows.tile_ptr + partial).max())}"
    if rows.tile.numel() and (int(rows.tile.min()) < 0 or int(rows.tile.max()) >= layout.tiles.shape[0]):
        return "I5 tile numbers are in range", f"{int(rows.tile.min())} .. {int(rows.tile.max())} of {layout.tiles.shape[0]}"
    if rows.idx.numel() and (int(rows.idx.min()) < 0 or int(rows.idx.max()) >= len(layout.k_spans)):
        return "I4 block numbers are in range", f"{int(rows.idx.min())} .. {int(rows.idx.max())} of {len(layout.k_spans)}"
    return None


def _entries(layout: Layout) -> tuple[str, str] | None:
    for head in sorted(set(first_with_same_lists(layout.rows))):
        entries = entries_of(layout.rows, head)
        line, idx, partial = entries.line, entries.idx, entries.tile >= 0
        same = (line[1:] == line[:-1]) & (partial[1:] == partial[:-1])
        if bool((same & (idx[1:] <= idx[:-1])).any()):
            return "I4 block numbers ascend inside the full and inside the partial part", f"head {head}"
        if _repeated(line[partial], idx[partial], line[~partial], idx[~partial], len(layout.k_spans)):
            return "I4 no block is listed twice in a line", f"head {head}"
        if bool((layout.q_spans.seq[line] != layout.k_spans.seq[idx]).any()):
            return "I7 a row lists key blocks of its own sequence only", f"head {head}"
        if bool((layout.k_spans.length[idx[~partial]] < layout.block).any()):
            return "I8 a key block that ends early is never full", f"head {head}"
        last_key = layout.k_spans.pos[idx[~partial]] + layout.block - 1
        if layout.causal and bool((last_key > layout.q_spans.pos[line[~partial]]).any()):
            return "I9 a causal layout lists no pair whose key is after its query", f"a full block of head {head}"
    return None


def _repeated(line_a: Tensor, idx_a: Tensor, line_b: Tensor, idx_b: Tensor, blocks: int) -> bool:
    if not len(line_a) or not len(line_b):
        return False
    return bool(torch.isin(line_a * blocks + idx_a, line_b * blocks + idx_b).any())


def _tiles(layout: Layout) -> tuple[str, str] | None:
    token = torch.arange(layout.block, device=layout.device)
    # For each tile, the last key it allows per query: enough to check every use of the tile without reading tokens again.
    reach = torch.where(layout.tiles, token, -1).amax(dim=2)
    last_key = reach.amax(dim=1)
    ahead = torch.where(reach >= 0, reach - token, -layout.block).amax(dim=1)
    last_query = torch.where(reach >= 0, token, -1).amax(dim=1)
    for head in sorted(set(first_with_same_lists(layout.rows))):
        entries = entries_of(layout.rows, head)
        partial = entries.tile >= 0
        line, idx, tile = entries.line[partial], entries.idx[partial], entries.tile[partial]
        if bool((last_key[tile] >= layout.k_spans.length[idx]).any()) or bool((last_query[tile] >= layout.q_spans.length[line]).any()):
            return "I8 tiles are False beyond the end of a sequence", f"a partial block of head {head}"
        if layout.causal and bool((ahead[tile] + layout.k_spans.pos[idx] > layout.q_spans.pos[line]).any()):
            return "I9 a causal layout lists no pair whose key is after its query", f"a partial block of head {head}"
    return None
