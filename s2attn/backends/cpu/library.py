"""The C interface: ctypes records that mirror `src/api.h`, and layouts as the kernels read them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int64, c_void_p

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


class CColumns(ctypes.Structure):
    """`Columns` of api.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("ptr", "full", "tile_ptr", "idx", "tile")),
        *((name, c_void_p) for name in ("bits", "rank")),
    ]


class CGradients(ctypes.Structure):
    """`Gradients` of api.h."""

    _fields_ = [
        ("columns", POINTER(CColumns)),
        ("dout", CTensor),
        ("dlse", c_void_p),
        ("dq", c_void_p),
        ("dk", CTensor),
        ("dv", CTensor),
    ]


class CMass(ctypes.Structure):
    """`Mass` of api.h."""

    _fields_ = [
        ("q", CTensor),
        ("k", CTensor),
        ("out", c_void_p),
        ("scale", c_double),
        ("softcap", c_double),
        *((name, c_int64) for name in ("stride", "block", "causal", "reach")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads")),
        *((name, c_int64) for name in ("seqlen_q", "seqlen_k", "width")),
        ("threads", c_int64),
    ]


class LayoutIndex:
    """A layout as the kernels read it: its tensors, mask tiles as bits, and the order of rows.

    Attributes:
        record: what a call points to.
        covers_queries: every query of the layout stands in some query block.
    """

    def __init__(self, layout: Layout):
        rows = layout.rows
        spans = layout.q_spans, layout.k_spans
        kept = [*rows.tensors(), *(x for span in spans for x in (span.start, span.length))]
        self._kept = [x.contiguous() for x in kept]
        self._kept += [tile_bits(layout.tiles, by_query=False), _densest_first(rows.counts)]
        pointers = (x.data_ptr() for x in self._kept)
        self.record = CIndex(layout.block, layout.heads, rows.lines, len(layout.k_spans), *pointers)
        self.covers_queries = layout.q_spans.total == layout.seqlen_q
        self._columns: LayoutColumns | None = None

    def columns(self, layout: Layout) -> LayoutColumns:
        """The columns of the layout, made on first use."""
        if self._columns is None:
            self._columns = LayoutColumns(layout, self.record)
        return self._columns


class LayoutColumns:
    """The columns of a layout as the kernels read them; ``record`` is what a call points to."""

    def __init__(self, layout: Layout, index: CIndex):
        self._kept = [x.contiguous() for x in layout.columns.tensors()]
        rank = torch.empty(layout.columns.idx.numel(), dtype=torch.int32)
        self._kept += [tile_bits(layout.tiles, by_query=True), rank]
        self.record = CColumns(*(x.data_ptr() for x in self._kept))
        rank_entries = kernels().library.s2_rank_entries
        records = ctypes.byref(index), ctypes.byref(self.record)
        finish(rank_entries(*records, c_void_p(rank.data_ptr())))


def layout_index(layout: Layout) -> LayoutIndex:
    """The index of a layout, made on first use and kept as long as the layout lives."""
    made = layout.__dict__.get("_cpu_index")
    if made is None:
        made = layout.__dict__["_cpu_index"] = LayoutIndex(layout)
    return made


def finish(status: int) -> None:
    """Raise what a kernel's status says."""
    if status:
        raise MemoryError("the cpu backend ran out of memory")


def tile_bits(tiles: Tensor, *, by_query: bool) -> Tensor:
    """Mask tiles ``(n, block, block)`` bool as bits ``(n, block, words)`` int64.

    Bit q of row k says whether query q sees key k; with ``by_query`` bit k of row q.
    """
    count, block = tiles.shape[:2]
    bits = torch.empty(count, block, -(-block // 64), dtype=torch.int64)
    tiles = tiles.contiguous()
    sizes = c_int64(count), c_int64(block), c_int64(by_query)
    pack = kernels().library.s2_pack_tiles
    pack(c_void_p(tiles.data_ptr()), *sizes, c_void_p(bits.data_ptr()))
    return bits


def _densest_first(counts: Tensor) -> Tensor:
    """Layout heads as int32, those with the most entries first."""
    return torch.argsort(counts.sum(1), descending=True, stable=True).int()


def record_sizes() -> dict[str, tuple[int, int]]:
    """Bytes of each record here and in the library, which must agree."""
    records = (CTensor, CIndex, CColumns, CAttention, CGradients, CMass)
    size_of = kernels().library.s2_record_size
    theirs = [size_of(c_int64(number)) for number in range(len(records))]
    pairs = zip(records, theirs, strict=True)
    return {kind.__name__: (ctypes.sizeof(kind), size) for kind, size in pairs}
