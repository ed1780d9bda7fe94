"""What a launch hands to a kernel about a layout: grouped lists and the order of programs, made once per layout and tile height."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.layout import Layout, Spans
from s2attn.layout.groups import RowGroups, group_rows
from s2attn.schedule import longest_first


@dataclass(frozen=True, eq=False)
class Walk:
    """One direction of a layout, ready for a kernel: lines in groups of ``factor`` blocks, the longest first.

    ``line_start`` and ``line_length`` are the tokens of each group, ``start`` and ``length`` those of each listed block.
    """

    groups: RowGroups
    order: Tensor
    line_start: Tensor
    line_length: Tensor
    start: Tensor
    length: Tensor
    tiles: Tensor

    @property
    def lines(self) -> int:
        return self.groups.groups

    def tensors(self) -> tuple[Tensor, ...]:
        g = self.groups
        lists = (g.ptr, g.full, g.sub_ptr, g.idx, g.sub)
        return (self.order, self.line_start, self.line_length, *lists, self.tiles, self.start, self.length)


def walk_rows(layout: Layout, factor: int) -> Walk:
    """Query blocks as lines; programs by layout head and line."""
    groups = group_rows(layout, factor)
    return _walk(layout, groups, layout.q_spans, layout.k_spans, longest_first(groups.ptr.diff(dim=1)))


def walk_columns(layout: Layout, factor: int, num_heads: int, num_kv_heads: int) -> Walk:
    """Key blocks as lines; programs by KV head and line, counted over the query heads of its group."""
    turned = Layout(layout.block, False, layout.columns, layout.tiles, layout.k_spans, layout.q_spans, layout.packed)
    groups = group_rows(turned, factor)
    of_query_head = torch.arange(num_heads, device=layout.device) * layout.heads // num_heads
    counts = groups.ptr.diff(dim=1)[of_query_head].view(num_kv_heads, -1, groups.groups).sum(dim=1)
    return _walk(layout, groups, layout.k_spans, layout.q_spans, longest_first(counts))


def _walk(layout: Layout, groups: RowGroups, lines: Spans, listed: Spans, order: Tensor) -> Walk:
    first, last = groups.first.long(), (groups.first + groups.count - 1).long()
    start = lines.start[first]
    length = lines.start[last] + lines.length[last] - start
    return Walk(groups, order, start, length, listed.start, listed.length, layout.tiles.view(torch.uint8))
