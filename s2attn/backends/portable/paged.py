"""Key blocks read through a block table: only listed pages are touched, and nothing is copied but what a chunk attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2attn.backends.base import Pages
from s2attn.backends.portable.plan import Plan
from s2attn.backends.portable.rows import Rows
from s2attn.backends.portable.tile import Places
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

    def where(self, block: Tensor, lane: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Page, token in it, and head of the keys of blocks ``block`` of KV heads ``lane``; a short block repeats its last token."""
        size = self.pages.page_size
        first = self.spans.pos[block].long()
        row = lane if self.pages.table.shape[1] > 1 else torch.zeros_like(lane)
        page = self.pages.table[self.spans.seq[block].long(), row, first // size].long()
        inside = torch.arange(self.block, device=block.device)
        token = (first % size)[:, None] + torch.minimum(inside, self.spans.length[block].long()[:, None] - 1)
        return page[:, None], token, lane[:, None]

    def places(self, where: tuple[Tensor, Tensor, Tensor], of_values: bool, dtype: torch.dtype) -> Places:
        """Keys or values there; numbers that are scaled, or are no rows of a table, are copied into one of ``dtype``."""
        pages, factor = (self.pages.v, self.pages.v_scale) if of_values else (self.pages.k, self.pages.k_scale)
        rows = Rows.without_copy(pages)
        if rows is not None and factor is None:
            return Places(rows.table, rows.at(*where))
        read = pages[where].to(dtype)
        return Places.whole(read if factor is None else read * factor.to(dtype)[where[2]][..., None])

    def copied(self, plan: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor, Plan]:
        """All listed blocks as contiguous ``(1, tokens, 1, width)`` keys and values, and the same plan over them."""
        count = len(plan.key_start)
        code, place = torch.unique(plan.entry_lane * count + plan.entry_block, return_inverse=True)
        where = self.where(code % count, torch.div(code, count, rounding_mode="floor"))
        k, v = (self.places(where, of_values, dtype).gathered(dtype) for of_values in (False, True))
        start = torch.arange(len(code), device=code.device) * self.block
        last = start + self.spans.length[code % count].long() - 1
        moved = replace(plan, entry_block=place, entry_lane=torch.zeros_like(place), key_start=start, key_last=last)
        return k.reshape(1, -1, 1, k.shape[-1]), v.reshape(1, -1, 1, v.shape[-1]), moved
