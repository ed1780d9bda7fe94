"""`Portable`: gather the listed key blocks of many query blocks at a time, and attend with what torch has."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.backends.base import Backend, Pages, Reduction, Requests, Scoring, Writes
from s2attn.backends.checks import exact_arithmetic, is_captured, paged_objections, plain_objections, store_objections
from s2attn.backends.portable.cache import cached_plan
from s2attn.backends.portable.paged import PagedKeys
from s2attn.backends.portable.run import Work, run_backward, run_forward
from s2attn.backends.portable.score import block_mass
from s2attn.backends.portable.tile import Tile
from s2attn.layout import Layout

CAPTURED = ["it looks at numbers on the host, which a stream that is being captured cannot wait for"]


class Portable(Backend):
    """Exact attention over listed blocks on any torch device, in float32 (float64 for float64 inputs).

    Work is proportional to the listed blocks, memory to the lengths. Both directions give the same bits every time, whatever else is
    in the batch. A key that a query does not see never reaches its result, not even when it holds NaN; a query that sees a key or
    value holding NaN gets NaN, and adds nothing to the gradients of keys and values.
    """

    name = "portable"

    def __init__(self, tile: Tile | None = None):
        """``tile`` computes stacks of gathered keys; by default whatever is quickest for their shape, dtype and device."""
        self._tile = tile

    def _work(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> Work:
        return Work.of(q, k, v, layout, scoring, self._tile)

    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        return plain_objections(q, k, v)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        with exact_arithmetic(q.device):
            return run_forward(self._work(q, k, v, layout, scoring))

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        with exact_arithmetic(q.device):
            return run_backward(self._work(q, k, v, layout, scoring), dout, dlse, out, lse)

    def mass_objections(self, q: Tensor, k: Tensor) -> list[str]:
        return plain_objections(q, k, k)

    def antidiagonal(self, q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
        return block_mass(q, k, reduction)

    def paged_objections(self, q: Tensor, pages: Pages) -> list[str]:
        return paged_objections(q, pages) + (CAPTURED if is_captured(q) else [])

    def forward_paged(self, q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        plan = cached_plan(layout, 1, q.shape[2], pages.kv_heads)
        paged = PagedKeys(pages, layout.k_spans, layout.block)
        with exact_arithmetic(q.device):
            return run_forward(Work(q, pages.k, pages.v, plan, scoring, self._tile, paged))

    def store_objections(self, new: Writes) -> list[str]:
        return store_objections(new) + (CAPTURED if is_captured(new.k_pages) else [])

    def store(self, new: Writes) -> None:
        size = new.k_pages.shape[1]
        slots = new.slots.long()
        kept = ((slots >= 0) & (slots < new.k_pages.shape[0] * size)).nonzero()[:, 0]
        slots = slots[kept]
        for rows, pages, factor in ((new.k, new.k_pages, new.k_scale), (new.v, new.v_pages, new.v_scale)):
            numbers = rows[kept]
            if pages.dtype == torch.float8_e4m3fn:
                numbers = numbers.float() if factor is None else numbers.float() / factor[:, None]
                most = torch.finfo(pages.dtype).max
                numbers = numbers.clamp(-most, most)
            with torch.no_grad():
                pages[slots // size, slots % size] = numbers.to(pages.dtype)
