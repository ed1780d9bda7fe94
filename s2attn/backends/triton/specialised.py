"""Launches of the warp-specialised kernels, and what they read beside a walk: mask tiles as tall as theirs, lse and delta by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import e, log2
from typing import Any

import torch
from torch import Tensor

from s2attn.backends.triton.launch import on_device
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

    def constants(self, block: int) -> dict[str, int]:
        """The constants that the three kernels share."""
        return {"RB": block, "SUBS": self.per_block(block), "STAGES": self.stages, "OTHER_STAGES": self.other_stages}


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


def specialised_objections(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> list[str]:
    """Every reason why the specialised kernel cannot serve these tensors and this layout."""
    why = [f"head width {x.shape[-1]} is not 64 or 128" for x in (q, v) if x.shape[-1] not in WIDTHS]
    if layout.block < 64:
        why.append(f"blocks of 64 tokens or more, not {layout.block}")
    if k.shape[2] % layout.heads:
        why.append(f"the same lists for all query heads of a group, not {layout.heads} lists for {k.shape[2]} KV heads")
    if q.shape[0] * q.shape[2] * len(layout.q_spans) * layout.block >= 2**31:
        why.append("fewer than 2**31 query rows over batch and heads")
    for name, x in (("q", q), ("k", k), ("v", v)):
        bytes_apart = [stride * x.element_size() for stride in x.stride()[:3]]
        if x.stride(-1) != 1 or any(apart % 16 for apart in bytes_apart) or x.data_ptr() % 16:
            why.append(f"{name} whose rows are contiguous and start at multiples of 16 bytes")
    return why


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
    line_seq = lines.seq[groups.first.long()]
    last = torch.searchsorted(listed.seq, line_seq, right=True)
    # The 1 in front serves lines before any listed block, which list nothing: a descriptor of no rows does not exist.
    ends = torch.cat([line_seq.new_ones(1), listed.start + listed.length])
    return TallMasks(codes[1:].int(), table, ends[last])


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


def specialised_forward(q: Tensor, k: Tensor, v: Tensor, walk: Walk, tall: TallMasks, form: Form, scale: float) -> tuple[Tensor, Tensor]:
    """Run the specialised forward kernel on rows that are grouped for ``form``."""
    from s2attn.kernels.specialised import specialised_forward_kernel

    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(batch, seqlen, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, seqlen, dtype=torch.float32)
    groups, block = walk.groups, tall.tiles.shape[-1]
    grid = (walk.order.numel() * form.per_block(block) * (heads // groups.heads // form.stack), batch)
    with on_device(q), scratch_memory(q.device):
        specialised_forward_kernel[grid](
            q, k, v, out, lse, walk.order, walk.line_start, walk.line_length,
            groups.ptr, groups.full, groups.sub_ptr, groups.idx, tall.codes, tall.tiles, walk.start, tall.end,
            scale * log2(e), walk.lines, heads, k.shape[2], groups.heads, seqlen, tall.tiles.shape[0],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
            **_products(q, v), **form.constants(block), ROWS=form.rows, STACK=form.stack, BLOCK_N=form.listed_tokens, num_warps=4,
        )  # fmt: skip
    return out, lse


def specialised_dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, walk: Walk, tall: TallMasks, form: Form, scale: float
) -> Tensor:
    """Run the specialised dq kernel: ``lse`` and ``delta`` as :func:`by_block` makes them, ``dout`` laid out as the objections ask of q."""
    from s2attn.kernels.specialised_backward import specialised_dq_kernel

    batch, seqlen, heads, _ = q.shape
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    groups, block = walk.groups, tall.tiles.shape[-1]
    with on_device(q), scratch_memory(q.device):
        specialised_dq_kernel[(walk.order.numel() * form.per_block(block) * (heads // groups.heads // form.stack), batch)](
            q, k, v, dout, lse, delta, result, walk.order, walk.line_start, walk.line_length, groups.first,
            groups.ptr, groups.full, groups.sub_ptr, groups.idx, tall.codes, tall.tiles, walk.start, tall.end,
            scale, scale * log2(e), walk.lines, heads, k.shape[2], groups.heads, seqlen, tall.tiles.shape[0], lse.shape[-1],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *result.stride()[:3],
            **_products(q, v), **form.constants(block), ROWS=form.rows, STACK=form.stack, BLOCK_N=form.listed_tokens, num_warps=4,
        )  # fmt: skip
    return result


def specialised_dkv(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, walk: Walk, tall: TallMasks, form: Form, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the specialised dk and dv kernel on columns; the other arguments as for :func:`specialised_dq`."""
    from s2attn.kernels.specialised_backward import specialised_dkv_kernel

    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    groups, block = walk.groups, tall.tiles.shape[-1]
    with on_device(q), scratch_memory(q.device):
        specialised_dkv_kernel[(walk.order.numel() * form.per_block(block), q.shape[0])](
            q, k, v, dout, lse, delta, dk, dv, walk.order, walk.line_start, walk.line_length,
            groups.ptr, groups.full, groups.sub_ptr, groups.idx, tall.codes, tall.tiles, walk.start, tall.end,
            scale, scale * log2(e), walk.lines, q.shape[2], k.shape[2], groups.heads, k.shape[1], tall.tiles.shape[0], lse.shape[-1],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            **_products(q, v), **form.constants(block), BLOCK_M=form.listed_tokens, BLOCK_N=form.rows, num_warps=4,
        )  # fmt: skip
    return dk, dv


def by_block(values: Tensor, spans: Spans, block: int, absent: float) -> Tensor:
    """``(B, H, T)`` numbers per query in slots of ``block`` per query block, ``(B, H, blocks * block)``; ``absent`` where there is none."""
    token = torch.arange(values.shape[-1], device=values.device, dtype=spans.start.dtype)
    of = torch.searchsorted(spans.start, token, right=True) - 1
    slots = values.new_full((*values.shape[:2], len(spans) * block), absent)
    slots[..., of * block + token - spans.start[of]] = values
    return slots


def _products(q: Tensor, v: Tensor) -> dict[str, Any]:
    return {"D": q.shape[-1], "DV": v.shape[-1], "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32"}
