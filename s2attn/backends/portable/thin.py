"""Thin items on a CPU: a few query rows over long lists, as decoding has them; all blocks of many items in the same few operations.

A step of decoding takes so little time that waking threads of our own is a large part of it, the more so as torch's own threads, from the
operation before, still keep the cores busy waiting for the next one. So these do the work: all key blocks of a stretch of items go into one
batch of products, block by block. A product has the same shape for every block, and sums go along each item by itself: the bits of an item
do not depend on its neighbours, nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.portable.loops import LOWEST
from s2attn.backends.portable.plan import Plan, Run
from s2attn.backends.portable.tile import LOG2_E, Places, factor, normalize, one_by_one
from s2attn.backends.portable.workers import alone
from s2attn.patterns.runs import ranges

MOST_ROWS = 16
"""An item with more query rows is not thin."""
LEAST_ROWS = 4
"""Products of fewer rows, or of odd numbers of them, depend on their place in a batch: rows are filled up to a power of two."""
WIDTHS = 8
"""Head widths that are no multiple of this make products depend on their place, too: such items are computed one by one."""
PIECE_TOKENS = 8192
"""A list is cut into pieces of so many tokens at most, each with a softmax of its own, which are merged."""
STRETCH_TOKENS = 32768
"""So many go through the same operations, if whole pieces allow."""
STEP_TOKENS = 4096
"""So many keys are gathered at a time: few enough to stay in the cache."""


@dataclass(frozen=True, eq=False)
class Band:
    """Neighbouring thin items of equally many rows, their lists cut into pieces.

    Attributes:
        low, high: the items.
        rows, height: query rows of an item, and what they are filled up to.
        ptr: ``(pieces + 1,)`` piece i has the entries ``ptr[i]:ptr[i + 1]`` of the plan.
        item: ``(pieces,)`` int64 its item, counted from ``low``.
        piece: ``(entries of the band,)`` int64 the piece of every entry.
        hidden: ``(n,)`` numbers of the entries that are seen through masks, ascending, counted from the band's first.
        hides: ``(n, height, block)`` bool, True where a row does not see a key of such an entry.
    """

    low: int
    high: int
    rows: int
    height: int
    ptr: np.ndarray
    item: Tensor
    piece: Tensor
    hidden: np.ndarray
    hides: Tensor

    def stretches(self, block: int) -> Iterator[tuple[int, int]]:
        """Pieces that are gathered together, as ``low, high``."""
        low = 0
        while low < len(self.item):
            fits = np.searchsorted(self.ptr, self.ptr[low] + STRETCH_TOKENS // block, side="right") - 1
            high = max(low + 1, int(fits))
            yield low, high
            low = high


_BANDS: WeakKeyDictionary[Plan, list[Band]] = WeakKeyDictionary()


def thin_runs(plan: Plan, device: torch.device, widths: tuple[int, int]) -> int:
    """How many of a plan's runs, its first ones, are computed here; ``widths`` of keys and of values."""
    if device.type != "cpu" or any(width % WIDTHS for width in widths):
        return 0
    return sum(run.rows <= MOST_ROWS for run in plan.runs)


def bands_of(plan: Plan) -> list[Band]:
    """The thin items of a plan by their rows, made on first use."""
    made = _BANDS.get(plan)
    if made is None:
        thin = [run for run in plan.runs if run.rows <= MOST_ROWS]  # runs come in the order of their rows
        made = _BANDS[plan] = [_band(plan, rows, list(runs)) for rows, runs in groupby(thin, key=lambda run: run.rows)]
    return made


def _band(plan: Plan, rows: int, runs: list[Run]) -> Band:
    low, high = runs[0].low, runs[-1].high
    first, height = int(plan.entry_ptr[low]), max(LEAST_ROWS, 1 << (rows - 1).bit_length())
    begin, count = plan.entry_ptr[low:high], np.diff(plan.entry_ptr[low : high + 1])
    most = max(PIECE_TOKENS // plan.block, 1)
    pieces = -(-count // most)
    item = np.repeat(np.arange(high - low), pieces)
    ptr = np.append(begin[item] + ranges(np.zeros_like(pieces), pieces) * most, plan.entry_ptr[high])
    hidden, hides = zip(*(_hides(plan, run, height) for run in runs), strict=True)
    device = plan.place.device
    of_entry = torch.from_numpy(np.repeat(np.arange(len(item)), np.diff(ptr))).to(device)
    return Band(low, high, rows, height, ptr, torch.from_numpy(item).to(device), of_entry, np.concatenate(hidden) - first, torch.cat(hides))


def _hides(plan: Plan, run: Run, height: int) -> tuple[np.ndarray, Tensor]:
    """Entries of a run that are seen through masks, and what these hide."""
    if run.codes is None or run.kind is None:
        return np.zeros(0, np.int64), plan.table.new_zeros(0, height, plan.block)
    end, block = plan.entry_ptr[run.low + 1 : run.high + 1], plan.block
    entries = (end[:, None] + np.arange(-run.hidden, 0)).ravel()
    codes = run.codes[run.kind].transpose(1, 2).flatten(0, 1)  # (entries, sub-rows)
    tokens = run.tokens if codes.shape[1] == 1 else block
    hides = ~plan.table[:, :tokens][codes].flatten(1, 2)[:, : run.tokens].repeat(1, run.rows // run.tokens, 1)
    return entries, F.pad(hides, (0, 0, 0, height - run.rows))


def _steps(places: Places, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A few entries at a time, with their blocks ``(entries, block, width)``, which are used while they are in the cache."""
    size = max(STEP_TOKENS // places.rows.shape[1], 1)
    for low in range(0, len(places.rows), size):
        step = slice(low, min(low + size, len(places.rows)))
        yield step, Places(places.table, places.rows[step]).gathered(dtype)


def products(keys: Places, q: Tensor) -> Tensor:
    """Products of the keys of entries ``(entries, block)`` with ``q (entries, rows, width)``, ``(entries, block, rows)``."""
    made = q.new_empty(*keys.rows.shape, q.shape[1])
    for step, k in _steps(keys, q.dtype):
        torch.bmm(k, q[step].mT, out=made[step])
    return made


def weigh(values: Places, p: Tensor, rows: int) -> Tensor:
    """Sums of the values of entries with weights ``p (entries, height, block)``, of the first rows: ``(entries, rows, width)``."""
    if values.table.dtype == p.dtype:  # torch can add rows up where they lie
        p = p[:, :rows]
        bags = values.rows[:, None].expand(p.shape).flatten(0, 1)
        return F.embedding_bag(bags, values.table, per_sample_weights=p.flatten(0, 1), mode="sum").unflatten(0, p.shape[:2])
    made = p.new_empty(*p.shape[:2], values.table.shape[1])
    for step, v in _steps(values, p.dtype):
        torch.bmm(p[step], v, out=made[step])
    return made[:, :rows]


@dataclass(frozen=True, eq=False)
class States:
    """Softmax states: the largest logit in base 2, and the sum of weights, both ``(N, M)``; and the weighted values ``(N, M, Dv)``."""

    top: Tensor
    total: Tensor
    values: Tensor


def attend_band(
    band: Band, q: Tensor, blocks: Iterator[tuple[Places, Places]], scoring: Scoring, sinks: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a band's items, ``(items, rows, Dv)`` and ``(items, rows)``.

    Args:
        q: ``(items, rows, D)``.
        blocks: keys and values of each of the band's stretches.
        scoring: its sinks are not looked at.
        sinks: None, or ``(items, rows)``.
        block: tokens per block.
    """
    q = F.pad(q * factor(scoring), (0, 0, 0, band.height - band.rows))
    states = [_attend(band, low, high, q, *kv, scoring) for (low, high), kv in zip(band.stretches(block), blocks, strict=True)]
    joined = States(*(torch.cat([getattr(one, name) for one in states]) for name in ("top", "total", "values")))
    with alone():
        joined = _merged(joined, band.item, band.high - band.low)
        top, total, out = joined.top[..., None], joined.total[..., None], joined.values
        blind = top[..., 0] == -torch.inf
        top.clamp_(min=LOWEST)
        floor = None if sinks is None else sinks[..., None] * LOG2_E
        if floor is not None:
            highest = torch.maximum(top, floor)
            scale = one_by_one(top - highest, Tensor.exp2_)
            top, total, out = highest, total * scale, out * scale
        out, lse = normalize(out, top, total, floor)
        return out, lse.masked_fill(blind, -torch.inf) if sinks is None else torch.where(blind, sinks, lse)


def _attend(band: Band, low: int, high: int, q: Tensor, k: Places, v: Places, scoring: Scoring) -> States:
    """The states of pieces ``low`` to ``high``."""
    first = int(band.ptr[0])
    begin, end = int(band.ptr[low]) - first, int(band.ptr[high]) - first
    piece = band.piece[begin:end] - low
    scores = products(k, q[band.item[low:high]][piece])
    ptr = torch.from_numpy(band.ptr[low : high + 1] - band.ptr[low]).to(q.device)
    with alone():
        scores = scores.mT.contiguous()  # (entries, rows, keys): a whole number of vectors for each, so that no bit depends on a place
        if scoring.softcap is not None:
            scores.tanh_().mul_(scoring.softcap * LOG2_E)
        masked = slice(*np.searchsorted(band.hidden, (begin, end)))
        if masked.start < masked.stop:
            where = torch.from_numpy(band.hidden[masked] - begin).to(q.device)
            scores[where] = scores[where].masked_fill_(band.hides[masked], -torch.inf)
        top = torch.segment_reduce(scores.amax(-1), "max", offsets=ptr, axis=0, unsafe=True)
        scores.sub_(top.clamp(min=LOWEST)[piece][..., None]).exp2_()
        total = torch.segment_reduce(scores.sum(-1), "sum", offsets=ptr, axis=0, unsafe=True)
    values = weigh(v, scores, band.rows)
    with alone():
        return States(top[:, : band.rows], total[:, : band.rows], torch.segment_reduce(values, "sum", offsets=ptr, axis=0, unsafe=True))


def _merged(states: States, item: Tensor, items: int) -> States:
    """The pieces of every item joined."""
    if len(item) == items:
        return states
    ptr = torch.searchsorted(item, torch.arange(items + 1, device=item.device))
    top = torch.segment_reduce(states.top, "max", offsets=ptr, axis=0, unsafe=True)
    weight = one_by_one((states.top - top.clamp(min=LOWEST)[item])[..., None], Tensor.exp2_)
    total = torch.segment_reduce(states.total * weight[..., 0], "sum", offsets=ptr, axis=0, unsafe=True)
    return States(top, total, torch.segment_reduce(states.values * weight, "sum", offsets=ptr, axis=0, unsafe=True))
