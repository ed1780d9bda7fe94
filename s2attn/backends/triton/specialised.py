"""Launch of the warp-specialised forward kernel, and the mask tiles as tall as its tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import e, log2

import torch
from torch import Tensor

from s2attn.backends.triton.launch import on_device
from s2attn.backends.triton.walk import Walk
from s2attn.layout import Layout
from s2attn.layout.groups import ABSENT, FULL

WIDTHS = (64, 128)
LISTED_TOKENS = 64
TALL = 128
"""Query rows of a tile: 64 for each of the two computing warp groups."""


@dataclass(frozen=True)
class Form:
    """How the 128 rows of a tile are made up, and how many tiles are loaded ahead in each loop.

    ``rows`` tokens of ``stack`` query heads that read the same keys; ``stages`` and ``other_stages`` are those of the full entries and of
    the others.
    """

    rows: int
    stack: int
    stages: int
    other_stages: int

    def factor(self, block: int) -> int:
        """Query blocks that share a tile's list."""
        return max(1, self.rows // block)

    def per_block(self, block: int) -> int:
        """Tiles in one query block."""
        return max(1, block // self.rows)


def choose_form(dim: int, block: int, shared_heads: int) -> Form:
    """The form for heads of ``dim`` (64 or 128, the wider of both), when ``shared_heads`` neighbouring query heads share keys and lists.

    Blocks of 64 are stacked by heads where heads share: the union of two rows' lists would do work that neither asked for. Stages are what
    fits into the shared memory of Hopper (`tests/compile`).

    >>> choose_form(128, 64, 4), choose_form(64, 128, 4)
    (Form(rows=64, stack=2, stages=2, other_stages=1), Form(rows=128, stack=1, stages=4, other_stages=2))
    """
    stack = 2 if block < TALL and shared_heads % 2 == 0 else 1
    if dim <= 64:
        return Form(TALL // stack, stack, 4, 2)
    return Form(TALL // stack, stack, 2 if stack == 2 else 3, 1)


def specialised_objections(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> list[str]:
    """Every reason why the specialised kernel cannot serve these tensors and this layout."""
    why = [f"head width {x.shape[-1]} is not 64 or 128" for x in (q, v) if x.shape[-1] not in WIDTHS]
    if layout.block < LISTED_TOKENS:
        why.append(f"blocks of {LISTED_TOKENS} tokens or more, not {layout.block}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        bytes_apart = [stride * x.element_size() for stride in x.stride()[:3]]
        if x.stride(-1) != 1 or any(apart % 16 for apart in bytes_apart) or x.data_ptr() % 16:
            why.append(f"{name} whose rows are contiguous and start at multiples of 16 bytes")
    return why


@dataclass(frozen=True, eq=False)
class TallMasks:
    """What the kernel reads beside a `Walk`: a code per other entry, the tall mask tiles, and the end of each line's keys.

    ``tiles`` is uint8 ``(codes * rows, block)``: for each code the rows of all tiles of a line, heads of a stack one below the other.
    """

    codes: Tensor
    tiles: Tensor
    key_end: Tensor


def tall_masks(layout: Layout, walk: Walk, form: Form) -> TallMasks:
    """Join the mask tiles of the blocks that share a tile, each combination once."""
    groups, block = walk.groups, layout.block
    # Row 0 stands for the whole tile, row 1 for the empty one: a table is never empty, and codes find their tile by adding 2.
    single = torch.cat([layout.tiles.new_ones(1, block, block), layout.tiles.new_zeros(1, block, block), layout.tiles])
    places = torch.where(groups.sub == FULL, 0, torch.where(groups.sub == ABSENT, 1, groups.sub + 2)).long()
    whole = places.new_zeros(1, groups.factor)
    combinations, codes = torch.unique(torch.cat([whole, places]), dim=0, return_inverse=True)
    tall = single[combinations].view(len(combinations), -1, 1, form.rows, block)
    tiles = tall.expand(-1, -1, form.stack, -1, -1).reshape(-1, block).to(torch.uint8)
    line_seq = layout.q_spans.seq[groups.first.long()]
    last = torch.searchsorted(layout.k_spans.seq, line_seq, right=True)
    # The 1 in front serves lines before any key, which list nothing: a descriptor of no rows does not exist.
    ends = torch.cat([line_seq.new_ones(1), layout.k_spans.start + layout.k_spans.length])
    return TallMasks(codes[1:].int(), tiles, ends[last])


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


def specialised_forward(
    q: Tensor, k: Tensor, v: Tensor, walk: Walk, tall: TallMasks, form: Form, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the specialised forward kernel on rows grouped by ``form.factor(block)``."""
    from s2attn.kernels.specialised import specialised_forward_kernel

    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(batch, seqlen, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, seqlen, dtype=torch.float32)
    groups, subs = walk.groups, form.per_block(block)
    grid = (walk.order.numel() * subs * (heads // groups.heads // form.stack), batch)
    with on_device(q), scratch_memory(q.device):
        specialised_forward_kernel[grid](
            q, k, v, out, lse, walk.order, walk.line_start, walk.line_length,
            groups.ptr, groups.full, groups.sub_ptr, groups.idx, tall.codes, tall.tiles, walk.start, tall.key_end,
            scale * log2(e), walk.lines, heads, k.shape[2], groups.heads, seqlen, tall.tiles.shape[0],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
            D=q.shape[-1], DV=v.shape[-1], ROWS=form.rows, STACK=form.stack, BLOCK_N=LISTED_TOKENS, RB=block, SUBS=subs,
            STAGES=form.stages, OTHER_STAGES=form.other_stages, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4,
        )  # fmt: skip
    return out, lse
