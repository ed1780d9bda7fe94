"""All entries of one head of an index, written out: the shared first step of transposing, counting, converting and checking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.layout.index import BlockIndex


@dataclass(frozen=True, eq=False)
class Entries:
    """Flat int64 vectors, one number per entry, line after line, full entries of a line first; ``tile`` is -1 for full ones."""

    line: Tensor
    idx: Tensor
    tile: Tensor


def entries_of(index: BlockIndex, head: int) -> Entries:
    """The entries of one head."""
    ptr, full = index.ptr[head], index.full[head].long()
    lo, hi = int(ptr[0]), int(ptr[-1])
    count = ptr[1:] - ptr[:-1]
    line = torch.repeat_interleave(torch.arange(index.lines, device=ptr.device), count, output_size=hi - lo)
    inside = torch.arange(lo, hi, device=ptr.device) - ptr[:-1][line] - full[line]
    partial = inside >= 0
    tile = torch.full_like(line, -1)
    tile[partial] = index.tile[(index.tile_ptr[head][line] + inside)[partial]].long()
    return Entries(line, index.idx[lo:hi].long(), tile)


def first_with_same_lists(index: BlockIndex) -> list[int]:
    """For every head the first head that points to the same storage (itself when its lists are its own)."""
    if not index.lines:
        return list(range(index.heads))
    first: dict[tuple[int, ...], int] = {}
    corners = torch.stack([index.ptr[:, 0], index.ptr[:, -1], index.tile_ptr[:, 0], index.tile_ptr[:, -1]], dim=1).tolist()
    candidates = [first.setdefault(tuple(corner), head) for head, corner in enumerate(corners)]
    same = [
        torch.equal(index.ptr[h], index.ptr[c])
        and torch.equal(index.full[h], index.full[c])
        and torch.equal(index.tile_ptr[h], index.tile_ptr[c])
        for h, c in enumerate(candidates)
    ]
    return [c if equal else h for h, (c, equal) in enumerate(zip(candidates, same, strict=True))]


def index_from(heads: list[Entries], which: list[int], lines: int, like: BlockIndex) -> BlockIndex:
    """Build an index from entries that are sorted by line, full ones first; ``which[h]`` is the place in ``heads`` of head h."""
    device = like.ptr.device
    ptr, full, tile_ptr, idx, tile = [], [], [], [], []
    at = tiles_at = 0
    for entries in heads:
        partial = entries.tile >= 0
        count = torch.bincount(entries.line, minlength=lines)
        partials = torch.bincount(entries.line[partial], minlength=lines)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        ptr.append(torch.cat([zero, count.cumsum(0)]) + at)
        tile_ptr.append(partials.cumsum(0) - partials + tiles_at)
        full.append((count - partials).int())
        idx.append(entries.idx.int())
        tile.append(entries.tile[partial].int())
        at, tiles_at = at + len(entries.idx), tiles_at + len(tile[-1])
    take = torch.tensor(which, device=device)
    return BlockIndex(torch.stack(ptr)[take], torch.stack(full)[take], torch.stack(tile_ptr)[take], torch.cat(idx), torch.cat(tile))
