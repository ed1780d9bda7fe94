"""What a launch hands to a kernel about a layout: grouped lists and the schedule over them, made once per layout and tile."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.triton.start import Starts
from s2attn.layout import Layout, Spans
from s2attn.layout.groups import RowGroups, group_rows
from s2attn.patterns.runs import ranges
from s2attn.schedule import Schedule, piece_limits, plan_by_length, plan_by_range

LEAST_TOKENS = 1024
"""A piece shorter than this many listed tokens is not worth the joining."""


@dataclass(frozen=True, eq=False)
class Walk:
    """One direction of a layout, ready for a kernel: lines in groups of ``factor`` blocks, and the pieces in which they are walked.

    Attributes:
        groups: the lists.
        pieces, splits: the tables of the `Schedule`, int32, on the layout's device; ``slots`` is the workspace that they need.
        line_start, line_length: tokens of each group.
        start, length: tokens of each listed block.
        tiles: mask tiles as bytes.
        starts: launches made before over this walk.
    """

    groups: RowGroups
    pieces: Tensor
    splits: Tensor
    slots: int
    line_start: Tensor
    line_length: Tensor
    start: Tensor
    length: Tensor
    tiles: Tensor
    starts: Starts = field(default_factory=dict)

    @property
    def lines(self) -> int:
        return self.groups.groups

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """What every kernel takes of it, in the kernels' order."""
        g = self.groups
        return self.pieces, self.line_start, self.line_length, g.ptr, g.full, g.sub_ptr, g.idx, g.sub, self.tiles, self.start, self.length


def walk_rows(layout: Layout, factor: int, unit: int, copies: int, key_range: int = 0, cut: bool = True) -> Walk:
    """Query blocks as lines; items by layout head and line.

    Args:
        factor: query blocks per line.
        unit: key blocks per tile.
        copies: query heads that share a layout head.
        key_range: cut the lists where they cross a multiple of so many key tokens; 0 cuts only long ones.
        cut: whether lists may be cut at all.
    """
    groups = group_rows(layout, factor)
    full, rest = _counts(groups)
    if not cut:
        plan = plan_by_length(full, rest, max(int((full + rest).max(initial=0)), 1))
    elif key_range:
        plan = plan_by_range(*_by_range(groups, max(key_range // layout.block, 1), len(layout.k_spans)))
    else:
        plan = _plan(full, rest, layout.q_spans, groups, unit, copies, layout.block)
    return _walk(layout, groups, layout.q_spans, layout.k_spans, plan)


def walk_columns(layout: Layout, factor: int, unit: int, num_heads: int, num_kv_heads: int) -> Walk:
    """Key blocks as lines; items by KV head and line, their lists those of the group's query heads one after another."""
    turned = Layout(layout.block, False, layout.columns, layout.tiles, layout.k_spans, layout.q_spans, layout.packed)
    groups = group_rows(turned, factor)
    of_query_head = np.arange(num_heads) * layout.heads // num_heads
    full, rest = (part[of_query_head].reshape(num_kv_heads, -1, groups.groups).sum(axis=1) for part in _counts(groups))
    return _walk(layout, groups, layout.k_spans, layout.q_spans, _plan(full, rest, layout.k_spans, groups, unit, 1, layout.block))


def _counts(groups: RowGroups) -> tuple[np.ndarray, np.ndarray]:
    """Entries of the full part and of the other part of every list, ``(heads, groups)``."""
    full = groups.full.cpu().numpy().astype(np.int64)
    return full, groups.ptr.diff(dim=1).cpu().numpy() - full


def _plan(full: np.ndarray, rest: np.ndarray, lines: Spans, groups: RowGroups, unit: int, copies: int, block: int) -> Schedule:
    seq = lines.seq[groups.first.long()].cpu().numpy()
    limits = piece_limits(full + rest, seq, copies=copies, least=max(LEAST_TOKENS // block, 1))
    return plan_by_length(full, rest, limits, unit)


def _by_range(groups: RowGroups, blocks: int, key_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries of both parts of every list in each range of ``blocks`` key blocks, ``(heads, groups, ranges)``."""
    full, rest = _counts(groups)
    parts, count = [], max(-(-key_blocks // blocks), 1)
    begin = groups.ptr[:, :-1].cpu().numpy()
    idx = groups.idx.cpu().numpy()
    for first, length in ((begin, full), (begin + full, rest)):
        entries = idx[ranges(first.ravel(), length.ravel())]
        owner = np.repeat(np.arange(length.size), length.ravel())
        parts.append(np.bincount(owner * count + entries // blocks, minlength=length.size * count).reshape(*length.shape, count))
    return parts[0], parts[1]


def _walk(layout: Layout, groups: RowGroups, lines: Spans, listed: Spans, plan: Schedule) -> Walk:
    first, last = groups.first.long(), (groups.first + groups.count - 1).long()
    start = lines.start[first]
    length = lines.start[last] + lines.length[last] - start
    pieces, splits = (torch.from_numpy(table).to(layout.device) for table in (plan.pieces, plan.splits))
    return Walk(groups, pieces, splits, plan.slots, start, length, listed.start, listed.length, layout.tiles.view(torch.uint8))
