"""Launches: tensors, strides and tiles put into the kernels' argument order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import e, log2
from typing import Any

import torch
from torch import Tensor

from s2attn.backends.triton.tiles import Tiles, next_power
from s2attn.backends.triton.walk import Walk


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the device of their tensors, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def widths(q: Tensor, v: Tensor) -> dict[str, Any]:
    dim, dim_v = q.shape[-1], v.shape[-1]
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return {"D": dim, "DV": dim_v, "BLOCK_D": next_power(dim), "BLOCK_DV": next_power(dim_v), "PRECISION": precision}


def forward(q: Tensor, k: Tensor, v: Tensor, walk: Walk, tiles: Tiles, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """Run the forward kernel."""
    from s2attn.kernels.forward import forward_kernel

    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(batch, seqlen, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, seqlen, dtype=torch.float32)
    layout_heads = walk.groups.heads
    subs = tiles.per_block(block)
    grid = (walk.order.numel() * subs * (heads // layout_heads), batch)
    with on_device(q):
        forward_kernel[grid](
            q, k, v, out, lse, *walk.tensors(),
            scale * log2(e), walk.lines, heads, k.shape[2], layout_heads,
            *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *lse.stride()[:2],
            **widths(q, v), BLOCK_M=tiles.line_tokens, BLOCK_N=tiles.listed_tokens, RB=block, F=walk.groups.factor, SUBS=subs,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out, lse


def delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """``sum(dout * out) - dlse``, float32 ``(B, H, T)``."""
    from s2attn.kernels.backward import delta_kernel

    batch, seqlen, heads, dim_v = out.shape
    result = torch.empty_like(lse)
    given = lse if dlse is None else dlse
    rows = 64
    with on_device(out):
        delta_kernel[(-(-seqlen // rows), heads, batch)](
            out, dout, lse, given, result, seqlen,
            *out.stride()[:3], *dout.stride(), *lse.stride()[:2], *given.stride(),
            DV=dim_v, BLOCK_DV=next_power(dim_v), BLOCK_M=rows, HAS_DLSE=dlse is not None, num_warps=4,
        )  # fmt: skip
    return result


def dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, walk: Walk, tiles: Tiles, block: int, scale: float
) -> Tensor:
    """Run the dq kernel."""
    from s2attn.kernels.backward import dq_kernel

    batch, heads, layout_heads = q.shape[0], q.shape[2], walk.groups.heads
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    subs = tiles.per_block(block)
    with on_device(q):
        dq_kernel[(walk.order.numel() * subs * (heads // layout_heads), batch)](
            q, k, v, dout, lse, delta, result, *walk.tensors(),
            scale, scale * log2(e), walk.lines, heads, k.shape[2], layout_heads,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *result.stride()[:3], *lse.stride()[:2],
            **widths(q, v), BLOCK_M=tiles.line_tokens, BLOCK_N=tiles.listed_tokens, RB=block, F=walk.groups.factor, SUBS=subs,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return result


def dkv(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, walk: Walk, tiles: Tiles, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the dk and dv kernel."""
    from s2attn.kernels.backward import dkv_kernel

    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    subs = tiles.per_block(block)
    with on_device(q):
        dkv_kernel[(walk.order.numel() * subs, q.shape[0])](
            q, k, v, dout, lse, delta, dk, dv, *walk.tensors(),
            scale, scale * log2(e), walk.lines, q.shape[2], k.shape[2], walk.groups.heads,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dk.stride()[:3], *dv.stride()[:3], *lse.stride()[:2],
            **widths(q, v), BLOCK_M=tiles.listed_tokens, BLOCK_N=tiles.line_tokens, RB=block, F=walk.groups.factor, SUBS=subs,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return dk, dv
