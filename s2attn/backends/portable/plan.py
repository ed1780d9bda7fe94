"""The plan of one layout: query rows cut into items, each with the key blocks that it gathers, in the order in which they run.

A plan depends on the layout and on the numbers of heads and batch entries, never on data, so that it is made once. What happens to a
row depends on its own group alone, so that its bits do not depend on what else is in the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.portable.cuts import Groups, cheapest_groups
from s2attn.layout import Layout
from s2attn.patterns.runs import ranges

MOST_KINDS = 16
"""A run with more distinct masks than this makes them stack by stack instead of keeping a table."""


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring items of one shape.

    Attributes:
        low, high: the items.
        rows: query rows of each item: ``tokens`` of each query head of its unit.
        tokens: query tokens of each item.
        blocks: key blocks of each item.
        hidden: how many of these, the last ones, are seen through masks.
        codes: ``(kinds, sub-rows, hidden)`` int64 numbers of tiles in the plan's table; None without masks.
        kind: ``(items,)`` int64, which codes an item uses.
    """

    low: int
    high: int
    rows: int
    tokens: int
    blocks: int
    hidden: int
    codes: Tensor | None
    kind: Tensor | None


@dataclass(frozen=True, eq=False)
class Plan:
    """All items of one layout. An item is one group of query blocks of one unit: the query heads that share keys and their lists.

    Attributes:
        block: tokens per block.
        place: ``(rows,)`` int64 rows of a contiguous ``(B, T, H)`` table in the order of the items; every row that sees a key is in
            exactly one item.
        row_ptr: ``(items + 1,)`` rows of item i are ``place[row_ptr[i]:row_ptr[i + 1]]``, head by head.
        entry_ptr: ``(items + 1,)`` key blocks of item i are ``entry_block[entry_ptr[i]:entry_ptr[i + 1]]``.
        entry_block: ``(entries,)`` int64 key blocks.
        entry_lane: ``(entries,)`` int64 numbers ``batch * G + kv_head``.
        key_start, key_last: ``(key_blocks,)`` int64 first and last token of each key block.
        short_keys: some key block has fewer than ``block`` tokens.
        table: ``(tiles + 2, block, block)`` bool: the layout's mask tiles, then one that hides all and one that shows all.
        runs: neighbouring items of one shape.
    """

    block: int
    place: Tensor
    row_ptr: np.ndarray
    entry_ptr: np.ndarray
    entry_block: Tensor
    entry_lane: Tensor
    key_start: Tensor
    key_last: Tensor
    short_keys: bool
    table: Tensor
    runs: list[Run]


def make_plan(layout: Layout, batch: int, num_heads: int, num_kv_heads: int) -> Plan:
    """Plan a layout for so many batch entries and heads; O(listed blocks) for each batch entry."""
    device, units = layout.device, math.lcm(layout.heads, num_kv_heads)
    per_unit = num_heads // units
    groups = cheapest_groups(layout, per_unit)
    lanes = _lanes(groups, batch, units)
    tokens, subs, full, rest = (x[lanes.group] for x in (groups.tokens, groups.subs, groups.full, groups.rest))
    where, entries = ranges(groups.at[lanes.group], full + rest), full + rest
    lane = lanes.batch * num_kv_heads + lanes.unit * num_kv_heads // units
    key_start, length = layout.k_spans.start.long(), layout.k_spans.length.long()
    square = (1, layout.block, layout.block)
    return Plan(
        block=layout.block,
        place=torch.from_numpy(_places(lanes, groups.first[lanes.group], tokens, per_unit, num_heads, layout.seqlen_q)).to(device),
        row_ptr=np.concatenate([[0], np.cumsum(tokens * per_unit)]),
        entry_ptr=np.concatenate([[0], np.cumsum(entries)]),
        entry_block=torch.from_numpy(groups.idx[where].astype(np.int64)).to(device),
        entry_lane=torch.from_numpy(np.repeat(lane, entries)).to(device),
        key_start=key_start,
        key_last=key_start + length - 1,
        short_keys=bool((length < layout.block).any()),
        table=torch.cat([layout.tiles, layout.tiles.new_zeros(square), layout.tiles.new_ones(square)]),
        runs=_runs(groups, lanes.group, (tokens, subs, full, rest), per_unit, layout),
    )


@dataclass(frozen=True)
class _Lanes:
    """The items in order: for each its batch entry, its unit, and its group."""

    batch: np.ndarray
    unit: np.ndarray
    group: np.ndarray


def _lanes(groups: Groups, batch: int, units: int) -> _Lanes:
    """Every unit of every batch entry gets the groups of its layout head; items of one shape become neighbours."""
    head = groups.where[np.arange(units) * len(groups.where) // units]
    counts = np.bincount(groups.head, minlength=int(groups.where.max(initial=0)) + 1)
    group = ranges((np.cumsum(counts) - counts)[head], counts[head])
    unit = np.repeat(np.arange(units), counts[head])
    group, unit, entry = np.tile(group, batch), np.tile(unit, batch), np.repeat(np.arange(batch), len(group))
    seeing = np.flatnonzero((groups.full + groups.rest)[group] > 0)
    group, unit, entry = group[seeing], unit[seeing], entry[seeing]
    order = np.lexsort((unit, groups.first[group], entry, groups.subs[group], groups.rest[group], groups.full[group], groups.tokens[group]))
    return _Lanes(entry[order], unit[order], group[order])


def _places(lanes: _Lanes, first: np.ndarray, tokens: np.ndarray, per_unit: int, num_heads: int, seqlen_q: int) -> np.ndarray:
    """Row numbers ``(batch * T + token) * H + head``, item by item, and inside an item head by head."""
    start = (lanes.batch * seqlen_q + first) * num_heads + lanes.unit * per_unit
    start = (start[:, None] + np.arange(per_unit)).ravel()
    tokens = np.repeat(tokens, per_unit)
    return np.repeat(start, tokens) + ranges(np.zeros_like(tokens), tokens) * num_heads


def _runs(groups: Groups, group: np.ndarray, shape: tuple[np.ndarray, ...], per_unit: int, layout: Layout) -> list[Run]:
    """Cut the items where their shape changes, and number the masks of each run."""
    table = np.stack(shape)
    ends = [0, *(np.flatnonzero((table[:, 1:] != table[:, :-1]).any(0)) + 1).tolist(), len(group)]
    runs = []
    for low, high in pairwise(ends):
        if low == high:
            continue
        tokens, subs, full, rest = table[:, low].tolist()
        codes = kind = None
        if rest:
            numbers = groups.codes[groups.code_at[group[low:high]][:, None] + np.arange(rest)][:, :, :subs].transpose(0, 2, 1)
            numbers = np.where(numbers < 0, numbers + layout.tiles.shape[0] + 2, numbers).astype(np.int64)
            kinds, inverse = _distinct(numbers)
            codes, kind = (torch.from_numpy(np.ascontiguousarray(x)).to(layout.device) for x in (kinds, inverse))
        runs.append(Run(low, high, tokens * per_unit, tokens, full + rest, rest, codes, kind))
    return runs


def _distinct(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones among ``(N, ...)`` code matrices, and which of them each of the N is."""
    if len(numbers) == 1:
        return numbers, np.zeros(1, np.int64)
    seen: dict[bytes, int] = {}
    which = np.asarray([seen.setdefault(one.tobytes(), len(seen)) for one in np.ascontiguousarray(numbers)], np.int64)
    first = np.zeros(len(seen), np.int64)
    first[which[::-1]] = np.arange(len(numbers))[::-1]
    return numbers[first], which
