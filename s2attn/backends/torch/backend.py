"""`Torch`: exact attention over listed blocks with torch's own operators."""

from __future__ import annotations

from torch import Tensor

from s2attn.backends.base import Backend, Pages, Reduction, Requests, Scoring, Writes
from s2attn.backends.checks import exact_arithmetic, is_captured, paged_objections, plain_objections, store_objections
from s2attn.backends.torch.attend import Problem, attend
from s2attn.backends.torch.gradients import gradients
from s2attn.backends.torch.paged import attend_paged, write
from s2attn.backends.torch.score import block_mass
from s2attn.layout import Layout

CAPTURED = ["it reads sizes on the host, which a CUDA graph capture does not allow"]


class Torch(Backend):
    """Exact attention over listed blocks on any torch device, in float32 (float64 for float64 inputs).

    Work is proportional to the listed blocks, memory to the lengths. Results have the same bits
    whatever else is in the batch. A key that a query does not see never reaches its result,
    whatever it holds; a query that sees a key or value of NaN gets NaN.
    """

    name = "torch"
    by_position = True

    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        return plain_objections(q, k, v) + (CAPTURED if is_captured(q) else [])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        with exact_arithmetic(q.device):
            p = Problem.of(q, k.shape[2], layout, scoring)
            return attend(p, p.keys(k, v), p.every_item(layout.q_spans, q.shape[1]), k.shape[3] + v.shape[3], v.shape[3])

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        with exact_arithmetic(q.device):
            return gradients(Problem.of(q, k.shape[2], layout, scoring), k, v, dout, dlse, out, lse)

    def mass_objections(self, q: Tensor, k: Tensor) -> list[str]:
        return plain_objections(q, k, k)

    def antidiagonal(self, q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
        with exact_arithmetic(q.device):
            return block_mass(q, k, reduction)

    def paged_objections(self, q: Tensor, pages: Pages) -> list[str]:
        return paged_objections(q, pages) + (CAPTURED if is_captured(q) else [])

    def forward_paged(self, q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        with exact_arithmetic(q.device):
            return attend_paged(Problem.of(q, pages.kv_heads, layout, scoring), pages, requests)

    def store_objections(self, new: Writes) -> list[str]:
        return store_objections(new) + (CAPTURED if is_captured(new.k_pages) else [])

    def store(self, new: Writes) -> None:
        write(new)
