"""The layout of one rank: its own queries in rows, against keys that were brought to it in slots of one block each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2attn.distributed.needs import lists_of_pieces
from s2attn.distributed.pieces import Asked, KeyPieces, QueryPieces
from s2attn.layout import Layout, spans_of
from s2attn.layout.build import Lists
from s2attn.layout.convert import sorted_entries
from s2attn.layout.entries import Entries, index_from
from s2attn.layout.index import BlockIndex
from s2attn.layout.tiles import TileTable
from s2attn.patterns import Pattern
from s2attn.patterns.runs import Array


@dataclass(frozen=True)
class Rows:
    """What the rows of one rank list: entries of every distinct pattern, with key blocks of all sequences, and the mask tiles."""

    entries: dict[Pattern, Entries]
    tiles: Tensor


def rows_of(asked: Asked, pieces: QueryPieces, rank: int) -> Rows:
    """The lists of a rank, row by row of its own tokens; time and memory grow with its listed blocks."""
    patterns = list(dict.fromkeys(asked.resolved))
    tiles = TileTable(asked.block)
    which = np.arange(pieces.rank_ptr[rank], pieces.rank_ptr[rank + 1])
    parts = lists_of_pieces(patterns, asked, pieces, which, tiles)
    found: dict[Pattern, list[tuple[Array, Array, Array]]] = {pattern: [] for pattern in patterns}
    for part in parts:
        for pattern, lists in zip(patterns, part.lists, strict=True):
            found[pattern].append(_written(lists, part.pieces, part.first_block))
    lengths = spans_of([asked.shards.tokens], asked.block).length.numpy()
    entries = {}
    for pattern, several in found.items():
        piece, idx, tile = (np.concatenate(column) for column in zip(*several, strict=True))
        line = pieces.line[piece]
        # A row whose queries follow each other is as it was listed; where it is made of several pieces, their masks are joined.
        whole = pieces.length[piece] == lengths[line]
        joined = _joined(asked, pieces, piece[~whole], idx[~whole], tile[~whole], tiles, lengths)
        columns = zip((line[whole], idx[whole], tile[whole]), joined, strict=True)
        line, idx, tile = (torch.from_numpy(np.concatenate(pair).astype(np.int64)) for pair in columns)
        entries[pattern] = _ordered(asked, line, idx, tile)
    return Rows(entries, tiles.tensor())


def _ordered(asked: Asked, line: Tensor, idx: Tensor, tile: Tensor) -> Entries:
    order = torch.sort(line * asked.blocks + idx, stable=True).indices
    return sorted_entries(line[order], idx[order], tile[order])


def _written(lists: Lists, pieces: Array, first_block: int) -> tuple[Array, Array, Array]:
    """Piece, key block and mask tile (-1 for full ones) of every entry."""
    idx = np.empty(int(lists.count.sum()), dtype=np.int32)
    lists.write(idx, first_block)
    inside = np.arange(len(idx)) - np.repeat(np.cumsum(lists.count) - lists.count, lists.count)
    tile = np.full(len(idx), -1, dtype=np.int32)
    tile[inside >= np.repeat(lists.full, lists.count)] = lists.tile
    return np.repeat(pieces, lists.count), idx, tile


def _joined(
    asked: Asked, pieces: QueryPieces, piece: Array, idx: Array, tile: Array, tiles: TileTable, lengths: Array
) -> tuple[Array, Array, Array]:
    """Entries of rows that are made of several pieces: row, key block, and the tile that all pieces together see."""
    if not len(piece):
        return piece, idx, tile
    block, known, token = asked.block, tiles.tensor().numpy(), np.arange(asked.block)
    code, back = np.unique(pieces.line[piece] * asked.blocks + idx, return_inverse=True)
    masks = np.zeros((len(code), block, block), dtype=bool)
    # One query of one entry at a time would be slow: all entries that begin at one place of their row are shifted together.
    for place in np.unique(pieces.place[piece]).tolist():
        mine = np.flatnonzero(pieces.place[piece] == place)
        length = pieces.length[piece[mine]]
        seen = np.ones((len(mine), block, block), dtype=bool)
        partial = tile[mine] >= 0
        seen[partial] = known[tile[mine][partial]]
        seen &= (token < length[:, None])[:, :, None]
        masks[back.reshape(-1)[mine], place:] |= seen[:, : block - place]
    line, idx = code // asked.blocks, code % asked.blocks
    exists = np.broadcast_to((token < lengths[line][:, None])[:, :, None], masks.shape)
    number = tiles.number(masks, exists)
    assert not (number == TileTable.EMPTY).any()  # every piece lists only what some of its queries see
    return line, idx, number


def layout_in_slots(asked: Asked, rows: Rows, slot_of: Mapping[frozenset[Pattern], Array], slots: int) -> Layout:
    """The rank's layout over ``slots`` slots; ``slot_of[group][block]`` is the slot where the KV heads of a group find a key block."""
    unique: dict[tuple[Pattern, frozenset[Pattern]], int] = {}
    heads = []
    for number, pattern in enumerate(asked.resolved):
        group = asked.groups[number * asked.num_kv_heads // len(asked.resolved)]
        heads.append(unique.setdefault((pattern, group), len(unique)))
    entries = []
    for pattern, group in unique:
        one = rows.entries[pattern]
        entries.append(Entries(one.line, torch.from_numpy(slot_of[group]).long()[one.idx], one.tile))
    return slot_layout(asked, entries, heads, rows.tiles, slots)


def slot_layout(asked: Asked, entries: list[Entries], heads: list[int], tiles: Tensor, slots: int) -> Layout:
    """A layout of the rank's rows and whole slots; causality is in the tiles, since slots say nothing of positions."""
    q_spans, k_spans = spans_of([asked.shards.tokens], asked.block), spans_of([slots * asked.block], asked.block)
    like = BlockIndex(*(torch.zeros(0, dtype=torch.int64) for _ in range(5)))
    layout = Layout(asked.block, False, index_from(entries, heads, len(q_spans), like), tiles, q_spans, k_spans)
    return layout.proven()  # holds its invariants by construction, which tests prove


def cut_by_holder(asked: Asked, rows: Rows, keys: KeyPieces) -> list[Rows]:
    """The same rows for the keys of every rank apart; blocks that several ranks hold parts of get tiles for each part."""
    ranks = asked.shards.ranks
    code, back = np.unique(keys.block * ranks + keys.rank, return_inverse=True)
    block, holder = code // ranks, code % ranks
    held = np.bincount(back.reshape(-1), weights=keys.length)
    columns = np.full(len(code), -1, dtype=np.int64)
    cut = np.flatnonzero(held < asked.block_length[block])
    columns[cut] = np.arange(len(cut))
    shown = np.zeros((len(cut), asked.block), dtype=bool)
    token = np.arange(asked.block)
    for piece in np.flatnonzero(columns[back.reshape(-1)] >= 0):
        low = keys.offset[piece]
        shown[columns[back.reshape(-1)[piece]]] |= (token >= low) & (token < low + keys.length[piece])
    ptr = torch.from_numpy(np.searchsorted(block, np.arange(asked.blocks + 1)))
    cuts = _Cuts(ptr, torch.from_numpy(holder), torch.from_numpy(columns), torch.from_numpy(shown), asked.shards.tokens)
    made = [cuts.entries(one, ranks) for one in rows.entries.values()]
    tiles, numbers = cuts.tiles(rows.tiles, [entries.tile for several in made for entries in several])
    seen = torch.cat([tiles.flatten(1).any(1), torch.ones(1, dtype=torch.bool)])  # the last one stands for full entries, number -1
    apart: list[dict[Pattern, Entries]] = [{} for _ in range(ranks)]
    for i, (pattern, several) in enumerate(zip(rows.entries, made, strict=True)):
        for rank, entries in enumerate(several):
            tile = numbers[i * ranks + rank]
            kept = seen[tile]
            apart[rank][pattern] = _ordered(asked, entries.line[kept], entries.idx[kept], tile[kept])
    return [Rows(entries, tiles) for entries in apart]


@dataclass(frozen=True, eq=False)
class _Cuts:
    """Who holds the key blocks, and what of them.

    Attributes:
        ptr: block j is held by ``holder[ptr[j]:ptr[j + 1]]``.
        columns: beside each holder, the row of ``shown`` that says which tokens of the block it holds; -1 for all of them.
        queries: of the rank: those beyond them, in a last row that ends early, see nothing.
    """

    ptr: Tensor
    holder: Tensor
    columns: Tensor
    shown: Tensor
    queries: int

    def entries(self, entries: Entries, ranks: int) -> list[Entries]:
        """Entries by holder of their key block; ``tile`` becomes a code of mask tile, columns, and whether the row ends early."""
        count = (self.ptr[1:] - self.ptr[:-1])[entries.idx]
        entry = torch.repeat_interleave(torch.arange(len(count)), count)
        which = self.ptr[:-1][entries.idx][entry] + torch.arange(len(entry)) - (count.cumsum(0) - count)[entry]
        short = (entries.line[entry] + 1) * self.shown.shape[1] > self.queries
        code = ((entries.tile[entry] + 1) * (len(self.shown) + 1) + self.columns[which] + 1) * 2 + short
        order = torch.sort(self.holder[which], stable=True).indices
        ends = torch.bincount(self.holder[which], minlength=ranks).tolist()
        parts = (x[order].split(ends) for x in (entries.line[entry], entries.idx[entry], code))
        return [Entries(*part) for part in zip(*parts, strict=True)]

    def tiles(self, tiles: Tensor, codes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The distinct tiles behind the codes, and every entry's number among them; -1 for entries that stay full."""
        kinds, which = torch.unique(torch.cat(codes), return_inverse=True)
        tile, cut = kinds // 2 // (len(self.shown) + 1) - 1, kinds // 2 % (len(self.shown) + 1) - 1
        partial = (tile >= 0) | (cut >= 0)
        block = self.shown.shape[1]
        everything = torch.ones(1, block, block, dtype=torch.bool)  # stands last, where number -1 finds it
        masks = torch.cat([tiles, everything])[tile[partial]] & torch.cat([self.shown, everything[0, :1]])[cut[partial]][:, None, :]
        ended = (kinds % 2 == 1)[partial]
        masks[ended] &= (torch.arange(block) < self.queries % block)[:, None]
        number = torch.full_like(kinds, -1)
        number[partial] = torch.arange(int(partial.sum()))
        return masks, list(number[which].split([len(code) for code in codes]))
