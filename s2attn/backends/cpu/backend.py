"""`Cpu`: C++ kernels over the listed blocks, built with the machine's compiler on first use."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from s2attn.backends.base import Backend, Pages, Reduction, Requests, Scoring, Writes
from s2attn.backends.checks import paged_objections, plain_objections, store_objections
from s2attn.backends.cpu import paged
from s2attn.backends.cpu.build import kernels, unavailable
from s2attn.backends.cpu.library import (
    CAttention,
    CGradients,
    CMass,
    CTensor,
    LayoutIndex,
    finish,
    layout_index,
)
from s2attn.layout import Layout


class Cpu(Backend):
    """Exact attention on a CPU: float32, bfloat16 or float16 tensors of any strides, float32 sums.

    Work is proportional to the listed blocks. Both directions give the same bits every time, for
    any number of threads and whatever else is in the batch. A key that a query does not see never
    reaches its result, not even when it holds NaN; a query that sees a key or value holding NaN
    gets NaN, and adds nothing to the gradients of keys and values.
    """

    name = "cpu"
    by_position = True

    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        if q.device.type != "cpu":
            return [f"q is on {q.device}, not on a CPU"]
        why = plain_objections(q, k, v)
        if q.dtype == torch.float64:
            why.append("q has dtype torch.float64, and sums are float32")
        return why or _built()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor]:
        index = layout_index(layout)
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        if not index.covers_queries:
            out.zero_()
            lse.fill_(-torch.inf) if scoring.sinks is None else lse.copy_(scoring.sinks[:, None])
        sinks = None if scoring.sinks is None else scoring.sinks.contiguous()
        call = _call(q, k, v, out, lse, index, scoring, sinks)
        finish(kernels().library.s2_forward(ctypes.byref(call)))
        return out, lse

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: Layout,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        index = layout_index(layout)
        dq = torch.zeros(q.shape, dtype=torch.float32)
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        call = _call(q, k, v, out, lse, index, scoring, None)
        gradients = CGradients(
            ctypes.pointer(index.columns(layout).record),
            CTensor.of(dout),
            None if dlse is None else dlse.data_ptr(),
            dq.data_ptr(),
            CTensor.of(dk),
            CTensor.of(dv),
        )
        finish(kernels().library.s2_backward(ctypes.byref(call), ctypes.byref(gradients)))
        return dq.to(q.dtype), dk, dv

    def paged_objections(self, q: Tensor, pages: Pages) -> list[str]:
        return self.objections(q, q, q) or paged_objections(q, pages)

    def forward_paged(
        self,
        q: Tensor,
        pages: Pages,
        requests: Requests,
        layout: Layout,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor]:
        return paged.decode(q, pages, requests, layout, scoring)

    def store_objections(self, new: Writes) -> list[str]:
        return self.objections(new.k, new.k, new.v) or store_objections(new)

    def store(self, new: Writes) -> None:
        paged.store(new)

    def mass_objections(self, q: Tensor, k: Tensor) -> list[str]:
        return self.objections(q, k, k)

    def antidiagonal(self, q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
        (batch, seqlen_q, heads, width), (_, seqlen_k, kv_heads, _) = q.shape, k.shape
        blocks = -(-seqlen_q // reduction.block), -(-seqlen_k // reduction.block)
        out = torch.zeros((batch, heads, *blocks), dtype=torch.float32)
        call = CMass(
            CTensor.of(q),
            CTensor.of(k),
            out.data_ptr(),
            reduction.scale,
            reduction.softcap or 0.0,
            *(reduction.stride, reduction.block, reduction.causal),
            reduction.reach(seqlen_q, seqlen_k),
            *(batch, heads, kv_heads, seqlen_q, seqlen_k, width),
            torch.get_num_threads(),
        )
        finish(kernels().library.s2_antidiagonal(ctypes.byref(call)))
        return out


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: LayoutIndex,
    scoring: Scoring,
    sinks: Tensor | None,
) -> CAttention:
    (batch, seqlen_q, heads, width), (_, seqlen_k, kv_heads, v_width) = q.shape, v.shape
    return CAttention(
        ctypes.pointer(index.record),
        *(CTensor.of(x) for x in (q, k, v, out)),
        lse.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        scoring.scale,
        scoring.softcap or 0.0,
        *(batch, heads, kv_heads, seqlen_q, seqlen_k, width, v_width),
        torch.get_num_threads(),
    )


def _built() -> list[str]:
    reason = unavailable()
    return [] if reason is None else [reason]
