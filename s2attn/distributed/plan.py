"""What one rank sends, receives and computes, for each way: index tensors and layouts, made once from what was asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from s2attn.core import bad_value
from s2attn.distributed.local import Rows, cut_by_holder, layout_in_slots, rows_of
from s2attn.distributed.needs import holds, needs
from s2attn.distributed.pieces import Asked, KeyPieces, QueryPieces, key_pieces, query_pieces
from s2attn.layout import Layout
from s2attn.patterns.runs import Array, ranges, repeat_ranges


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """Which rows of K and V go where when only needed blocks travel; a row is one token of one KV head, ``token * G + head``.

    Attributes:
        layout: of the rank's queries over slots; each KV head has its own blocks in them.
        rows: rows of the local K, ``tokens * G``.
        send: int64 rows of the local K, first those for rank 0, and so on; ``send_splits`` says how many for each.
        place: int64 rows of the slots where what arrives goes, in the order in which it arrives; ``place_splits`` by sender.
        own, own_place: rows of the local K that the rank lists itself, and where they go.

    Invariants, checked by :meth:`validate`:
        X1  splits are one number >= 0 for each rank, add up to their index, and a rank sends itself nothing
        X2  rows of the local K and of the slots are in range
        X3  no place gets two rows, and no rank gets a row twice
    """

    layout: Layout
    rows: int
    rank: int
    send: Tensor
    send_splits: list[int]
    place: Tensor
    place_splits: list[int]
    own: Tensor
    own_place: Tensor

    def to(self, device: torch.device) -> ExchangePlan:
        index = {name: getattr(self, name).to(device) for name in ("send", "place", "own", "own_place")}
        splits = {name: getattr(self, name) for name in ("send_splits", "place_splits")}
        return ExchangePlan(self.layout.to(device), self.rows, self.rank, **index, **splits)

    def validate(self, kv_heads: int) -> ExchangePlan:
        """Check the numbered invariants; raise ``ValueError`` naming the broken one, or return self."""
        room = self.layout.seqlen_k * kv_heads
        for name, index, splits in (("send", self.send, self.send_splits), ("place", self.place, self.place_splits)):
            good = len(splits) == len(self.send_splits) > self.rank >= 0 and min(splits) >= 0 and sum(splits) == len(index)
            if not good or splits[self.rank]:
                raise bad_value("plan", "must hold its invariants (X1 splits add up, nothing to oneself)", f"{name} {splits[:8]}")
        for name, index, end in (("send", self.send, self.rows), ("own", self.own, self.rows), ("place", self._placed, room)):
            if len(index) and (int(index.min()) < 0 or int(index.max()) >= end):
                raise bad_value(
                    "plan", f"must hold its invariants (X2 rows in 0 .. {end - 1})", f"{name} {int(index.min())}..{int(index.max())}"
                )
        peer = torch.repeat_interleave(torch.arange(len(self.send_splits)), torch.tensor(self.send_splits))
        for name, index in (("place", self._placed), ("own", self.own), ("send", peer.to(self.send.device) * self.rows + self.send)):
            if len(index.unique()) != len(index):
                raise bad_value("plan", "must hold its invariants (X3 no row twice)", name)
        return self

    @property
    def _placed(self) -> Tensor:
        return torch.cat([self.place, self.own_place])


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """All keys on every rank: the layout over them, and the slot token of each token, rank after rank (the same for all KV heads)."""

    layout: Layout
    place: Tensor

    def to(self, device: torch.device) -> GatherPlan:
        return GatherPlan(self.layout.to(device), self.place.to(device))


@dataclass(frozen=True, eq=False)
class RingPlan:
    """The keys of one rank after another: for each holder a layout (None where nothing is listed) and the slot token of its tokens."""

    layouts: list[Layout | None]
    places: list[Tensor]
    slots: list[int]

    def to(self, device: torch.device) -> RingPlan:
        layouts = [None if layout is None else layout.to(device) for layout in self.layouts]
        return RingPlan(layouts, [place.to(device) for place in self.places], self.slots)


@dataclass(frozen=True, eq=False)
class RankPlans:
    """The plans of one rank, each made on first use."""

    asked: Asked
    rank: int

    @cached_property
    def _keys(self) -> KeyPieces:
        return key_pieces(self.asked)

    @cached_property
    def _rows(self) -> Rows:
        return rows_of(self.asked, query_pieces(self.asked), self.rank)

    @cached_property
    def gather(self) -> GatherPlan:
        asked = self.asked
        everywhere = {group: np.arange(asked.blocks) for group in asked.groups}
        place = np.empty(asked.shards.seqlen, dtype=np.int64)
        token, slot = self._tokens(np.arange(len(self._keys.rank)), self._keys.block)
        place[token] = slot
        return GatherPlan(layout_in_slots(asked, self._rows, everywhere, asked.blocks), torch.from_numpy(place))

    def _tokens(self, pieces: Array, slot: Array) -> tuple[Array, Array]:
        """Every token of some key pieces: its number among the tokens of all ranks, and its token among slots."""
        keys, asked = self._keys, self.asked
        first = (keys.rank * asked.shards.tokens + keys.token)[pieces]
        which, token = repeat_ranges(first, keys.length[pieces])
        return token, (slot * asked.block + keys.offset[pieces] - first)[which] + token

    @cached_property
    def ring(self) -> RingPlan:
        asked, keys = self.asked, self._keys
        order, begins = keys.by_rank
        layouts, places, slots = [], [], []
        for holder, rows in enumerate(cut_by_holder(asked, self._rows, keys)):
            mine = order[begins[holder] : begins[holder + 1]]
            blocks = np.unique(keys.block[mine])
            slot_of = np.zeros(asked.blocks, dtype=np.int64)
            slot_of[blocks] = np.arange(len(blocks))
            token, slot = self._tokens(mine, slot_of[keys.block[mine]])
            place = np.empty(asked.shards.tokens, dtype=np.int64)
            place[token - holder * asked.shards.tokens] = slot
            listed = any(len(entries.idx) for entries in rows.entries.values())
            layouts.append(layout_in_slots(asked, rows, dict.fromkeys(asked.groups, slot_of), len(blocks)) if listed else None)
            places.append(torch.from_numpy(place))
            slots.append(len(blocks) * asked.block)
        return RingPlan(layouts, places, slots)

    @cached_property
    def exchange(self) -> ExchangePlan:
        asked, keys, rank, kv_heads = self.asked, self._keys, self.rank, self.asked.num_kv_heads
        order, begins = keys.by_rank
        mine = order[begins[rank] : begins[rank + 1]]
        pieces = query_pieces(asked)
        slots, slot_of, wanted = 0, {}, []
        found = next(iter(needs(asked, pieces, rank, rank + 1)))
        for group, runs in found.blocks.items():
            _, blocks = runs.expand()
            slot_of[group] = np.zeros(asked.blocks, dtype=np.int64)
            slot_of[group][blocks] = np.arange(len(blocks))
            slots = max(slots, len(blocks))
            wanted.append(ranges(keys.block_ptr[blocks], keys.block_ptr[blocks + 1] - keys.block_ptr[blocks]))
        by_group = dict(zip(found.blocks, wanted, strict=True))
        by_head = [by_group[group] for group in asked.groups], [slot_of[group] for group in asked.groups]
        holder, token, place = self._incoming(*by_head)
        local = holder == rank
        arrived = np.flatnonzero(~local)[np.argsort(holder[~local], kind="stable")]
        send, send_splits = self._outgoing(mine, pieces)
        plan = ExchangePlan(
            layout=layout_in_slots(asked, self._rows, slot_of, slots),
            rows=asked.shards.tokens * kv_heads,
            rank=rank,
            send=torch.from_numpy(send),
            send_splits=send_splits,
            place=torch.from_numpy(place[arrived]),
            place_splits=np.bincount(holder[arrived], minlength=asked.shards.ranks).tolist(),
            own=torch.from_numpy(token[local]),
            own_place=torch.from_numpy(place[local]),
        )
        return plan.validate(kv_heads)

    def _incoming(self, wanted: list[Array], slot_of: list[Array]) -> tuple[Array, Array, Array]:
        """Holder, row there and row of the slots, for every row that the rank lists: KV head after KV head, tokens in their order."""
        keys, asked, kv_heads = self._keys, self.asked, self.asked.num_kv_heads
        found = []
        for head, (pieces, slots) in enumerate(zip(wanted, slot_of, strict=True)):
            token, slot = self._tokens(pieces, slots[keys.block[pieces]])
            holder, local = token // asked.shards.tokens, token % asked.shards.tokens
            found.append((holder, local * kv_heads + head, slot * kv_heads + head))
        holder, token, place = (np.concatenate(column) for column in zip(*found, strict=True))
        return holder, token, place

    def _outgoing(self, mine: Array, pieces: QueryPieces) -> tuple[Array, list[int]]:
        """Rows that the rank sends: for each receiver in turn, KV head after KV head, tokens in their order."""
        keys, asked, kv_heads = self._keys, self.asked, self.asked.num_kv_heads
        parts: list[tuple[Array, Array]] = []
        for found in needs(asked, pieces):
            count = found.high - found.low
            receiver, piece = np.repeat(np.arange(count), len(mine)), np.tile(mine, count)
            asks = {
                group: holds(runs, receiver, keys.block[piece]) & (receiver + found.low != self.rank)
                for group, runs in found.blocks.items()
            }
            several = []
            for head, group in enumerate(asked.groups):
                which, token = repeat_ranges(keys.token[piece[asks[group]]], keys.length[piece[asks[group]]])
                several.append((receiver[asks[group]][which], token * kv_heads + head))
            to, row = (np.concatenate(column) for column in zip(*several, strict=True))
            order = np.argsort(to, kind="stable")
            parts.append((to[order] + found.low, row[order]))
        to, row = (np.concatenate(column) for column in zip(*parts, strict=True))
        return row, np.bincount(to, minlength=asked.shards.ranks).tolist()


@lru_cache(maxsize=4)
def plans_of(asked: Asked, rank: int) -> RankPlans:
    """The plans of one rank. Few are kept: what they were made from is larger than what :func:`plan_on` keeps."""
    return RankPlans(asked, rank)


@lru_cache(maxsize=256)
def plan_on(asked: Asked, rank: int, way: str, device: torch.device) -> ExchangePlan | GatherPlan | RingPlan:
    """The plan of one way on a device; calls that ask for the same find it made."""
    return getattr(plans_of(asked, rank), {"all-gather": "gather", "exchange": "exchange", "ring": "ring"}[way]).to(device)
