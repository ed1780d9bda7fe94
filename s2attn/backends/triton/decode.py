"""Launches of the decode kernels: fixed grids from shapes alone, so that a graph can hold them; no number of the device is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from s2attn.backends.base import Pages, Requests, Scoring
from s2attn.backends.triton.launch import JOINED_ROWS, factors, workspace
from s2attn.backends.triton.start import Call, Starts, on_device, start
from s2attn.backends.triton.tiles import SMALLEST, Tiles, next_power
from s2attn.layout import Layout, dense_pairs
from s2attn.schedule import Cut, RowLengths, choose_cut

EVEN, PACKED, LISTED = range(3)
"""How queries are found: `s2attn.kernels.pieces.queries`."""
NATIVE_FLOAT8 = (8, 9)
"""Compute capability from which NVIDIA's devices convert float8_e4m3fn by themselves."""


MOST_REGISTERS = 255
"""What a thread can have. Asked for by number, it keeps NVIDIA's assembler from spilling a few bytes to fit one more program."""


class Rows:
    """What the kernels read of a layout, and what a host has to know of it; made once for each layout."""

    def __init__(self, layout: Layout) -> None:
        rows = layout.rows
        spans = torch.stack([layout.q_spans.start, layout.q_spans.length, layout.q_spans.seq]) if layout.packed else rows.full
        index = (rows.ptr, rows.full, rows.tile_ptr, rows.idx, rows.tile)
        self.tensors = tuple(t.contiguous() for t in (*index, layout.tiles.view(torch.uint8), layout.k_spans.pos, spans))
        counts = rows.counts * layout.block
        self.lengths = RowLengths(int(counts.max()), float(counts.float().mean())) if counts.numel() else RowLengths(0, 0.0)
        dense = layout.heads * dense_pairs(layout)
        self.density = rows.entries * layout.block**2 / dense if dense else 0.0
        self.starts: Starts = {}


@dataclass(frozen=True)
class Heads:
    """Query heads that share a KV head and a list lie side by side in a tile.

    Attributes:
        members: how many; all heads are ``units`` times so many.
        group: the power of two that holds them.
    """

    units: int
    members: int
    group: int


