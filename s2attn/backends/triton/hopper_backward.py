"""Launches of dq and dkv for Hopper; dq reads of a layout what the forward kernel reads, dkv the same by columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.base import Scoring
from s2attn.backends.triton.hopper import BARRIERS, MOST_STAGES, WORD, HopperForm, HopperWay, can_copy, mask_words, programs_of
from s2attn.backends.triton.launch import factors, join_slots, workspace
from s2attn.backends.triton.specialised import TALL, ends_of, places_of, scratch_memory
from s2attn.backends.triton.start import Call, Starts, on_device, start
from s2attn.backends.triton.tiles import SHARED_MEMORY
from s2attn.backends.triton.walk import Walk
from s2attn.layout import Layout


@dataclass(frozen=True)
class DqForm(HopperForm):
    """The form of a dq kernel, which takes its tiles one by one (``join`` is 1)."""

    def constants(self, block: int) -> dict[str, int]:
        return {
            "BLOCK_N": WORD, "RB": block, "STACK": self.stack, "SUBS": self.per_block(block), "RING": self.ring,
            "Q_RING": self.line_ring,
        }  # fmt: skip


def choose_dq_form(dim: int, dim_v: int, block: int, shared_heads: int) -> DqForm:
    """The form of the dq kernel for such widths (64 or 128), blocks (64 or more) and query heads that share keys and lists.

    >>> choose_dq_form(128, 128, 64, 4)
    DqForm(stack=2, join=1, ring=3, line_ring=2)
    """
    stack = 2 if block < TALL and shared_heads % 2 == 0 else 1
    both = 2 * (dim + dim_v)  # bytes of a row of q and dout, or of k and v
    room = SHARED_MEMORY["sm_90"] - BARRIERS - 2 * TALL * both
    return DqForm(stack, 1, min(room // (WORD * both), MOST_STAGES))


@dataclass(frozen=True)
class ColumnForm:
    """How the consumers of dkv share a column, and what a program keeps in shared memory.

    Attributes:
        keys: of an item: 64, which both consumers hold and whose tiles they take in turns, or 128, of which each has a half.
        listed_tokens: of a tile of queries.
        ring: tiles of q and dout that are loaded ahead; where consumers take turns an even number, and each stage belongs to one of them.
        line_ring: items whose keys are loaded ahead.
    """

    keys: int
    listed_tokens: int
    ring: int
    line_ring: int = 2

    def factor(self, block: int) -> int:
        """Blocks of keys that share an item's list: one."""
        return max(1, self.keys // block)

    def per_block(self, block: int) -> int:
        """Items in one block of keys."""
        return max(1, block // self.keys)

    def constants(self, block: int) -> dict[str, int]:
        """The compile-time numbers that make the form."""
        return {
            "KEYS": self.keys, "BLOCK_M": self.listed_tokens, "RB": block, "SUBS": self.per_block(block), "RING": self.ring,
            "K_RING": self.line_ring,
        }  # fmt: skip


def choose_column_form(dim: int, dim_v: int, block: int, capped: bool = False) -> ColumnForm:
    """The form of the dkv kernel for such widths (64 or 128) and blocks (64 or more): what does not spill, and all stages that fit.

    ``capped``: with a soft-cap, whose arithmetic needs registers: at width 128 consumers take turns whatever the block.

    >>> choose_column_form(128, 128, 64)
    ColumnForm(keys=64, listed_tokens=32, ring=4, line_ring=2)
    >>> choose_column_form(64, 64, 128)
    ColumnForm(keys=128, listed_tokens=64, ring=6, line_ring=2)
    """
    wide, both = max(dim, dim_v) > 64, 2 * (dim + dim_v)
    keys, listed = TALL // 2 if wide and capped else min(block, TALL), 32 if wide or capped else 64
    sums = 2 * TALL // 2 * both if keys < TALL else 16 * both
    room = SHARED_MEMORY["sm_90"] - BARRIERS - 2 * keys * both - sums
    ring = min(room // (listed * (both + 8)), MOST_STAGES)
    return ColumnForm(keys, listed, ring - ring % 2)


@dataclass(eq=False)
class HopperColumns:
    """What the Hopper dkv kernel needs of one layout.

    Attributes:
        form: of its items; ``block`` that of the layout; ``walk`` over its columns, of which long ones are cut.
        work: int64 ``(pieces, 12)``, longest first; the kernel says what is in it.
        listed: int32 ``(entries, 2)``, the first token of each listed block, and its first place by block.
        codes: int32, the mask tile of each other entry.
        bits: int64, the mask tiles by key, queries in words.
        token_of: `places_of` the queries.
        packed: whether queries may end before the tensor does.
    """

    form: ColumnForm
    block: int
    walk: Walk
    work: Tensor
    listed: Tensor
    codes: Tensor
    bits: Tensor
    token_of: Tensor
    packed: bool
    lost: bool = False
    starts: Starts = field(default_factory=dict)


def hopper_columns(form: ColumnForm, layout: Layout, walk: Walk, kv_heads: int) -> HopperColumns:
    """Make what the dkv kernel needs beside its walk over the columns of ``layout``, each a line of its own."""
    g = walk.groups
    item, *intervals, slot = walk.pieces.long().unbind(1)
    kv_head, line = item // walk.lines, item % walk.lines
    head = kv_head * g.heads // kv_heads
    columns = (
        kv_head, walk.line_start[line], walk.line_length[line], g.ptr[head, line], *intervals, g.full[head, line], g.sub_ptr[head, line],
        ends_of(walk, layout.k_spans, layout.q_spans)[line], slot,
    )  # fmt: skip
    work = torch.stack([column.long() for column in columns], dim=1).contiguous()
    listed = torch.stack([walk.start[g.idx.long()].int(), g.idx.int() * layout.block], dim=1).contiguous()
    token_of = places_of(layout.q_spans, layout.block, layout.seqlen_q)
    bits = mask_words(layout.tiles.transpose(1, 2))
    return HopperColumns(form, layout.block, walk, work, listed, g.sub.flatten(), bits, token_of, layout.packed)


def numbers_by_block(lse: Tensor, delta: Tensor, token_of: Tensor) -> Tensor:
    """lse and delta by query in the places of `places_of`, ``(2, B, H, blocks * block)``; +inf and 0 where there is no query."""
    numbers = lse.new_empty(2, *lse.shape[:2], len(token_of))
    for into, values, absent in ((numbers[0], lse, float("inf")), (numbers[1], delta, 0.0)):
        torch.index_select(pad(values, (0, 1), value=absent), -1, token_of, out=into)
    return numbers


def copyable(dout: Tensor) -> Tensor:
    """A gradient that descriptors can read: that of a sum is one number expanded, and any may begin at an odd address."""
    return dout if can_copy(dout) else dout.clone(memory_format=torch.contiguous_format)


def hopper_dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, way: HopperWay, scoring: Scoring
) -> Tensor:  # fmt: skip
    """Run the Hopper dq kernel; ``lse`` and ``delta`` by query."""
    from s2attn.kernels.hopper.dq import hopper_dq_kernel

    batch, seqlen, heads, _ = q.shape
    dout, result = copyable(dout), torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def describe() -> Call:
        stacks = heads // way.walk.groups.heads // way.form.stack
        items = way.work.shape[0] * way.form.per_block(way.block) * stacks * batch
        numbers = (scoring.scale, *factors(scoring), items, batch, heads, k.shape[2], way.walk.groups.heads, seqlen, k.shape[1])
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *result.stride()[:3], *lse.stride()[:2])
        grid = (min(items, programs_of(way.work.device.index or 0)), 1, 1)
        return Call(grid, (*way.lists, *numbers, *strides), _constants(q, v, way, scoring))

    with on_device(q), scratch_memory(q.device):
        pointers = (q, k, v, dout, lse, delta, result)
        start(hopper_dq_kernel, pointers, way.starts, _key("dq", way, scoring, q, k, v, dout), describe)
    return result


def hopper_dkv(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, way: HopperColumns, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Run the Hopper dk and dv kernel, and join the lists that were cut; ``lse`` and ``delta`` by query."""
    from s2attn.kernels.hopper.dkv import hopper_dkv_kernel

    batch, kv_heads, walk, keys, subs = q.shape[0], k.shape[2], way.walk, way.form.keys, way.form.per_block(way.block)
    dout, numbers = copyable(dout), numbers_by_block(lse, delta, way.token_of)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    parts = workspace(lse, batch * walk.slots * subs * keys, q.shape[-1], v.shape[-1])

    def describe() -> Call:
        items = way.work.shape[0] * subs * batch
        counts = (items, batch, q.shape[2], kv_heads, q.shape[1], k.shape[1], numbers.shape[-1], walk.slots)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])
        lists = (way.work, way.listed, way.codes, way.bits)
        grid = (min(items, programs_of(way.work.device.index or 0)), 1, 1)
        return Call(grid, (*lists, scoring.scale, *factors(scoring), *counts, *strides), _constants(q, v, way, scoring))

    with on_device(q):
        with scratch_memory(q.device):
            pointers = (q, k, v, dout, numbers, dk, dv, *parts)
            start(hopper_dkv_kernel, pointers, way.starts, _key("dkv", way, scoring, q, k, v, dout), describe)
        join_slots(parts[0], dk, walk, keys, subs, kv_heads, kv_heads, scoring.scale)
        join_slots(parts[1], dv, walk, keys, subs, kv_heads, kv_heads, 1.0)
    return dk, dv


def _constants(q: Tensor, v: Tensor, way: HopperWay | HopperColumns, scoring: Scoring) -> dict[str, Any]:
    flags = {"CAPPED": scoring.softcap is not None, "PACKED": way.packed, "num_warps": 4}
    return {"D": q.shape[-1], "DV": v.shape[-1], **way.form.constants(way.block), **flags}


def _key(op: str, way: HopperWay | HopperColumns, scoring: Scoring, *tensors: Tensor) -> tuple:
    """All that a call depends on besides the layout and the addresses."""
    shapes = tuple((x.shape, x.stride()) for x in tensors)
    return "hopper", op, way.form, tensors[0].dtype, shapes, scoring.scale, scoring.softcap
