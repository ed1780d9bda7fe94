"""Walk a plan: gather, attend, put back; and the same way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.checks import lse_dtype
from s2attn.backends.portable.cache import cached_plan
from s2attn.backends.portable.paged import PagedKeys
from s2attn.backends.portable.plan import MOST_KINDS, Plan, Run
from s2attn.backends.portable.rows import Rows, add_blocks, keep_freed_memory
from s2attn.backends.portable.thin import Band, attend_band, bands_of, thin_runs
from s2attn.backends.portable.tile import Keys, Places, Tile, choose_tile
from s2attn.backends.portable.workers import alone_on, in_order, usual_threads
from s2attn.layout import Layout

CHUNK_BYTES = 8 << 20
"""Of keys and values that the items of a chunk attend to together at most; less where threads would otherwise wait for each other."""
CHUNK_BYTES_ELSEWHERE = 256 << 20
"""The same on devices that want large calls."""


@dataclass(frozen=True, eq=False)
class Work:
    """One problem: tensors, plan, scoring, and how to compute a stack (None: the quickest way).

    With ``paged``, k and v are the pages of a cache, and only it knows where a key lies in them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    scoring: Scoring
    tile: Tile | None
    paged: PagedKeys | None = None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring, tile: Tile | None) -> Work:
        return cls(q, k, v, cached_plan(layout, q.shape[0], q.shape[2], k.shape[2]), scoring, tile)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return lse_dtype(self.q.dtype)

    def contiguous(self) -> Work:
        """The same problem with keys and values that lie one after another."""
        if self.paged is None:
            return self
        k, v, plan = self.paged.copied(self.plan, self.dtype)
        return replace(self, k=k, v=v, plan=plan, paged=None)

    @cached_property
    def thin(self) -> int:
        """How many of the first runs have so few rows that their blocks are attended together."""
        return 0 if self.tile else thin_runs(self.plan, self.q.device, (self.k.shape[3], self.v.shape[3]))

    @property
    def how(self) -> Tile:
        return self.tile or choose_tile(self.q.device)


@dataclass(frozen=True)
class Stack:
    """Items of one run inside a chunk: rows and entries are counted from the chunk's first."""

    run: Run
    items: slice  # of the run
    rows: slice
    entries: slice


@dataclass(frozen=True)
class Chunk:
    """Neighbouring items that are gathered together."""

    rows: slice
    entries: slice
    stacks: list[Stack]


def chunks(work: Work, first: int = 0) -> Iterator[Chunk]:
    """Cut the items from run ``first`` on into chunks that fit the budget; at least one item each."""
    plan, at = work.plan, first
    for low, high in pairwise(_chunk_ends(work, first)):
        stacks = []
        while at < len(plan.runs) and plan.runs[at].low < high:
            run = plan.runs[at]
            stacks.append(_stack(plan, run, max(low, run.low), min(high, run.high), low))
            if run.high > high:
                break  # it goes on in the next chunk
            at += 1
        yield Chunk(_between(plan.row_ptr, low, high), _between(plan.entry_ptr, low, high), stacks)