def share_heads(num_heads: int, num_kv_heads: int, layout_heads: int, most: int) -> Heads:
    """
    >>> share_heads(32, 8, 8, 64), share_heads(6, 2, 6, 64), share_heads(96, 1, 1, 64)
    (Heads(units=8, members=4, group=4), Heads(units=6, members=1, group=1), Heads(units=2, members=48, group=64))
    """
    shared = gcd(num_heads // num_kv_heads, num_heads // layout_heads)
    members = next(n for n in range(min(shared, most), 0, -1) if shared % n == 0)
    return Heads(num_heads // members, members, 1 << (members - 1).bit_length())


@dataclass(frozen=True)
class Grid:
    """Tiles of queries.

    Attributes:
        mode: how a program finds its queries.
        queries: tokens of a tile, a power of two that divides the block.
        rows: of a tile.
        tiles: so many there are at most.
        q_len, per: EVEN: queries and tiles of each sequence; LISTED: per is the number of query blocks.
    """

    mode: int
    queries: int
    rows: int
    tiles: int
    q_len: int
    per: int


def plan_queries(total: int, requests: Requests, layout: Layout, group: int, most: int) -> Grid:
    """The grid for ``total`` queries, from shapes alone; ``most`` rows in a tile."""
    batch, block = requests.batch, layout.block
    mode = LISTED if layout.packed else EVEN if requests.cu_seqlens_q is None else PACKED
    usual = most if requests.batch_invariant else -(-total // batch)
    queries = min(max(1 << (usual - 1).bit_length(), SMALLEST // group), max(most // group, 1), block)
    rows = queries * group
    if mode == LISTED:
        per = len(layout.q_spans)
        return Grid(mode, queries, rows, per * (block // queries), 0, per)
    if mode == EVEN:
        q_len = total // batch
        per = -(-(q_len - 1) // queries) + 1  # the first query may stand at any place of its tile
        return Grid(mode, queries, rows, batch * per, q_len, per)
    return Grid(mode, queries, rows, min(total, total // queries + 2 * batch), 0, 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """A decode call, settled but for its addresses."""

    q: Tensor
    pages: Pages
    requests: Requests
    layout: Layout
    scoring: Scoring
    tiles: Tiles
    heads: Heads
    grid: Grid
    cut: Cut
    rows: Rows

    @property
    def outputs(self) -> int:
        return self.grid.tiles * self.heads.units

    @property
    def slots(self) -> int:
        """States that pieces leave at most."""
        if self.cut.form == "stream":
            return 2 * self.cut.programs
        return self.outputs * self.cut.splits if self.cut.splits > 1 else 0

    @property
    def key(self) -> tuple:
        """All that a launch depends on besides the layout and the addresses."""
        q, pages, requests, scoring = self.q, self.pages, self.requests, self.scoring
        cu = requests.cu_seqlens_q
        pools = [(x.dtype, x.shape, x.stride()) for x in (q, pages.k, pages.v, pages.table)]
        numbers = (requests.seq_lens.dtype, None if cu is None else cu.dtype, scoring.scale, scoring.softcap, scoring.sinks is None)
        return (*pools, *numbers, pages.k_scale is None, pages.v_scale is None, self.tiles, self.grid, self.cut)

    def constants(self) -> dict[str, Any]:
        """Compile-time numbers that all kernels share."""
        block_n = self.tiles.listed_tokens
        return {"BLOCK_N": block_n, "RB": self.layout.block, "MEMBERS": self.heads.members, "MODE": self.grid.mode}

    @property
    def least(self) -> int:
        """Key tiles of a piece at least."""
        return max(self.cut.least // self.tiles.listed_tokens, 1)

    def cuts(self) -> dict[str, Any]:
        """Compile-time numbers of the two kernels that know of pieces."""
        cuts = {"STREAM": self.cut.form == "stream", "SINKS": self.scoring.sinks is not None}
        dim_v = self.pages.v.shape[-1]
        return cuts | {"DV": dim_v, "BLOCK_DV": next_power(dim_v), "BLOCK_M": self.grid.rows, "GROUP": self.heads.group}

    def sizes(self) -> tuple[int, ...]:
        """batch, tokens, room, q_len, per."""
        room = self.pages.table.shape[2] * self.pages.page_size
        return self.requests.batch, self.q.shape[1], room, self.grid.q_len, self.grid.per


def plan_decode(
    q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring, tiles: Tiles, rows: Rows, processors: int
) -> Plan:  # fmt: skip
    """What such a call starts, from shapes and the layout alone."""
    heads = share_heads(q.shape[2], pages.kv_heads, layout.heads, tiles.line_tokens)
    grid = plan_queries(q.shape[1], requests, layout, heads.group, tiles.line_tokens)
    cut = choose_cut(grid.tiles * heads.units, rows.lengths, processors, invariant=requests.batch_invariant, form=tiles.cut)
    return Plan(q, pages, requests, layout, scoring, tiles, heads, grid, cut, rows)


def decode(plan: Plan) -> tuple[Tensor, Tensor]:
    """Run the decode kernels; out ``(1, total, H, Dv)`` and lse ``(1, H, total)``."""
    from s2attn.kernels.decode import decode_kernel, reduce_kernel

    q, pages, requests, rows = plan.q, plan.pages, plan.requests, plan.rows
    out = q.new_empty(*q.shape[:3], pages.v.shape[-1])
    lse = q.new_empty(1, q.shape[2], q.shape[1], dtype=torch.float32)
    if not requests.checked and plan.grid.mode != EVEN:  # there may be queries of no sequence
        out.zero_()
        lse.fill_(-torch.inf)
    parts = workspace(lse, plan.slots * plan.grid.rows, next_power(out.shape[-1]), 1)
    sinks = lse if plan.scoring.sinks is None else plan.scoring.sinks.contiguous()
    lens = requests.seq_lens.contiguous()
    cu = lens if requests.cu_seqlens_q is None else requests.cu_seqlens_q.contiguous()
    pools = [native_float8(x) for x in (pages.k, pages.v)]
    scales = [lse if x is None else x.contiguous() for x in (pages.k_scale, pages.v_scale)]
    with on_device(q):
        ends = _count(plan, lens, cu) if plan.cut.form == "stream" else lens
        pointers = (q, *pools, sinks, out, lse, *parts, *scales, pages.table, lens, cu, ends)
        start(decode_kernel, pointers, rows.starts, ("decode", *plan.key), lambda: _walk_call(plan, out, lse))
        if plan.slots:
            pointers = (*parts, sinks, out, lse, lens, cu, ends)
            start(reduce_kernel, pointers, rows.starts, ("reduce", *plan.key), lambda: _reduce_call(plan, out, lse))
    return out, lse


def _count(plan: Plan, lens: Tensor, cu: Tensor) -> Tensor:
    """Running numbers of key tiles over all outputs, ``(outputs,)`` int64."""
    from s2attn.kernels.decode import count_kernel

    counts = torch.empty(plan.outputs, dtype=torch.int32, device=plan.q.device)

    def describe() -> Call:
        ptr, full, tile_ptr, *_, spans = plan.rows.tensors
        numbers = (*plan.sizes(), plan.layout.rows.lines, plan.q.shape[2], plan.layout.heads)
        constants = plan.constants() | {"QUERIES": plan.grid.queries, "UNITS": 1 << (plan.heads.units - 1).bit_length(), "num_warps": 1}
        return Call((plan.grid.tiles, 1, 1), (ptr, full, tile_ptr, spans, *numbers), constants)

    start(count_kernel, (lens, cu, counts), plan.rows.starts, ("count", *plan.key), describe)
    return counts.cumsum(0)


def _walk_call(plan: Plan, out: Tensor, lse: Tensor) -> Call:
    q, pages, scoring, tiles = plan.q, plan.pages, plan.scoring, plan.tiles
    table = pages.table.stride()
    counts = (*pages.table.shape[2:], pages.k.shape[0], plan.layout.rows.lines, plan.outputs, plan.least)
    heads = (q.shape[2], pages.kv_heads, plan.layout.heads)
    strides = (*q.stride()[1:], *pages.k.stride(), *pages.v.stride(), *out.stride()[1:3], lse.stride(1))
    lines = (table[0], table[1] if pages.table.shape[1] > 1 else 0, table[2])
    rest = (*plan.rows.tensors, *factors(scoring), *plan.sizes(), *counts, *heads, *strides, *lines)
    of_q = {"D": q.shape[-1], "BLOCK_D": next_power(q.shape[-1]), "PAGE": pages.page_size, "CAPPED": scoring.softcap is not None}
    scaled = {"SCALED_K": pages.k_scale is not None, "SCALED_V": pages.v_scale is not None}
    compiler = compiler_options(tiles, torch.version.hip is None)
    grid = (plan.cut.programs, 1, 1) if plan.cut.form == "stream" else (plan.outputs, plan.cut.splits, 1)
    return Call(grid, rest, plan.constants() | plan.cuts() | of_q | scaled | compiler)


def _reduce_call(plan: Plan, out: Tensor, lse: Tensor) -> Call:
    ptr, full, tile_ptr, *_, spans = plan.rows.tensors
    heads = plan.q.shape[2], plan.layout.heads
    cuts = plan.outputs, plan.cut.programs, plan.cut.splits, plan.least
    numbers = (*plan.sizes(), plan.layout.rows.lines, *cuts, *heads, *out.stride()[1:3], lse.stride(1))
    constants = plan.constants() | plan.cuts() | {"ROWS": JOINED_ROWS}
    return Call((plan.outputs, plan.grid.rows // JOINED_ROWS, 1), (ptr, full, tile_ptr, spans, *numbers), constants)


def compiler_options(tiles: Tiles, nvidia: bool) -> dict[str, int]:
    """How the walk is compiled."""
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return options | {"maxnreg": MOST_REGISTERS} if nvidia else options


def native_float8(pages: Tensor) -> Tensor:
    """Pages as a kernel takes them: float8 as bytes where the device cannot convert it."""
    if pages.dtype != torch.float8_e4m3fn or (pages.is_cuda and converts_float8(pages.device.index or 0)):
        return pages
    return pages.view(torch.uint8)


@lru_cache(maxsize=64)
def converts_float8(index: int) -> bool:
    """Whether a CUDA device has instructions for float8_e4m3fn."""
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= NATIVE_FLOAT8
