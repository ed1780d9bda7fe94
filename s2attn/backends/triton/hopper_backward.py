"""Launches of dq and dkv in the Hopper form, and what they read beside a walk: mask tiles as words, lse and delta by block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.triton.launch import factors, join_slots, workspace
from s2attn.backends.triton.specialised import form_objections, ends_of, places_of, scratch_memory
from s2attn.backends.triton.start import Call, on_device, start
from s2attn.backends.triton.tiles import SHARED_MEMORY
from s2attn.backends.triton.walk import Walk
from s2attn.layout import Layout

CONSUMER_ROWS = 64
"""Rows of one consumer warpgroup; there are two."""
MOST_STAGES = 6
"""More tiles ahead than this hide no more of a load."""
KEPT_FREE = 2048
"""Bytes of shared memory for barriers and for what the compiler hands to the warpgroups."""


@dataclass(frozen=True)
class HopperForm:
    """How the two consumers divide a line, how many listed tokens a stage has, and how many stages there are.

    ``line_tokens`` of a line's axis make one program's tile, for ``stack`` query heads (dq). In dkv 64 means that both consumers hold the
    same keys and take the stages in turns; 128 that each has 64 keys and both read every stage.
    """

    line_tokens: int
    stack: int
    listed_tokens: int
    stages: int

    def factor(self, block: int) -> int:
        """Blocks of the lines' axis that share a tile's list."""
        return max(1, self.line_tokens // block)

    def per_block(self, block: int) -> int:
        """Tiles in one block of the lines' axis."""
        return max(1, block // self.line_tokens)

    def constants(self, op: str, block: int) -> dict[str, int]:
        """The compile-time numbers that make the form."""
        shared = {"RB": block, "SUBS": self.per_block(block), "STAGES": self.stages}
        if op == "dkv":
            return {"KEYS": self.line_tokens, "BLOCK_M": self.listed_tokens, **shared}
        return {"STACK": self.stack, "BLOCK_N": self.listed_tokens, "F": self.factor(block), **shared}


def choose_hopper_form(op: str, dim: int, dim_v: int, block: int, shared_heads: int, capped: bool = False) -> HopperForm:
    """The form of "dq" or "dkv" for heads of ``dim`` and ``dim_v`` (64 or 128): what does not spill, and all stages that fit.

    Query blocks of 64 are stacked by heads where an even number of neighbouring query heads, ``shared_heads``, shares keys and lists.
    ``capped``: with a soft-cap, whose arithmetic needs registers too.

    >>> choose_hopper_form("dq", 128, 128, 64, 4)
    HopperForm(line_tokens=64, stack=2, listed_tokens=64, stages=5)
    >>> choose_hopper_form("dkv", 128, 128, 64, 4)
    HopperForm(line_tokens=64, stack=1, listed_tokens=32, stages=6)
    """
    both = 2 * (dim + dim_v)  # bytes of one row of two operands
    if op == "dkv":
        wide = max(dim, dim_v) > 64
        stack, line_tokens, listed = 1, CONSUMER_ROWS if wide and capped else min(block, 2 * CONSUMER_ROWS), 32 if wide else 64
        fixed = line_tokens * both + (CONSUMER_ROWS * 2 * both if line_tokens == CONSUMER_ROWS else 0)
    else:
        stack = 2 if block < 2 * CONSUMER_ROWS and shared_heads % 2 == 0 else 1
        line_tokens, listed, fixed = 2 * CONSUMER_ROWS // stack, 64, 2 * CONSUMER_ROWS * both
    room = SHARED_MEMORY["sm_90"] - KEPT_FREE - fixed
    stages = min(MOST_STAGES, room // (listed * both))
    if op == "dkv" and line_tokens == CONSUMER_ROWS:
        stages -= stages % 2  # each stage belongs to one consumer
    return HopperForm(line_tokens, stack, listed, stages)


def hopper_objections(op: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> list[str]:
    """Every reason why the Hopper kernel of ``op`` cannot serve such tensors and this layout, wherever they lie."""
    # A soft-cap is no reason: the form makes room for it.
    return form_objections(op, q, k, v, layout, replace(scoring, softcap=None))


def mask_words(tiles: Tensor) -> Tensor:
    """bool mask tiles ``(n, lines, listed)`` as int32 words along the listed axis: bit i of a word is its pair i.

    >>> mask_words(torch.tensor([[[True, True, False, True] + [False] * 28]])).tolist()
    [[[11]]]
    """
    bits = tiles.unflatten(-1, (-1, 32)).int() << torch.arange(32, dtype=torch.int32, device=tiles.device)
    return bits.sum(-1, dtype=torch.int32)


def numbers_by_block(lse: Tensor, delta: Tensor, token_of: Tensor) -> Tensor:
    """lse and delta by query in the places of `places_of`, ``(2, B, H, blocks * block)``; +inf and 0 where there is no query."""
    absent = lse.new_tensor([float("inf"), 0.0]).view(2, 1, 1, 1).expand(-1, *lse.shape[:2], 1)
    return torch.cat([torch.stack([lse, delta]), absent], dim=-1).index_select(-1, token_of)


@dataclass(eq=False)
class HopperWay:
    """What one Hopper kernel needs of one layout.

    Attributes:
        op: "dq" or "dkv"; ``form`` that of its tiles; ``block`` that of the layout.
        walk: the lists.
        words: the mask tiles of `mask_words`.
        end: the first token after the listed axis of each line's sequence.
        token_of: `places_of` the queries.
    """

    op: str
    form: HopperForm
    block: int
    walk: Walk
    words: Tensor
    end: Tensor
    token_of: Tensor


def hopper_way(op: str, form: HopperForm, layout: Layout, walk: Walk) -> HopperWay:
    """Make what a Hopper kernel needs beside its walk over ``layout``, in groups of ``form.factor(layout.block)``."""
    lines, listed = (layout.k_spans, layout.q_spans) if op == "dkv" else (layout.q_spans, layout.k_spans)
    words = mask_words(layout.tiles.transpose(1, 2) if op == "dkv" else layout.tiles)
    token_of = places_of(layout.q_spans, layout.block, layout.seqlen_q)
    return HopperWay(op, form, layout.block, walk, words, ends_of(walk, lines, listed), token_of)


def hopper_dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, way: HopperWay, scoring: Scoring
) -> Tensor:  # fmt: skip
    """Run the Hopper dq kernel, and join the lists that were cut; ``lse`` and ``delta`` by query."""
    from s2attn.kernels.hopper.dq import hopper_dq_kernel

    batch, heads, walk, form = q.shape[0], q.shape[2], way.walk, way.form
    layout_heads, subs, shared = walk.groups.heads, form.per_block(way.block), heads // walk.groups.heads
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = workspace(lse, batch * walk.slots * shared * subs * form.line_tokens, q.shape[-1])

    def describe() -> Call:
        counts = (walk.slots, walk.lines, heads, k.shape[2], layout_heads, q.shape[1])
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *result.stride()[:3], *lse.stride()[:2])
        grid = (walk.pieces.shape[0] * subs * (shared // form.stack), batch, 1)
        return Call(grid, (*_lists(way), scoring.scale, *factors(scoring), *counts, *strides), _constants(q, v, way, scoring))

    with on_device(q):
        with scratch_memory(q.device):
            start(hopper_dq_kernel, (q, k, v, dout, lse, delta, result, *parts), walk.starts, _key(way, scoring, q, k, v, dout), describe)
        join_slots(parts[0], result, walk, form.line_tokens, subs, heads, layout_heads, scoring.scale)
    return result


def hopper_dkv(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, way: HopperWay, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Run the Hopper dk and dv kernel, and join the lists that were cut; ``lse`` and ``delta`` by query."""
    from s2attn.kernels.hopper.dkv import hopper_dkv_kernel

    batch, kv_heads, walk, form = q.shape[0], k.shape[2], way.walk, way.form
    subs = form.per_block(way.block)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    numbers = numbers_by_block(lse, delta, way.token_of)
    parts = workspace(lse, batch * walk.slots * subs * form.line_tokens, q.shape[-1], v.shape[-1])

    def describe() -> Call:
        counts = (walk.slots, walk.lines, q.shape[2], kv_heads, walk.groups.heads, k.shape[1], numbers.shape[-1])
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])
        grid = (walk.pieces.shape[0] * subs, batch, 1)
        return Call(grid, (*_lists(way), scoring.scale, *factors(scoring), *counts, *strides), _constants(q, v, way, scoring))

    with on_device(q):
        with scratch_memory(q.device):
            pointers = (q, k, v, dout, numbers, dk, dv, *parts)
            start(hopper_dkv_kernel, pointers, walk.starts, _key(way, scoring, q, k, v, dout), describe)
        join_slots(parts[0], dk, walk, form.line_tokens, subs, kv_heads, kv_heads, scoring.scale)
        join_slots(parts[1], dv, walk, form.line_tokens, subs, kv_heads, kv_heads, 1.0)
    return dk, dv


def _lists(way: HopperWay) -> tuple[Tensor, ...]:
    """The layout's tensors in the kernels' order."""
    walk, g = way.walk, way.walk.groups
    return walk.pieces, walk.line_start, walk.line_length, g.ptr, g.full, g.sub_ptr, g.idx, g.sub, way.words, walk.start, way.end


def _constants(q: Tensor, v: Tensor, way: HopperWay, scoring: Scoring) -> dict[str, Any]:
    capped = {"CAPPED": scoring.softcap is not None, "num_warps": 4}
    return {"D": q.shape[-1], "DV": v.shape[-1], **way.form.constants(way.op, way.block), **capped}


def _key(way: HopperWay, scoring: Scoring, *tensors: Tensor) -> tuple:
    """All that a call depends on besides the layout and the addresses."""
    shapes = tuple((x.shape, x.stride()) for x in tensors)
    return "hopper", way.op, way.form, tensors[0].dtype, shapes, scoring.scale, scoring.softcap
