"""Joining what the pieces of one item have left in the workspace, in the order of their entries."""

import triton
import triton.language as tl

from s2attn.kernels.pieces.address import store_rows
from s2attn.kernels.pieces.scores import LOG2E
from s2attn.kernels.pieces.softmax import rescaled, sink_logit, softmax_begin, softmax_end
from s2attn.kernels.pieces.work import slot_rows


@triton.jit
def which_rows(splits_ptr, lines, shared, SUBS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """This program's split item: layout head, line, member, first slot and the one after the last, tile, and first row in the tile."""
    program = tl.program_id(0)
    part = program % (TILE // ROWS) * ROWS
    program = program // (TILE // ROWS)
    at = splits_ptr + program // (SUBS * shared) * 3
    item = tl.load(at)
    return item // lines, item % lines, program % shared, tl.load(at + 1), tl.load(at + 2), program // shared % SUBS, part


@triton.jit(do_not_specialize=["slots", "lines", "num_heads", "layout_heads", "lse_batch", "lse_head"])
def merge_kernel(
    slot_out_ptr, slot_lse_ptr, sinks_ptr, out_ptr, lse_ptr, splits_ptr, line_start_ptr, line_length_ptr,
    slots: tl.int32, lines: tl.int32, num_heads: tl.int32, layout_heads: tl.int32,
    out_batch: tl.int64, out_token: tl.int64, out_head: tl.int64, lse_batch: tl.int64, lse_head: tl.int64,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Partial outputs and their lse into the output and its lse.

    Grid ``(splits * SUBS * heads per layout head * TILE / ROWS, batch)``.
    """
    shared = num_heads // layout_heads
    layout_head, line, member, slot, last, tile, part = which_rows(splits_ptr, lines, shared, SUBS, TILE, ROWS)
    batch, head = tl.program_id(1).to(tl.int64), (layout_head * shared + member).to(tl.int64)
    lane, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    m_i, l_i = softmax_begin(sink_logit(sinks_ptr, head, True, SINKS), ROWS)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for number in range(slot, last):
        first = slot_rows(batch, slots, number, shared, member, tile, SUBS, TILE) + part
        lse = tl.load(slot_lse_ptr + first + lane) * LOG2E
        m_i, shift, keep = rescaled(m_i, lse)
        weight = tl.exp2(lse - shift)
        l_i = l_i * keep + weight
        acc = acc * keep[:, None] + tl.load(slot_out_ptr + (first + lane)[:, None] * BLOCK_DV + d[None, :]) * weight[:, None]
    out, lse = softmax_end(acc, m_i, l_i)
    place = tile * TILE + part + lane
    row = tl.load(line_start_ptr + line).to(tl.int64)
    exists = place < tl.load(line_length_ptr + line)
    store_rows(out_ptr + batch * out_batch + head * out_head, row, place, exists, out_token, out, BLOCK_DV, DV)
    tl.store(lse_ptr + batch * lse_batch + head * lse_head + row + place, lse, mask=exists)


@triton.jit(do_not_specialize=["slots", "lines", "num_heads", "layout_heads"])
def sum_kernel(
    slot_ptr, out_ptr, splits_ptr, line_start_ptr, line_length_ptr,
    factor, slots: tl.int32, lines: tl.int32, num_heads: tl.int32, layout_heads: tl.int32,
    out_batch: tl.int64, out_token: tl.int64, out_head: tl.int64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """``factor`` times the sum of partial gradients; the grid of `merge_kernel`."""
    shared = num_heads // layout_heads
    layout_head, line, member, slot, last, tile, part = which_rows(splits_ptr, lines, shared, SUBS, TILE, ROWS)
    batch, head = tl.program_id(1).to(tl.int64), (layout_head * shared + member).to(tl.int64)
    lane, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for number in range(slot, last):
        first = slot_rows(batch, slots, number, shared, member, tile, SUBS, TILE) + part
        total += tl.load(slot_ptr + (first + lane)[:, None] * BLOCK_D + d[None, :])
    place = tile * TILE + part + lane
    row = tl.load(line_start_ptr + line).to(tl.int64)
    exists = place < tl.load(line_length_ptr + line)
    store_rows(out_ptr + batch * out_batch + head * out_head, row, place, exists, out_token, total * factor, BLOCK_D, D)
