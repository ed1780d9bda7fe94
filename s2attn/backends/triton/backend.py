"""`Triton`: the kernels behind the common face of backends."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from s2attn.backends.base import Backend, Scoring
from s2attn.backends.checks import plain_objections
from s2attn.backends.triton.tiles import Tiles, choose_tiles
from s2attn.backends.triton.walk import Walk, walk_columns, walk_rows
from s2attn.layout import Layout

WIDEST = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Triton(Backend):
    """Triton kernels on CUDA devices; under ``TRITON_INTERPRET=1`` also on the CPU, for tests."""

    name = "triton"

    def __init__(self) -> None:
        self._walks: WeakKeyDictionary[Layout, dict] = WeakKeyDictionary()

    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        """Every reason why the kernels cannot serve such tensors here."""
        if find_spec("triton") is None:
            return ["triton is not installed; the extra named triton brings it"]
        why = plain_objections(q, k, v)
        if why:
            return why
        if q.dtype not in DTYPES:
            why.append(f"dtype {q.dtype} is not one of float16, bfloat16, float32")
        if max(q.shape[-1], v.shape[-1]) > WIDEST:
            why.append(f"head widths up to {WIDEST}, not {max(q.shape[-1], v.shape[-1])}")
        if _interpreting():
            if q.dtype == torch.bfloat16:
                why.append("Triton's interpreter multiplies bfloat16 wrongly")
        elif not q.is_cuda:
            why.append(f"needs a CUDA device, or TRITON_INTERPRET=1 for tests; the tensors lie on {q.device}")
        else:
            why += _device_objections(torch.cuda.get_device_capability(q.device), q.dtype)
            why += _width_objections(q, v) if not why else []
        return why

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        from s2attn.backends.triton import launch

        tiles = _tiles("forward", q, v, layout.block, scoring.softcap is not None)
        return launch.forward(q, k, v, self._rows(layout, tiles, q.shape[2]), tiles, layout.block, scoring)

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
        from s2attn.backends.triton import launch

        out, lse = out.contiguous(), lse.contiguous()  # as forward made them; the kernels know no other lse
        block, capped = layout.block, scoring.softcap is not None
        for_dq, for_dkv = _tiles("dq", q, v, block, capped), _tiles("dkv", q, v, block, capped)
        rows, columns = self._rows(layout, for_dq, q.shape[2]), self._columns(layout, for_dkv, q.shape[2], k.shape[2])
        delta = launch.delta(out, dout, lse, dlse, rows)
        dq = launch.dq(q, k, v, dout, lse, delta, rows, for_dq, block, scoring)
        dk, dv = launch.dkv(q, k, v, dout, lse, delta, columns, for_dkv, block, scoring)
        return dq, dk, dv

    def _rows(self, layout: Layout, tiles: Tiles, heads: int) -> Walk:
        """The walk of forward and dq, made once for each layout and tile."""
        given = (tiles.factor(layout.block), max(tiles.listed_tokens // layout.block, 1), heads // layout.heads, tiles.key_range)
        known = self._walks.setdefault(layout, {})
        if given not in known:
            known[given] = walk_rows(layout, *given)
        return known[given]

    def _columns(self, layout: Layout, tiles: Tiles, heads: int, kv_heads: int) -> Walk:
        """The walk of dk and dv, made once for each layout and tile."""
        given = (tiles.factor(layout.block), max(tiles.listed_tokens // layout.block, 1), heads, kv_heads)
        known = self._walks.setdefault(layout, {})
        key = ("columns", *given)
        if key not in known:
            known[key] = walk_columns(layout, *given)
        return known[key]


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _device_objections(capability: tuple[int, int], dtype: torch.dtype) -> list[str]:
    if capability < (7, 5):
        return [f"needs compute capability 7.5 or more, not {capability[0]}.{capability[1]}"]
    if dtype == torch.bfloat16 and capability < (8, 0):
        return ["this device has no bfloat16; float16 works"]
    return []


def _width_objections(q: Tensor, v: Tensor) -> list[str]:
    """Head widths of which no tile fits into this device's shared memory."""
    try:
        for op in ("forward", "dq", "dkv"):
            _tiles(op, q, v, 64)
    except ValueError:
        return [f"head widths {q.shape[-1]} and {v.shape[-1]} in {q.dtype} need more shared memory than this device has"]
    return []


def _tiles(op: str, q: Tensor, v: Tensor, block: int, capped: bool = False) -> Tiles:
    limit = _shared_limit(q.device.index or 0) if q.is_cuda else 232448
    return choose_tiles(op, q.shape[-1], v.shape[-1], q.element_size(), block, limit, capped)


@lru_cache(maxsize=64)
def _shared_limit(index: int) -> int:
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(index)["max_shared_mem"]