def _chunk_ends(work: Work, first: int) -> list[int]:
    """First item of each chunk, and the number of all items."""
    runs, width = work.plan.runs[first:], work.k.shape[3] + work.v.shape[3]
    # numbers per key: itself, its column of scores, and (for hidden ones) its column of a mask of bools and floats
    scores = work.how.scores_held(work.scoring)
    held = [run.blocks * (width + scores * run.rows) + 2 * run.hidden * run.rows for run in runs]
    if not runs:
        return []
    used = np.cumsum(np.repeat(held, [run.high - run.low for run in runs])) * work.plan.block * work.dtype.itemsize
    budget, ends = CHUNK_BYTES_ELSEWHERE, [0]
    if work.q.device.type == "cpu":
        budget = min(CHUNK_BYTES, used[-1] // (4 * usual_threads()))
    while ends[-1] < len(used):
        before = used[ends[-1] - 1] if ends[-1] else 0
        ends.append(max(ends[-1] + 1, int(np.searchsorted(used, before + budget, side="right"))))
    return [runs[0].low + end for end in ends]


def _between(ptr: np.ndarray, low: int, high: int, base: int = 0) -> slice:
    return slice(int(ptr[low] - base), int(ptr[high] - base))


def _stack(plan: Plan, run: Run, low: int, high: int, chunk_low: int) -> Stack:
    rows = _between(plan.row_ptr, low, high, plan.row_ptr[chunk_low])
    entries = _between(plan.entry_ptr, low, high, plan.entry_ptr[chunk_low])
    return Stack(run, slice(low - run.low, high - run.low), rows, entries)


class Walker:
    """Gathers what chunks need, and keeps the masks of the run that it is in."""

    def __init__(self, work: Work, masks_by_key: bool):
        if work.q.device.type == "cpu":
            keep_freed_memory()
        self.work, self.masks_by_key = work, masks_by_key
        self.q = _table(work.q)
        listed, keys = len(work.plan.entry_block) * work.plan.block, work.k.shape[:3].numel()
        # A key that is gathered several times is converted once, before.
        if work.paged is None:
            self.k, self.v = (Rows.of(x.to(work.dtype) if listed > keys else x) for x in (work.k, work.v))
        self.inside = torch.arange(work.plan.block, device=work.q.device)
        self.table: tuple[Run, Tensor] | None = None

    def queries(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Query rows, and their places in a contiguous ``(B, T, H)`` table."""
        place = self.work.plan.place[rows]
        return self.q.index_select(0, place).to(self.work.dtype), place

    def keys(self, entries: slice) -> tuple[Places, Places]:
        """Where the keys and values of entries lie, ``(entries, block)``."""
        plan, kv_heads, paged = self.work.plan, self.work.k.shape[2], self.work.paged
        block, lane = plan.entry_block[entries], plan.entry_lane[entries]
        if paged is not None:
            where = paged.where(block, lane)
            return paged.places(where, False, self.work.dtype), paged.places(where, True, self.work.dtype)
        token = plan.key_start[block][:, None] + self.inside
        if plan.short_keys:  # what lies beyond a short block is masked, so that any key will do
            token = torch.minimum(token, plan.key_last[block][:, None])
        batch, head = torch.div(lane, kv_heads, rounding_mode="floor")[:, None], (lane % kv_heads)[:, None]
        return Places(self.k.table, self.k.at(batch, token, head)), Places(self.v.table, self.v.at(batch, token, head))

    def stack(self, stack: Stack, k: Places, v: Places) -> Keys:
        """The keys of a stack out of those of its chunk."""
        shape = (stack.items.stop - stack.items.start, stack.run.blocks * self.work.plan.block)
        k, v = (Places(x.table, x.rows[stack.entries].view(shape)) for x in (k, v))
        if stack.run.codes is None or stack.run.kind is None:
            return Keys(k, v)
        kind = stack.run.kind[stack.items]
        if len(stack.run.codes) > MOST_KINDS:
            return Keys(k, v, self._masks(stack.run, stack.run.codes[kind]), torch.arange(len(kind), device=kind.device))
        table = self.table  # read once: other threads may replace it
        if table is None or table[0] is not stack.run:
            self.table = table = stack.run, self._masks(stack.run, stack.run.codes)
        return Keys(k, v, table[1], kind)

    def _masks(self, run: Run, codes: Tensor) -> Tensor:
        """Additive masks ``(kinds, M, hidden)``."""
        block = self.work.plan.block
        kinds, subs, several = codes.shape
        seen = self.work.plan.table[codes]  # (kinds, subs, hidden blocks, query, key)
        if self.masks_by_key:
            seen = seen.permute(0, 2, 4, 1, 3).reshape(kinds, several * block, subs * block).transpose(1, 2)
        else:
            seen = seen.transpose(2, 3).reshape(kinds, subs * block, several * block)
        mask = torch.zeros_like(seen, dtype=self.work.dtype).masked_fill_(~seen, -torch.inf)[:, : run.tokens]
        return mask if run.rows == run.tokens else _repeat_rows(mask, run.rows // run.tokens)


def _repeat_rows(mask: Tensor, times: int) -> Tensor:
    """The same rows for each query head of a unit, in the memory order of ``mask``."""
    if mask.stride(-1) == 1:
        return mask.repeat(1, times, 1)
    return mask.transpose(1, 2).repeat(1, 1, times).transpose(1, 2)


def _table(x: Tensor) -> Tensor:
    """``(B, T, H, width)`` as rows, in that order."""
    return x.contiguous().view(-1, x.shape[-1])


def run_forward(work: Work) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the whole problem."""
    with nullcontext() if work.thin else alone_on(work.q.device):
        out, lse, finite = _forward(work)
        if not finite:
            work = work.contiguous()
            broken = _broken(work)
            if bool(broken.any()):
                seen = _sees(work, broken)
                out, lse, _ = _forward(_without(work, broken))
                out.masked_fill_(seen[..., None], torch.nan)
                lse.masked_fill_(seen, torch.nan)
        return out.to(work.q.dtype), lse.transpose(1, 2).contiguous()


def _forward(work: Work) -> tuple[Tensor, Tensor, bool]:
    """``(B, T, H, Dv)`` and ``(B, T, H)`` in the computing dtype, and whether their sum is finite."""
    shape, width = work.q.shape[:3], work.v.shape[3]
    out = _row_table(work, width)
    sinks = None if work.scoring.sinks is None else work.scoring.sinks.to(work.dtype)
    if sinks is None:
        lse = work.q.new_full((shape.numel(),), -torch.inf, dtype=work.dtype)
    else:
        lse = sinks.repeat(shape[:2].numel())
    walker, tile = Walker(work, masks_by_key=False), work.how

    def attend(chunk: Chunk) -> Tensor:
        q, place = walker.queries(chunk.rows)
        k, v = walker.keys(chunk.entries)
        my_sinks, total = None if sinks is None else sinks[place % shape[2]], q.new_zeros(())
        for stack in chunk.stacks:
            rows, run, keys = stack.rows, stack.run, walker.stack(stack, k, v)
            if my_sinks is not None:
                keys = replace(keys, sinks=my_sinks[rows].view(-1, run.rows))
            part, part_lse = tile.attend(q[rows].view(-1, run.rows, q.shape[-1]), keys, work.scoring)
            masks = keys.masks() if run.hidden == run.blocks else None
            if masks is not None:  # some rows may see nothing
                blind = (masks == -torch.inf).all(-1)
                part_lse = part_lse.masked_fill(blind, -torch.inf) if keys.sinks is None else torch.where(blind, keys.sinks, part_lse)
            out.index_copy_(0, place[rows], part.view(-1, width))
            lse.index_copy_(0, place[rows], part_lse.reshape(-1))
            total += part.sum()
        return total

    sums = []
    thin = work.thin
    for band in bands_of(work.plan) if thin else []:
        place, part, part_lse = _attend_band(work, walker, band, sinks)
        out.index_copy_(0, place, part)
        lse.index_copy_(0, place, part_lse)
        sums.append(part.sum())
    sums += in_order(attend, list(chunks(work, thin)), work.q.device)
    return out.view(*shape, width), lse.view(shape), _finite(sums)


def _finite(sums: list[Tensor]) -> bool:
    return not sums or bool(torch.cat([some.view(-1) for some in sums]).isfinite().all())


def _attend_band(work: Work, walker: Walker, band: Band, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Places, ``out`` and ``lse`` of the rows of a band."""
    plan = work.plan
    q, place = walker.queries(_between(plan.row_ptr, band.low, band.high))
    keys = (walker.keys(_between(band.ptr, low, high)) for low, high in band.stretches(plan.block))
    my_sinks = None if sinks is None else sinks[place % work.q.shape[2]].view(-1, band.rows)
    out, lse = attend_band(band, q.view(-1, band.rows, q.shape[-1]), keys, work.scoring, my_sinks, plan.block)
    return place, out.flatten(0, 1), lse.flatten()


def _row_table(work: Work, width: int) -> Tensor:
    """``(B * T * H, width)`` for results by row: zeros, unless every row is going to be written."""
    rows = work.q.shape[:3].numel()
    make = work.q.new_empty if len(work.plan.place) == rows else work.q.new_zeros
    return make(rows, width, dtype=work.dtype)


def run_backward(work: Work, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of the whole problem."""
    with alone_on(work.q.device):
        lse = lse.transpose(1, 2)
        dlse = None if dlse is None else dlse.transpose(1, 2)
        dq, dk, dv, finite = _backward(work, dout, dlse, out, lse)
        if not finite:
            broken = _broken(work)
            if bool(broken.any()):
                seen = _sees(work, broken)
                dout, out = (x.masked_fill(seen[..., None], 0.0) for x in (dout, out))
                dlse = None if dlse is None else dlse.masked_fill(seen, 0.0)
                dq, dk, dv, _ = _backward(_without(work, broken), dout, dlse, out, lse.masked_fill(seen, -torch.inf))
                dq.masked_fill_(seen[..., None], torch.nan)
        return dq.to(work.q.dtype), dk.to(work.k.dtype), dv.to(work.v.dtype)


def _backward(work: Work, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Gradients ``(B, T, H, D)``, ``(B, S, G, D)``, ``(B, S, G, Dv)`` in the computing dtype, and whether their sums are finite.

    lse and dlse are ``(B, T, H)``.
    """
    plan, dtype, width = work.plan, work.dtype, work.k.shape[3]
    lanes, count = work.k.shape[0] * work.k.shape[2], len(plan.key_start)
    dq = _row_table(work, width)
    dk = work.k.new_zeros(lanes * count, plan.block * width, dtype=dtype)
    dv = work.v.new_zeros(lanes * count, plan.block * work.v.shape[3], dtype=dtype)
    walker, tile = Walker(work, masks_by_key=True), work.how
    outs, douts, lses = _table(out), _table(dout), lse.reshape(-1).to(dtype)
    lses = lses.masked_fill(lses == -torch.inf, torch.inf)
    dlses = None if dlse is None else dlse.reshape(-1).to(dtype)

    def differentiate(chunk: Chunk) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        q, place = walker.queries(chunk.rows)
        k, v = walker.keys(chunk.entries)
        where = plan.entry_lane[chunk.entries] * count + plan.entry_block[chunk.entries]
        my_out, my_dout = (x.index_select(0, place).to(dtype) for x in (outs, douts))
        my_lse, my_dlse = lses[place], None if dlses is None else dlses[place]
        new, found = torch.empty_like(q), []
        for stack in chunk.stacks:
            rows, run = stack.rows, stack.run
            stack_q, stack_out, stack_dout = (x[rows].view(-1, run.rows, x.shape[-1]) for x in (q, my_out, my_dout))
            stack_dlse = None if my_dlse is None else my_dlse[rows].view(-1, run.rows)
            keys, stack_lse = walker.stack(stack, k, v), my_lse[rows].view(-1, run.rows)
            grads = tile.attend_backward(stack_dout, stack_dlse, stack_q, keys, stack_out, stack_lse, work.scoring)
            new[rows] = grads[0].reshape(-1, width)
            found.append((where[stack.entries], grads[1], grads[2]))
        dq.index_copy_(0, place, new)
        return found, torch.stack([new.sum(), *(part.sum() for _, *parts in found for part in parts)])

    sums = []
    for found, new_sums in in_order(differentiate, list(chunks(work)), work.q.device):
        sums.append(new_sums)
        for where, dk_part, dv_part in found:
            add_blocks(dk, where, dk_part.reshape(-1, dk.shape[1]))
            add_blocks(dv, where, dv_part.reshape(-1, dv.shape[1]))
    return dq.view(work.q.shape), _by_token(dk, work, width), _by_token(dv, work, work.v.shape[3]), _finite(sums)


def _by_token(blocks: Tensor, work: Work, width: int) -> Tensor:
    """Sums by key block as ``(B, S, G, width)``."""
    plan, (batch, tokens, kv_heads) = work.plan, work.k.shape[:3]
    by_token = blocks.view(batch, kv_heads, len(plan.key_start), plan.block, width).permute(0, 2, 3, 1, 4)
    length = plan.key_last - plan.key_start + 1
    if bool((length[:-1] == plan.block).all()):
        return by_token.reshape(batch, -1, kv_heads, width)[:, :tokens]
    inside = torch.arange(plan.block, device=length.device) < length[:, None]
    return by_token.flatten(1, 2)[:, inside.flatten().nonzero()[:, 0]]


def _broken(work: Work) -> Tensor:
    """``(B, S, G)``: keys that hold NaN or infinity in k or v."""
    return ~(work.k.isfinite().all(-1) & work.v.isfinite().all(-1))


def _without(work: Work, broken: Tensor) -> Work:
    return replace(work, k=work.k.masked_fill(broken[..., None], 0.0), v=work.v.masked_fill(broken[..., None], 0.0))


def _sees(work: Work, broken: Tensor) -> Tensor:
    """``(B, T, H)``: queries that see a broken key. Attention with equal weights to an indicator is positive exactly there."""
    q, k = work.q.new_zeros(*work.q.shape[:3], 1), work.k.new_zeros(*work.k.shape[:3], 1)
    return _forward(replace(work, q=q, k=k, v=broken[..., None].to(work.v.dtype), scoring=Scoring(1.0)))[0][..., 0] > 0
