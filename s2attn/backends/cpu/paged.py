"""Decode over pages, and storing into them: the records of `src/paged.h` and the calls."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from s2attn.backends.base import Pages, Requests, Scoring, Writes
from s2attn.backends.checks import lse_dtype
from s2attn.backends.cpu.build import kernels
from s2attn.backends.cpu.library import DTYPES, CTensor, finish, tile_bits
from s2attn.layout import Layout

PAGE_DTYPES = {**DTYPES, torch.float8_e4m3fn: 3}


class CTable(ctypes.Structure):
    """`Table` of paged.h."""

    _fields_ = [("data", c_void_p), ("bytes", c_int64), ("stride", c_int64 * 3), ("entries", c_int64)]


class CDecode(ctypes.Structure):
    """`Decode` of paged.h."""

    _fields_ = [
        *((name, c_int64) for name in ("block", "layout_heads", "lines", "k_blocks", "packed")),
        *((name, c_void_p) for name in ("ptr", "full", "tile_ptr", "idx", "tile", "bits")),
        *((name, c_void_p) for name in ("q_start", "q_length", "q_sequence", "k_position")),
        *((name, CTensor) for name in ("q", "k", "v")),
        ("table", CTable),
        *((name, c_void_p) for name in ("lengths", "cu_q", "k_scale", "v_scale", "out", "lse", "sinks")),
        *((name, c_double) for name in ("scale", "softcap")),
        *((name, c_int64) for name in ("sequences", "total", "heads", "kv_heads", "pages")),
        *((name, c_int64) for name in ("page_size", "width", "v_width", "threads")),
    ]


class CStore(ctypes.Structure):
    """`Store` of paged.h; the first tensor is ``from``."""

    _fields_ = [
        *((name, CTensor) for name in ("rows", "pages")),
        ("slots", c_void_p),
        ("slot_bytes", c_int64),
        ("scale", c_void_p),
        *((name, c_int64) for name in ("tokens", "kv_heads", "width", "num_pages", "page_size", "threads")),
    ]


class RowIndex:
    """The rows of a layout as decode reads them; ``fields`` begin a `CDecode`."""

    def __init__(self, layout: Layout):
        rows, spans = layout.rows, layout.q_spans
        kept = [*rows.tensors(), tile_bits(layout.tiles, by_query=True)]
        kept += [spans.start, spans.length, spans.seq, layout.k_spans.pos]
        self._kept = [x.contiguous() for x in kept]
        sizes = layout.block, layout.heads, rows.lines, len(layout.k_spans), int(layout.packed)
        self.fields = (*sizes, *(x.data_ptr() for x in self._kept))


def row_index(layout: Layout) -> RowIndex:
    """The rows of a layout, kept with it; hold them while a kernel reads what their fields point to."""
    return layout.derive(("cpu", "pages"), lambda: RowIndex(layout))


def decode(q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` as of `Backend.forward_paged`."""
    (_, total, heads, width), (num_pages, page_size, kv_heads, v_width) = q.shape, pages.v.shape
    out = q.new_zeros((1, total, heads, v_width))
    lse = q.new_full((1, heads, total), -torch.inf, dtype=lse_dtype(q.dtype))
    sinks = None
    if scoring.sinks is not None:
        sinks = scoring.sinks.contiguous()
        lse.copy_(sinks[:, None])
    lengths = requests.seq_lens.to(torch.int64).contiguous()
    cu = None if requests.cu_seqlens_q is None else requests.cu_seqlens_q.to(torch.int64).contiguous()
    scales = [None if x is None else x.float().contiguous() for x in (pages.k_scale, pages.v_scale)]
    index = row_index(layout)
    call = CDecode(
        *index.fields,
        CTensor.of(q),
        _page_tensor(pages.k),
        _page_tensor(pages.v),
        _table(pages.table),
        *(_address(x) for x in (lengths, cu, *scales, out, lse, sinks)),
        scoring.scale,
        scoring.softcap or 0.0,
        *(requests.batch, total, heads, kv_heads, num_pages, page_size, width, v_width),
        torch.get_num_threads(),
    )
    finish(kernels().library.s2_decode(ctypes.byref(call)))
    return out, lse


def store(new: Writes) -> None:
    """Write new keys and values as of `Backend.store`."""
    slots = new.slots.contiguous()
    num_pages, page_size = new.k_pages.shape[:2]
    for rows, pages, scale in ((new.k, new.k_pages, new.k_scale), (new.v, new.v_pages, new.v_scale)):
        scale = None if scale is None else scale.float().contiguous()
        call = CStore(
            CTensor.of(rows[None]),
            _page_tensor(pages),
            slots.data_ptr(),
            slots.element_size(),
            _address(scale),
            *(*rows.shape, num_pages, page_size, torch.get_num_threads()),
        )
        finish(kernels().library.s2_store(ctypes.byref(call)))


def _page_tensor(x: Tensor) -> CTensor:
    return CTensor(x.data_ptr(), PAGE_DTYPES[x.dtype], x.stride())


def _table(table: Tensor) -> CTable:
    by_head = table.stride(1) if table.shape[1] > 1 else 0
    strides = table.stride(0), by_head, table.stride(2)
    return CTable(table.data_ptr(), table.element_size(), strides, table.shape[2])


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
