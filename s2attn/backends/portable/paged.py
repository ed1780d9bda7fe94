"""Key blocks read through a block table: only listed pages are touched, and nothing is copied but what a chunk attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2attn.backends.base import Pages
from s2attn.backends.portable.plan import Plan
from s2attn.backends.portable.rows import Rows
from s2attn.layout import Spans


@dataclass(frozen=True, eq=False)
class PagedKeys:
    """Where the key blocks of a plan lie: each inside one page of its sequence and KV head.

    Attributes:
        pages: the cache and its tables.
        spans: of the layout's key blocks.
        block: tokens per key block; divides the page size.
    """

    pages: Pages
    spans: Spans
    block: int

    def gather(self, block: Tensor, lane: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``(N, block, width)`` of key blocks ``block`` of KV heads ``lane``; a short block repeats its last token."""
        pages, size = self.pages, self.pages.page_size
        first = self.spans.pos[block].long()
        row = lane if pages.table.shape[1] > 1 else torch.zeros_like(lane)
        page = pages.table[self.spans.seq[block].long(), row, first // size].long()
        inside = torch.arange(self.block, device=block.device)
        token = (first % size)[:, None] + torch.minimum(inside, self.spans.length[block].long()[:, None] - 1)
        k, v = (_read(x, page[:, None], token, lane[:, None], dtype) for x in (pages.k, pages.v))
        if pages.k_scale is not None:
            k = k * pages.k_scale.to(dtype)[lane, None, None]
        if pages.v_scale is not None:
            v = v * pages.v_scale.to(dtype)[lane, None, None]
        return k, v

    def copied(self, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor, Plan]:
        """All listed blocks as contiguous ``(1, tokens, 1, width)`` keys and values, and the same plan over them."""
        count = len(plan.key_start)
        code, place = torch.unique(plan.entry_lane * count + plan.entry_block, return_inverse=True)
        k, v = self.gather(code % count, torch.div(code, count, rounding_mode="floor"), dtype)
        start = torch.arange(len(code), device=code.device) * self.block
        last = start + self.spans.length[code % count].long() - 1
        moved = replace(plan, entry_block=place, entry_lane=torch.zeros_like(place), key_start=start, key_last=last)
        return k.reshape(1, -1, 1, k.shape[-1]), v.reshape(1, -1, 1, v.shape[-1]), moved


def _read(pages: Tensor, page: Tensor, token: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """``pages[page, token, head]`` in that dtype."""
    width = pages.shape[-1]
    if pages.stride(-1) == 1 and not any(stride % width for stride in pages.stride()[:3]):
        rows = Rows.of(pages)  # without a copy, as the strides say
        return rows.gather(rows.at(page, token, head), dtype)
    return pages[page, token, head].to(dtype)
