"""Launches: tensors, strides and tiles put into the kernels' argument order."""

from __future__ import annotations

from math import e, log2
from typing import Any

import torch
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.triton.start import Call, Starts, on_device, start
from s2attn.backends.triton.tiles import Tiles, next_power
from s2attn.backends.triton.walk import Walk

JOINED_ROWS = 16
"""Rows of a tile that one program joins."""
DELTA_ROWS = 64
"""Rows of which one program computes delta."""


def forward(q: Tensor, k: Tensor, v: Tensor, walk: Walk, tiles: Tiles, block: int, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Run the forward kernel, and join the lists that were cut."""
    from s2attn.kernels.forward import forward_kernel
    from s2attn.kernels.join import merge_kernel

    batch, seqlen, heads, _ = q.shape
    out = q.new_empty(batch, seqlen, heads, v.shape[-1])
    lse = q.new_empty(batch, heads, seqlen, dtype=torch.float32)
    shared, subs, rows = heads // walk.groups.heads, tiles.per_block(block), tiles.line_tokens
    parts = workspace(lse, batch * walk.slots * shared * subs * rows, next_power(v.shape[-1]), 1)
    sinks = lse if scoring.sinks is None else scoring.sinks.contiguous()
    key = _key(q, k, v, tiles, scoring)

    def attend() -> Call:
        numbers = (*factors(scoring), walk.slots, walk.lines, heads, k.shape[2], walk.groups.heads)
        strides = (*q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *lse.stride()[:2])
        constants = _constants(q, v, walk, tiles, block, scoring) | {"BLOCK_M": rows, "BLOCK_N": tiles.listed_tokens}
        constants["SINKS"] = scoring.sinks is not None
        return Call((walk.pieces.shape[0] * subs * shared, batch, 1), (*walk.tensors, *numbers, *strides), constants)

    def join() -> Call:
        numbers = (walk.slots, walk.lines, heads, walk.groups.heads, *out.stride()[:3], *lse.stride()[:2])
        constants = {"DV": v.shape[-1], "BLOCK_DV": next_power(v.shape[-1]), "TILE": rows, "ROWS": JOINED_ROWS, "SUBS": subs}
        constants["SINKS"] = scoring.sinks is not None
        programs = walk.splits.shape[0] * subs * shared * rows // JOINED_ROWS
        return Call((programs, batch, 1), (walk.splits, walk.line_start, walk.line_length, *numbers), constants)

    with on_device(q):
        start(forward_kernel, (q, k, v, sinks, out, lse, *parts), walk.starts, ("forward", *key), attend)
        if walk.slots or q.is_meta:
            start(merge_kernel, (*parts, sinks, out, lse), walk.starts, ("merge", *key), join)
    return out, lse


def delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, starts: Starts) -> Tensor:
    """``sum(dout * out) - dlse``, float32 ``(B, H, T)``."""
    from s2attn.kernels.backward import delta_kernel

    batch, seqlen, heads, dim_v = out.shape
    result = torch.empty_like(lse)
    given = lse if dlse is None else dlse

    def describe() -> Call:
        strides = (*out.stride()[:3], *dout.stride(), *lse.stride()[:2], *given.stride())
        constants = {"DV": dim_v, "BLOCK_DV": next_power(dim_v), "BLOCK_M": DELTA_ROWS, "HAS_DLSE": dlse is not None, "num_warps": 4}
        return Call((-(-seqlen // DELTA_ROWS), heads, batch), (seqlen, *strides), constants)

    key = ("delta", out.dtype, out.shape, out.stride(), dout.stride(), lse.stride(), given.stride(), dlse is not None)
    with on_device(out):
        start(delta_kernel, (out, dout, lse, given, result), starts, key, describe)
    return result


def dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, walk: Walk, tiles: Tiles, block: int, scoring: Scoring
) -> Tensor:
    """Run the dq kernel, and join the lists that were cut."""
    from s2attn.kernels.backward import dq_kernel

    batch, heads, layout_heads = q.shape[0], q.shape[2], walk.groups.heads
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shared, subs = heads // layout_heads, tiles.per_block(block)
    parts = workspace(lse, batch * walk.slots * shared * subs * tiles.line_tokens, next_power(q.shape[-1]))
    key = ("dq", *_key(q, k, v, tiles, scoring), dout.stride())

    def describe() -> Call:
        numbers = (scoring.scale, *factors(scoring), walk.slots, walk.lines, heads, k.shape[2], layout_heads)
        strides = (*q.stride(), *k.stride(), *v.stride(), *dout.stride(), *result.stride()[:3], *lse.stride()[:2])
        constants = _constants(q, v, walk, tiles, block, scoring) | {"BLOCK_M": tiles.line_tokens, "BLOCK_N": tiles.listed_tokens}
        return Call((walk.pieces.shape[0] * subs * shared, batch, 1), (*walk.tensors, *numbers, *strides), constants)

    with on_device(q):
        start(dq_kernel, (q, k, v, dout, lse, delta, result, *parts), walk.starts, key, describe)
        join_slots(parts[0], result, walk, tiles.line_tokens, subs, heads, layout_heads, scoring.scale)
    return result


def dkv(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, walk: Walk, tiles: Tiles, block: int, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Run the dk and dv kernel, and join the lists that were cut."""
    from s2attn.kernels.backward import dkv_kernel

    batch, kv_heads, subs = q.shape[0], k.shape[2], tiles.per_block(block)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    parts = workspace(lse, batch * walk.slots * subs * tiles.line_tokens, next_power(q.shape[-1]), next_power(v.shape[-1]))
    key = ("dkv", *_key(q, k, v, tiles, scoring), dout.stride())

    def describe() -> Call:
        numbers = (scoring.scale, *factors(scoring), walk.slots, walk.lines, q.shape[2], kv_heads, walk.groups.heads)
        inputs = (*q.stride(), *k.stride(), *v.stride(), *dout.stride())
        outputs = (*dk.stride()[:3], *dv.stride()[:3], *lse.stride()[:2])
        constants = _constants(q, v, walk, tiles, block, scoring) | {"BLOCK_M": tiles.listed_tokens, "BLOCK_N": tiles.line_tokens}
        return Call((walk.pieces.shape[0] * subs, batch, 1), (*walk.tensors, *numbers, *inputs, *outputs), constants)

    with on_device(q):
        start(dkv_kernel, (q, k, v, dout, lse, delta, dk, dv, *parts), walk.starts, key, describe)
        join_slots(parts[0], dk, walk, tiles.line_tokens, subs, kv_heads, kv_heads, scoring.scale)
        join_slots(parts[1], dv, walk, tiles.line_tokens, subs, kv_heads, kv_heads, 1.0)
    return dk, dv


def join_slots(part: Tensor, result: Tensor, walk: Walk, tile: int, subs: int, heads: int, item_heads: int, factor: float) -> None:
    """Sum the slots of every item that was cut into ``result``; ``tile`` rows in a tile, ``subs`` tiles in a line."""
    from s2attn.kernels.join import sum_kernel

    if not walk.slots and not part.is_meta:
        return

    def describe() -> Call:
        programs = walk.splits.shape[0] * subs * (heads // item_heads) * tile // JOINED_ROWS
        numbers = (factor, walk.slots, walk.lines, heads, item_heads, *result.stride()[:3])
        dim = result.shape[-1]
        constants = {"D": dim, "BLOCK_D": next_power(dim), "TILE": tile, "ROWS": JOINED_ROWS, "SUBS": subs}
        return Call((programs, result.shape[0], 1), (walk.splits, walk.line_start, walk.line_length, *numbers), constants)

    key = ("sum", result.dtype, result.shape, heads, item_heads, factor, tile, subs)
    start(sum_kernel, (part, result), walk.starts, key, describe)


def _key(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scoring: Scoring) -> tuple:
    """All that a call depends on besides the layout and the addresses."""
    strides = (q.stride(), k.stride(), v.stride())
    return q.dtype, q.shape, k.shape, v.shape[-1], strides, tiles, scoring.scale, scoring.softcap, scoring.sinks is None


def workspace(like: Tensor, rows: int, *widths: int) -> list[Tensor]:
    """float32 rows for the pieces of cut lists; where nothing is cut, any float32 tensor stands in for what is not touched."""
    return [like.new_empty(rows * width) for width in widths] if rows else [like] * len(widths)


def factors(scoring: Scoring) -> tuple[float, float]:
    """``factor`` and ``cap_log2`` of `s2attn.kernels.pieces.scores.log2_logits`."""
    if scoring.softcap is None:
        return scoring.scale * log2(e), 1.0
    return scoring.scale / scoring.softcap, scoring.softcap * log2(e)


def _constants(q: Tensor, v: Tensor, walk: Walk, tiles: Tiles, block: int, scoring: Scoring) -> dict[str, Any]:
    """Compile-time numbers of the three large kernels, but for the tile's own."""
    dim, dim_v = q.shape[-1], v.shape[-1]
    return {
        "D": dim, "DV": dim_v, "BLOCK_D": next_power(dim), "BLOCK_DV": next_power(dim_v), "RB": block, "F": walk.groups.factor,
        "SUBS": tiles.per_block(block), "CAPPED": scoring.softcap is not None,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip
