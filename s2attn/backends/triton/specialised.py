"""Launches of the warp-specialised kernels, and what they read beside a walk: mask tiles as tall as theirs, lse and delta by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.base import Scoring
from s2attn.backends.triton.launch import factors, join_slots, workspace
from s2attn.backends.triton.start import ALIGNMENT, Call, Starts, on_device, start
from s2attn.backends.triton.walk import Walk
from s2attn.layout import Layout, Spans
from s2attn.layout.groups import ABSENT, FULL

WIDTHS = (64, 128)
TALL = 128
"""Lines' tokens in a tile: 64 for each of the two computing warp groups."""


@dataclass(frozen=True)
class Form:
    """How the 128 rows of a tile are made up, how many listed tokens meet them, and how many such tiles are loaded ahead.

    ``rows`` tokens of ``stack`` query heads that read the same keys; ``stages`` and ``other_stages`` are those of the full entries and of
    the others.
    """

    rows: int
    stack: int
    listed_tokens: int
    stages: int
    other_stages: int

    def factor(self, block: int) -> int:
        """Blocks of the lines' axis that share a tile's list."""
        return max(1, self.rows // block)

    def per_block(self, block: int) -> int:
        """Tiles in one block of the lines' axis."""
        return max(1, block // self.rows)

    def constants(self, op: str, block: int) -> dict[str, int]:
        """The compile-time numbers that make the form."""
        shared = {"RB": block, "SUBS": self.per_block(block), "STAGES": self.stages, "OTHER_STAGES": self.other_stages}
        if op == "dkv":
            return {"BLOCK_M": self.listed_tokens, "BLOCK_N": self.rows, **shared}
        return {"ROWS": self.rows, "STACK": self.stack, "BLOCK_N": self.listed_tokens, **shared}


def choose_form(op: str, dim: int, block: int, shared_heads: int) -> Form:
    """The form for ``op`` ("forward", "dq" or "dkv") and heads of ``dim`` (64 or 128, the wider of both).

    Query blocks of 64 are stacked by heads where an even number of neighbouring query heads, ``shared_heads``, shares keys and lists: the
    union of two rows' lists would do work that neither asked for. What does not fit into Hopper's shared memory or registers is not
    stacked, or meets fewer listed tokens (`tests/compile`).

    >>> choose_form("forward", 128, 64, 4)
    Form(rows=64, stack=2, listed_tokens=64, stages=2, other_stages=1)
    >>> choose_form("dkv", 128, 64, 4)
    Form(rows=128, stack=1, listed_tokens=32, stages=2, other_stages=1)
    """
    wide = dim > 64
    stack = 2 if block < TALL and shared_heads % 2 == 0 and op != "dkv" and not (wide and op == "dq") else 1
    if op == "forward":
        ahead = (3 - (stack == 2), 1) if wide else (4, 2)
    else:
        ahead = (2, 1) if wide else (2, 2)
    return Form(TALL // stack, stack, 32 if wide and op == "dkv" else 64, *ahead)


def form_objections(op: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> list[str]:
    """Every reason why the specialised kernel of ``op`` cannot serve such tensors and this layout, wherever they lie."""
    why = [f"head width {x.shape[-1]} is not 64 or 128" for x in (q, v) if x.shape[-1] not in WIDTHS]
    if layout.block < 64:
        why.append(f"blocks of 64 tokens or more, not {layout.block}")
    if op == "dkv" and k.shape[2] % layout.heads:
        why.append(f"the same lists for all query heads of a group, not {layout.heads} lists for {k.shape[2]} KV heads")
    if op == "dkv" and scoring.softcap is not None and max(q.shape[-1], v.shape[-1]) > 64:
        why.append("a soft-cap only at head width 64: at 128 its arithmetic does not fit into the registers")
    if q.shape[0] * q.shape[2] * len(layout.q_spans) * layout.block >= 2**31:
        why.append("fewer than 2**31 query rows over batch and heads")
    return why


def is_aligned(*tensors: Tensor) -> bool:
    """Whether rows are contiguous and start at multiples of 16 bytes, as descriptors need it."""
    return all(
        x.stride(-1) == 1 and x.data_ptr() % ALIGNMENT == 0 and not any(stride * x.element_size() % ALIGNMENT for stride in x.stride()[:-1])
        for x in tensors
    )


def fits_columns(*tensors: Tensor, groups: int) -> bool:
    """Whether the heads of a group, side by side as the columns of one descriptor, have 32-bit numbers; the dkv kernel reads them so."""
    return all(x.stride(2) * (x.shape[2] // groups) < 2**31 for x in tensors)


@dataclass(frozen=True, eq=False)
class TallMasks:
    """What the kernel reads beside a `Walk`: a code per other entry, the tall mask tiles, and where each line's sequence ends.

    ``tiles`` is uint8 ``(codes * rows, block)``: for each code the rows of all tiles of a line, heads of a stack one below the other.
    ``end`` is the first token after the listed axis of each line's sequence.
    """

    codes: Tensor
    tiles: Tensor
    end: Tensor


def tall_masks(walk: Walk, lines: Spans, listed: Spans, tiles: Tensor, form: Form) -> TallMasks:
    """Join the mask tiles of the blocks that share a tile, each combination once.

    Args:
        walk: rows or columns of a layout, grouped by ``form.factor(block)``.
        lines, listed: the layout's spans on the lines' axis and on the other one.
        tiles: the layout's mask tiles, ``[tile, line token, listed token]``: transposed for columns.
    """
    groups, block = walk.groups, tiles.shape[-1]
    # Row 0 stands for the whole tile, row 1 for the empty one: a table is never empty, and codes find their tile by adding 2.
    single = torch.cat([tiles.new_ones(1, block, block), tiles.new_zeros(1, block, block), tiles])
    places = torch.where(groups.sub == FULL, 0, torch.where(groups.sub == ABSENT, 1, groups.sub + 2)).long()
    whole = places.new_zeros(1, groups.factor)
    combinations, codes = torch.unique(torch.cat([whole, places]), dim=0, return_inverse=True)
    tall = single[combinations].view(len(combinations), -1, 1, form.rows, block)
    table = tall.expand(-1, -1, form.stack, -1, -1).reshape(-1, block).to(torch.uint8)
    return TallMasks(codes[1:].int(), table, ends_of(walk, lines, listed))


def ends_of(walk: Walk, lines: Spans, listed: Spans) -> Tensor:
    """The first token after the listed axis of each line's sequence."""
    line_seq = lines.seq[walk.groups.first.long()]
    last = torch.searchsorted(listed.seq, line_seq, right=True)
    # The 1 in front serves lines before any listed block, which list nothing: a descriptor of no rows does not exist.
    return torch.cat([line_seq.new_ones(1), listed.start + listed.length])[last]


@dataclass(eq=False)
class SpecialisedWay:
    """What one specialised kernel needs of one layout.

    Attributes:
        op: "forward", "dq" or "dkv"; ``form`` that of its tiles; ``block`` that of the layout.
        walk: the lists; only those of columns are cut.
        tall: its mask tiles.
        token_of: ``(blocks * block,)`` the query token of each place of lse and delta by block; T where there is none.
        lost: the compiler did not make the cut after all, so the plain kernel is the better one.
    """

    op: str
    form: Form
    block: int
    walk: Walk
    tall: TallMasks
    token_of: Tensor
    lost: bool = False
    starts: Starts = field(default_factory=dict)

    def by_block(self, values: Tensor, absent: float) -> Tensor:
        """``(B, H, T)`` numbers by query in places by query block, ``(B, H, blocks * block)``; ``absent`` where there is no query."""
        return pad(values, (0, 1), value=absent).index_select(-1, self.token_of)

    def started(self, compiled: Any) -> None:
        """Look at a kernel that was compiled just now: without the change of registers there was no cut."""
        if hasattr(compiled, "asm") and "setmaxnreg" not in compiled.asm.get("ptx", "setmaxnreg"):
            self.lost = True


def places_of(spans: Spans, block: int, total: int) -> Tensor:
    """The token of each place by block, ``(blocks * block,)`` int64; ``total`` where a block is shorter."""
    inside = torch.arange(block, device=spans.start.device)
    token = spans.start[:, None].long() + inside
    return torch.where(inside < spans.length[:, None], token, total).flatten()


@contextmanager
def scratch_memory(device: torch.device) -> Iterator[None]:
    """Triton asks for memory to build descriptors in; torch gives it, and whoever gave it before is put back afterwards."""
    from triton import set_allocator
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    try:
        yield
    finally:
        set_allocator(before)


def specialised_forward(q: Tensor, k: Tensor, v: Tensor, way: SpecialisedWay, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Run the specialised forward kernel."""
    from s2attn.kernels.specialised import specialised_forward_kernel

    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(batch, seqlen, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, seqlen, dtype=torch.float32)
    sinks = lse if scoring.sinks is None else scoring.sinks.contiguous()

    def describe() -> Call:
        numbers = (*factors(scoring), way.walk.lines, heads, k.shape[2], way.walk.groups.heads, seqlen, way.tall.tiles.shape[0])
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2])
        constants = _constants(q, v, way, scoring) | {"SINKS": scoring.sinks is not None}
        return Call(_grid(q, way, heads // way.form.stack), (*_lists(way), *numbers, *strides), constants)

    with on_device(q), scratch_memory(q.device):
        way.started(
            start(specialised_forward_kernel, (q, k, v, sinks, out, lse), way.starts, _key("forward", way, scoring, q, k, v), describe)
        )
    return out, lse


def specialised_dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, way: SpecialisedWay, scoring: Scoring
) -> Tensor:
    """Run the specialised dq kernel; ``lse`` and ``delta`` by query."""
    from s2attn.kernels.specialised_backward import specialised_dq_kernel

    heads, result = q.shape[2], torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, delta = way.by_block(lse, float("inf")), way.by_block(delta, 0.0)

    def describe() -> Call:
        counts = (way.walk.lines, heads, k.shape[2], way.walk.groups.heads, q.shape[1], way.tall.tiles.shape[0], lse.shape[-1])
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *result.stride()[:3])
        rest = (*_lists(way, way.walk.groups.first), scoring.scale, *factors(scoring), *counts, *strides)
        return Call(_grid(q, way, heads // way.form.stack), rest, _constants(q, v, way, scoring))

    with on_device(q), scratch_memory(q.device):
        pointers = (q, k, v, dout, lse, delta, result)
        way.started(start(specialised_dq_kernel, pointers, way.starts, _key("dq", way, scoring, q, k, v, dout), describe))
    return result


def specialised_dkv(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, way: SpecialisedWay, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Run the specialised dk and dv kernel, and join the lists that were cut; ``lse`` and ``delta`` by query."""
    from s2attn.kernels.specialised_backward import specialised_dkv_kernel

    heads, walk, subs = q.shape[2], way.walk, way.form.per_block(way.block)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    lse, delta = way.by_block(lse, float("inf")), way.by_block(delta, 0.0)
    parts = workspace(lse, q.shape[0] * walk.slots * subs * way.form.rows, q.shape[-1], v.shape[-1])

    def describe() -> Call:
        counts = (walk.slots, walk.lines, heads, k.shape[2], walk.groups.heads, k.shape[1], way.tall.tiles.shape[0], lse.shape[-1])
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])
        grid = (walk.pieces.shape[0] * subs, q.shape[0], 1)
        return Call(grid, (*_lists(way), scoring.scale, *factors(scoring), *counts, *strides), _constants(q, v, way, scoring))

    with on_device(q):
        with scratch_memory(q.device):
            pointers = (q, k, v, dout, lse, delta, dk, dv, *parts)
            way.started(start(specialised_dkv_kernel, pointers, way.starts, _key("dkv", way, scoring, q, k, v, dout), describe))
        join_slots(parts[0], dk, walk, way.form.rows, subs, k.shape[2], k.shape[2], scoring.scale)
        join_slots(parts[1], dv, walk, way.form.rows, subs, k.shape[2], k.shape[2], 1.0)
    return dk, dv


def _grid(q: Tensor, way: SpecialisedWay, stacks: int) -> tuple[int, int, int]:
    return way.walk.pieces.shape[0] * way.form.per_block(way.block) * (stacks // way.walk.groups.heads), q.shape[0], 1


def _lists(way: SpecialisedWay, *more: Tensor) -> tuple[Tensor, ...]:
    """The layout's tensors in the kernels' order."""
    walk, g = way.walk, way.walk.groups
    lines = (walk.pieces, walk.line_start, walk.line_length, *more)
    return *lines, g.ptr, g.full, g.sub_ptr, g.idx, way.tall.codes, way.tall.tiles, walk.start, way.tall.end


def _constants(q: Tensor, v: Tensor, way: SpecialisedWay, scoring: Scoring) -> dict[str, Any]:
    capped = {"CAPPED": scoring.softcap is not None, "num_warps": 4}
    return {"D": q.shape[-1], "DV": v.shape[-1], **way.form.constants(way.op, way.block), **capped}


def _key(op: str, way: SpecialisedWay, scoring: Scoring, *tensors: Tensor) -> tuple:
    """All that a call depends on besides the layout and the addresses."""
    shapes = tuple((x.shape, x.stride()) for x in tensors)
    return "specialised", op, way.form, tensors[0].dtype, shapes, scoring.scale, scoring.softcap, scoring.sinks is None


def specialised_way(op: str, form: Form, layout: Layout, walk: Walk) -> SpecialisedWay:
    """Make what a specialised kernel needs beside its walk over ``layout``."""
    if op == "dkv":
        tall = tall_masks(walk, layout.k_spans, layout.q_spans, layout.tiles.transpose(1, 2), form)
    else:
        tall = tall_masks(walk, layout.q_spans, layout.k_spans, layout.tiles, form)
    return SpecialisedWay(op, form, layout.block, walk, tall, places_of(layout.q_spans, layout.block, layout.seqlen_q))
