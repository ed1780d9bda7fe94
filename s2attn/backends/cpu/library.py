"""The C interface of the kernels as ctypes records, and what of a layout they read; `src/api.h` is the other side."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor

from s2attn.backends.cpu.build import kernels
from s2attn.layout import Layout

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CTensor(ctypes.Structure):
    """A tensor of four axes; strides count elements."""

    _fields_ = [("data", c_void_p), ("dtype", c_int64), ("stride", c_int64 * 4)]

    @classmethod
    def of(cls, x: Tensor) -> CTensor:
        return cls(x.data_ptr(), DTYPES[x.dtype], x.stride())


class CIndex(ctypes.Structure):
    """`Index` of api.h."""

    _fields_ = [(name, c_int64) for name in ("block", "heads", "q_blocks", "k_blocks")] + [
        (name, c_void_p)
        for name in (
            *("ptr", "full", "tile_ptr", "idx", "tile"),
            *("q_start", "q_length", "k_start", "k_length"),
            *("bits", "order"),
        )
    ]


class CAttention(ctypes.Structure):
    """`Attention` of api.h."""

    _fields_ = [
        ("index", POINTER(CIndex)),
        *((name, CTensor) for name in ("q", "k", "v", "out")),
        *((name, c_void_p) for name in ("lse", "sinks")),
        *((name, c_double) for name in ("scale", "softcap")),
        *(
            (name, c_int64)
            for name in (
                "batch",
                "heads",
                "kv_heads",
                "seqlen_q",
                "seqlen_k",
                "width",
                "v_width",
                "threads",
            )
        ),
    ]


class LayoutIndex:
    """A layout as the kernels read it: pointers to its tensors, mask tiles as bits, and the order of its rows.

    Attributes:
        record: what a call points to.
        covers_queries: every query of the layout stands in some query block.
    """

    def __init__(self, layout: Layout):
        rows = layout.rows
        kept = [
            *rows.tensors(),
            layout.q_spans.start,
            layout.q_spans.length,
            layout.k_spans.start,
            layout.k_spans.length,
        ]
        self._kept = [x.contiguous() for x in kept]
        self._kept += [pack_tiles(layout.tiles), longest_first(rows.counts)]
        pointers = (x.data_ptr() for x in self._kept)
        self.record = CIndex(layout.block, layout.heads, rows.lines, len(layout.k_spans), *pointers)
        self.covers_queries = layout.q_spans.total == layout.seqlen_q


def layout_index(layout: Layout) -> LayoutIndex:
    """The index of a layout, made on first use and kept as long as the layout lives."""
    made = layout.__dict__.get("_cpu_index")
    if made is None:
        made = layout.__dict__["_cpu_index"] = LayoutIndex(layout)
    return made


def pack_tiles(tiles: Tensor) -> Tensor:
    """Mask tiles ``(n, block, block)`` bool as ``(n, block, words)`` int64: bit q of row k says whether query q sees key k."""
    count, block = tiles.shape[:2]
    bits = torch.empty(count, block, -(-block // 64), dtype=torch.int64)
    kernels().library.s2_pack_tiles(
        c_void_p(tiles.contiguous().data_ptr()),
        c_int64(count),
        c_int64(block),
        c_void_p(bits.data_ptr()),
    )
    return bits


def longest_first(counts: Tensor) -> Tensor:
    """Numbers ``head * lines + line`` of all lines, ``(heads * lines,)`` int32, the longest lists first."""
    return torch.from_numpy(np.argsort(-counts.reshape(-1).numpy(), kind="stable").astype(np.int32))
