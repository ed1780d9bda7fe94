"""A head of a layout as text: full, partial and empty blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2attn.core import bad_value, check_int
from s2attn.layout.entries import entries_of

if TYPE_CHECKING:
    from s2attn.layout.layout import Layout

FULL, MOST, SOME, PARTIAL, EMPTY = "█", "▓", "░", "▒", "·"


def draw(layout: Layout, head: int = 0, width: int = 64) -> str:
    """One head as text, a cell of two characters for each pair of blocks, queries downwards and keys to the right.

    Long sequences are shrunk: a cell then stands for several blocks on each axis and says whether all, half or more, or fewer of the
    blocks that it covers are read. Nothing larger than the drawing is made on the way.

    Args:
        layout: any layout; packed sequences are drawn one after another.
        head: which of the layout's heads.
        width: at most so many characters in a line, at least 2.

    Raises:
        ValueError: ``head`` or ``width`` out of range.

    >>> from s2attn.layout import build_layout
    >>> from s2attn.patterns import Local, Stride
    >>> print(draw(build_layout(Local(2) | Stride(4, offset=0), 1, 1, 384)))
    ▒▒··········
    ██▒▒········
    ████▒▒······
    ██··██▒▒····
    ██····██▒▒··
    ██······██▒▒
    █ full, ▒ partial, · not read; a cell is a block of 64 x 64 tokens
    """
    if not 0 <= check_int("head", head, 0) < layout.heads:
        raise bad_value("head", f"must be in 0 .. {layout.heads - 1}", head)
    cells = check_int("width", width, 2) // 2
    queries, keys = len(layout.q_spans), len(layout.k_spans)
    rows, columns = min(queries, cells), min(keys, cells)
    if not rows or not columns:
        return "(no blocks)"
    full, partial, area = _counted(layout, head, rows, columns)
    lines = ["".join(_cell(*one) * 2 for one in zip(*line, strict=True)) for line in zip(full, partial, area, strict=True)]
    return "\n".join([*lines, _caption(layout, -(-queries // rows), -(-keys // columns))])


def _counted(layout: Layout, head: int, rows: int, columns: int) -> tuple[list[list[int]], ...]:
    """Full blocks, partial blocks, and all blocks under each cell."""
    q_cell = torch.arange(len(layout.q_spans)) * rows // len(layout.q_spans)
    k_cell = torch.arange(len(layout.k_spans)) * columns // len(layout.k_spans)
    entries = entries_of(layout.rows, head)
    cell = q_cell[entries.line.cpu()] * columns + k_cell[entries.idx.cpu()]
    is_full = (entries.tile < 0).cpu()

    def grid(chosen: Tensor) -> list[list[int]]:
        return torch.bincount(chosen, minlength=rows * columns).view(rows, columns).tolist()

    area = torch.bincount(q_cell, minlength=rows)[:, None] * torch.bincount(k_cell, minlength=columns)[None, :]
    return grid(cell[is_full]), grid(cell[~is_full]), area.tolist()


def _cell(full: int, partial: int, area: int) -> str:
    if not full + partial:
        return EMPTY
    if area == 1:
        return FULL if full else PARTIAL
    return FULL if full == area else MOST if 2 * (full + partial) >= area else SOME


def _caption(layout: Layout, tall: int, wide: int) -> str:
    size = f"{layout.block} x {layout.block} tokens"
    if tall == wide == 1:
        return f"{FULL} full, {PARTIAL} partial, {EMPTY} not read; a cell is a block of {size}"
    return f"{FULL} all, {MOST} half or more, {SOME} fewer, {EMPTY} none; a cell is up to {tall} x {wide} blocks of {size}"
