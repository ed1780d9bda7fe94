"""Launches of the Gluon kernels for Hopper, and what they read of a layout: a table of work, keys by entry, codes, mask tiles as bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.triton.launch import factors
from s2attn.backends.triton.specialised import TALL, WIDTHS, ends_of, is_aligned, scratch_memory
from s2attn.backends.triton.start import Call, Starts, on_device, start
from s2attn.backends.triton.tiles import SHARED_MEMORY
from s2attn.backends.triton.walk import Walk
from s2attn.layout import Layout, Spans

OPS = ("forward", "dq", "dkv")
"""What there is a Hopper kernel for."""
WORD = 64
"""Keys in a word of a mask tile, and in a tile."""
MOST_STAGES = 6
BARRIERS = 2048
"""Bytes of shared memory that are left for barriers and for the making of descriptors."""


@dataclass(frozen=True)
class HopperForm:
    """How the 128 lines of an item are made up, and what its program keeps in shared memory.

    Attributes:
        stack: 2 where the consumers take the same 64 tokens of two query heads, 1 where they take 128 neighbours.
        join: tiles of 64 keys, of full entries, that are taken at once.
        ring: stages of ``join`` tiles of keys, and as many of values, that are loaded ahead.
        line_ring: items whose queries are loaded ahead.
    """

    stack: int
    join: int
    ring: int
    line_ring: int = 2

    def factor(self, block: int) -> int:
        """Blocks of the lines' axis that share an item's list."""
        return max(1, TALL // self.stack // block)

    def per_block(self, block: int) -> int:
        """Items in one block of the lines' axis."""
        return max(1, block * self.stack // TALL)

    def constants(self, block: int) -> dict[str, int]:
        """The compile-time numbers that make the form."""
        return {
            "JOIN": self.join, "RB": block, "STACK": self.stack, "SUBS": self.per_block(block), "RING": self.ring,
            "Q_RING": self.line_ring,
        }  # fmt: skip


def choose_hopper_form(dim: int, dim_v: int, block: int, shared_heads: int) -> HopperForm:
    """The form of the forward kernel for such widths (64 or 128), blocks (64 or more) and query heads that share keys and lists.

    Two tiles taken at once cost fewer instructions. At width 64 they lie in memory like one of 128 keys; at 128 there are not registers
    enough for it: the compiler then puts the products after the softmax that they should run beside.

    >>> choose_hopper_form(128, 128, 64, 4)
    HopperForm(stack=2, join=1, ring=5, line_ring=2)
    >>> choose_hopper_form(64, 64, 64, 4)
    HopperForm(stack=2, join=2, ring=6, line_ring=2)
    """
    stack = 2 if block < TALL and shared_heads % 2 == 0 else 1
    join = 2 if dim == dim_v == 64 else 1
    queries, stage = 2 * TALL * dim * 2, join * WORD * (dim + dim_v) * 2
    return HopperForm(stack, join, min((SHARED_MEMORY["sm_90"] - BARRIERS - queries) // stage, MOST_STAGES))


def hopper_objections(op: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> list[str]:
    """Every reason why the Hopper kernel of ``op`` cannot serve such tensors and this layout, wherever they lie."""
    if op not in OPS:
        return [f"a kernel for {op}: there is one for {', '.join(OPS)}"]
    why = [f"head width {x.shape[-1]} is not 64 or 128" for x in (q, v) if x.shape[-1] not in WIDTHS]
    if layout.block < 64:
        why.append(f"blocks of 64 tokens or more, not {layout.block}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        why.append(f"float16 or bfloat16, not {q.dtype}")
    if op == "dkv" and k.shape[2] % layout.heads:
        why.append(f"the same lists for all query heads of a group, not {layout.heads} lists for {k.shape[2]} KV heads")
    if op == "dkv" and q.shape[0] * q.shape[2] * len(layout.q_spans) * layout.block >= 2**31:
        why.append("fewer than 2**31 query rows over batch and heads")
    if not q.shape[1] or not k.shape[1]:
        why.append("queries and keys: a descriptor of no rows does not exist")
    if op == "forward" and scoring.softcap is None and scoring.scale <= 0:
        why.append(f"a scale above 0 where there is no soft-cap, not {scoring.scale}")
    return why


def has_hopper(device: torch.device) -> bool:
    """Whether a device runs them: NVIDIA's compute capability 9.0, which has ``wgmma`` in the form that they use."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def can_copy(*tensors: Tensor) -> bool:
    """Whether descriptors can read them: aligned, and nothing expanded (a stride of 0)."""
    return is_aligned(*tensors) and all(stride > 0 for x in tensors for stride in x.stride())


@dataclass(eq=False)
class HopperWay:
    """What one Hopper kernel needs of one layout.

    Attributes:
        op: "forward" or "dq"; ``form`` that of its items; ``block`` that of the layout.
        walk: the lists, uncut.
        work: int64 ``(lines, 8)``, one row for each line, longest first; the kernel says what is in it.
        keys: int32, the first token of each listed block.
        codes: int32, what each query block of a line sees of each other entry.
        bits: int64 ``(tiles * block, block / 64)``, the mask tiles, lowest bit first.
        packed: whether keys may end before the tensor does.
    """

    op: str
    form: HopperForm
    block: int
    walk: Walk
    work: Tensor
    keys: Tensor
    codes: Tensor
    bits: Tensor
    packed: bool
    lost: bool = False
    starts: Starts = field(default_factory=dict)

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """The layout's tensors in the kernels' order."""
        return self.work, self.keys, self.codes, self.bits


def hopper_way(op: str, form: HopperForm, layout: Layout, walk: Walk) -> HopperWay:
    """Make what a Hopper kernel needs beside its walk over ``layout``."""
    work = work_table(walk, layout.q_spans, layout.k_spans)
    keys = walk.start[walk.groups.idx.long()].int()
    return HopperWay(op, form, layout.block, walk, work, keys, walk.groups.sub.flatten(), mask_words(layout.tiles), layout.packed)


def work_table(walk: Walk, lines: Spans, listed: Spans) -> Tensor:
    """A row for each line of a walk that cuts no list, in the order of its schedule.

    Layout head, first token, tokens, first entry, entries seen in full, others, first code, and the first token after the listed axis of
    its sequence.
    """
    g, item = walk.groups, walk.pieces[:, 0].long()
    head, line = item // walk.lines, item % walk.lines
    begin, full = g.ptr[head, line], g.full[head, line]
    columns = (
        head, walk.line_start[line], walk.line_length[line], begin, full, g.ptr[head, line + 1] - begin - full,
        g.sub_ptr[head, line] * g.factor, ends_of(walk, lines, listed)[line],
    )  # fmt: skip
    return torch.stack([column.long() for column in columns], dim=1).contiguous()


def mask_words(tiles: Tensor) -> Tensor:
    """Mask tiles ``(n, lines, listed)`` as int64 words of 64 listed tokens, ``(n * lines, listed / 64)``."""
    packed = np.packbits(tiles.cpu().numpy().astype(bool), axis=-1, bitorder="little")
    words = np.ascontiguousarray(packed).view("<i8").reshape(-1, max(tiles.shape[-1] // WORD, 1))
    return torch.from_numpy(words).to(tiles.device)


@lru_cache(maxsize=64)
def programs_of(index: int) -> int:
    """One program fills a multiprocessor's shared memory, so there are as many as these."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def hopper_forward(q: Tensor, k: Tensor, v: Tensor, way: HopperWay, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Run the Hopper forward kernel."""
    from s2attn.kernels.hopper.forward import hopper_forward_kernel

    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(batch, seqlen, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, seqlen, dtype=torch.float32)
    sinks = lse if scoring.sinks is None else scoring.sinks.contiguous()

    def describe() -> Call:
        stacks = heads // way.walk.groups.heads // way.form.stack
        items = way.work.shape[0] * way.form.per_block(way.block) * stacks * batch
        numbers = (*factors(scoring), items, batch, heads, k.shape[2], way.walk.groups.heads, seqlen, k.shape[1])
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2])
        grid = (min(items, programs_of(way.work.device.index or 0)), 1, 1)
        return Call(grid, (*way.lists, *numbers, *strides), _constants(q, v, way, scoring) | {"num_warps": 4})

    shapes = tuple((x.shape, x.stride()) for x in (q, k, v))
    key = ("hopper", "forward", way.form, q.dtype, shapes, scoring.scale, scoring.softcap, scoring.sinks is None)
    with on_device(q), scratch_memory(q.device):
        start(hopper_forward_kernel, (q, k, v, sinks, out, lse), way.starts, key, describe)
    return out, lse


def _constants(q: Tensor, v: Tensor, way: HopperWay, scoring: Scoring) -> dict[str, Any]:
    flags = {"CAPPED": scoring.softcap is not None, "SINKS": scoring.sinks is not None, "PACKED": way.packed}
    return {"D": q.shape[-1], "DV": v.shape[-1], **way.form.constants(way.block), **flags}
