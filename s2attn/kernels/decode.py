"""Attention of a few queries per sequence over keys in pages: lists cut on the device, in two kernels without locks or atomics.

An *output* is a query tile of a sequence and a unit of heads: the query heads that share a KV head and a list, which lie side by side in
the rows of the tile, so that K and V are read once for all of them. Its *key tiles* are those of the row of the layout at the queries'
position. `decode_kernel` cuts every output by itself into pieces, `stream_kernel` gives every program the same number of key tiles; both
write a whole output straight to the result and leave a state for any other piece, which `reduce_kernel` joins in a fixed order.
"""

import triton
import triton.language as tl

from s2attn.kernels.pieces.masks import allowed_pairs
from s2attn.kernels.pieces.pages import find_pages, from_float8, load_paged
from s2attn.kernels.pieces.queries import LISTED, find_queries
from s2attn.kernels.pieces.ranges import cut, find_output, program_of, range_begin
from s2attn.kernels.pieces.scores import LOG2E, log2_logits
from s2attn.kernels.pieces.softmax import rescaled, sink_logit, softmax_begin, softmax_end, softmax_step
from s2attn.kernels.pieces.work import store_slot

SIZES = ["batch", "tokens", "room", "q_len", "per", "max_pages", "num_pages", "lines", "outputs", "splits", "least", "lse_head"]
SIZES += ["table_sequence", "table_head"]
"""Numbers that change from call to call: one compilation serves them all."""


@triton.jit
def find_row(lists, layout_head, row, lines, RB: tl.constexpr, BLOCK_N: tl.constexpr):
    """A row of the layout: its first entry and first code, entries in its full part and in all, key tiles of that part and in all."""
    ptr_ptr, full_ptr, code_at_ptr = lists
    there = (row >= 0) & (row < lines)
    row = tl.where(there, row, 0)
    begin = tl.load(ptr_ptr + layout_head.to(tl.int64) * (lines + 1) + row)
    end = tl.load(ptr_ptr + layout_head.to(tl.int64) * (lines + 1) + row + 1)
    entries = tl.where(there, end - begin, 0).to(tl.int32)
    full = tl.where(there, tl.load(full_ptr + layout_head.to(tl.int64) * lines + row), 0)
    codes = tl.load(code_at_ptr + layout_head.to(tl.int64) * lines + row)
    full_tiles = (full * RB + BLOCK_N - 1) // BLOCK_N
    return begin, codes, full, entries, full_tiles, full_tiles + ((entries - full) * RB + BLOCK_N - 1) // BLOCK_N


@triton.jit
def masked_softmax_step(acc, m_i, l_i, scores_log2, allowed, v_tile):
    """`softmax_step` for a tile in which rows see different keys.

    A weight of 0 does not keep a value of NaN or infinity out of a product, so such values are
    replaced by 0, and the rows that see them get NaN.

    Args:
        scores_log2: -inf where a pair is not allowed.
        allowed: whether each row sees each key.
    """
    v_tile, broken = finite_rows(v_tile)  # [BLOCK_N, BLOCK_DV], [BLOCK_N]
    m_i, shift, keep = rescaled(m_i, tl.max(scores_log2, 1))  # [BLOCK_M]
    p = tl.exp2(scores_log2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
    l_i = l_i * keep + tl.sum(p, 1)  # [BLOCK_M]
    p = tl.where(allowed & broken[None, :], float("nan"), p)  # [BLOCK_M, BLOCK_N]
    acc = acc * keep[:, None]  # [BLOCK_M, BLOCK_DV]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return acc, m_i, l_i


@triton.jit
def finite_rows(tile):
    """A tile with 0 for NaN and infinity, and which of its rows had one."""
    finite = tl.abs(tile) < float("inf")
    broken = tl.max((~finite).to(tl.int32), 1) > 0
    return tl.where(finite, tile, tl.zeros_like(tile)), broken


@triton.jit
def fold(
    acc, m_i, l_i, q_tile, place, asks, keys, values, table, listed, codes_ptr, tiles_ptr, first, last, entries, limit, factor, cap_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    RB: tl.constexpr, PAGE: tl.constexpr, MODE: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold key tiles ``first .. last - 1`` of one part of a row into the running softmax; MASKED looks each pair up in its mask tile."""
    idx_ptr, key_pos_ptr = listed
    ONE: tl.constexpr = RB % BLOCK_N == 0 and PAGE % BLOCK_N == 0
    lane = tl.arange(0, BLOCK_N)
    for number in range(first, last):
        if RB >= BLOCK_N:
            entry, skipped = number * BLOCK_N // RB, number * BLOCK_N % RB
            known, inside = lane >= 0, skipped + lane
            block = tl.load(idx_ptr + entry)
        else:
            entry, inside = (number * BLOCK_N + lane) // RB, (number * BLOCK_N + lane) % RB
            known, skipped = entry < entries, 0
            block = tl.load(idx_ptr + entry, mask=known, other=0)
        if MODE == LISTED:
            start = tl.load(key_pos_ptr + block)
        else:
            start = block * RB
        key = start + inside
        exists = known & (key < limit)
        if MASKED:
            allowed = allowed_pairs(codes_ptr, tiles_ptr, entry, inside, place, exists, 1, RB, BLOCK_N, False) & asks[:, None]
            exists = tl.max(allowed.to(tl.int32), 0) > 0  # what nobody sees is not read: its page may be gone
        else:
            allowed = exists[None, :]
        page, slot, exists = find_pages(table, start + skipped, key, exists, PAGE, BLOCK_N, ONE)
        k_tile = from_float8(load_paged(keys, page, slot, exists, BLOCK_D, D), q_tile)
        v_tile = from_float8(load_paged(values, page, slot, exists, BLOCK_DV, DV), q_tile)
        scores = log2_logits(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), factor, cap_log2, CAPPED)
        allowed = allowed & exists[None, :]  # [BLOCK_M, BLOCK_N], or [1, BLOCK_N] where rows agree
        scores = tl.where(allowed, scores, float("-inf"))  # [BLOCK_M, BLOCK_N]
        if MASKED:
            acc, m_i, l_i = masked_softmax_step(acc, m_i, l_i, scores, allowed, v_tile)
        else:
            acc, m_i, l_i = softmax_step(acc, m_i, l_i, scores, v_tile)
    return acc, m_i, l_i


@triton.jit
def row_heads(unit, token, count, GROUP: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query token and head of each row of a tile, GROUP rows per query, MEMBERS of them heads; whether it asks; its query's number."""
    lane = tl.arange(0, BLOCK_M)
    query, member = lane // GROUP, lane % GROUP
    asks = (query < count) & (member < MEMBERS)
    return tl.where(asks, token + query, 0).to(tl.int64), unit * MEMBERS + tl.minimum(member, MEMBERS - 1), asks, query


@triton.jit
def store_result(results, strides, token, head, asks, out, lse, BLOCK_DV: tl.constexpr, DV: tl.constexpr):
    """Write the rows of a tile to the output and its lse."""
    out_ptr, lse_ptr = results
    out_token, out_head, lse_head = strides
    d = tl.arange(0, BLOCK_DV)
    pointers = out_ptr + (token * out_token + head.to(tl.int64) * out_head)[:, None] + d[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=asks[:, None] & (d[None, :] < DV))
    tl.store(lse_ptr + head.to(tl.int64) * lse_head + token, lse, mask=asks)


@triton.jit
def attend_piece(
    found, unit, low, high, whole, slot, memory, strides, results, sinks_ptr, scales, table, lists, listed, masks, sizes, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RB: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, MODE: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, SCALED_K: tl.constexpr, SCALED_V: tl.constexpr,
):  # fmt: skip
    """Key tiles ``low .. high - 1`` of an output: to the result if they are all that it has, else to a slot of the workspace."""
    sequence, token, count, row, place, limit = found
    q_ptr, k_ptr, v_ptr, slot_out_ptr, slot_lse_ptr = memory
    q_strides, k_strides, v_strides, out_strides = strides
    lines, max_pages, num_pages, num_heads, num_kv_heads, layout_heads = sizes
    factor, cap_log2 = numbers
    kv_head = unit * MEMBERS // (num_heads // num_kv_heads)
    begin, codes, full, entries, full_tiles, _ = find_row(lists, unit * MEMBERS // (num_heads // layout_heads), row, lines, RB, BLOCK_N)
    tokens, head, asks, query = row_heads(unit, token, count, GROUP, MEMBERS, BLOCK_M)
    q_token, q_head, q_dim = q_strides
    d = tl.arange(0, BLOCK_D)
    pointers = q_ptr + (tokens * q_token + head.to(tl.int64) * q_head)[:, None] + (d * q_dim)[None, :]
    q_tile = tl.load(pointers, mask=asks[:, None] & (d[None, :] < D), other=0.0)
    if SCALED_K:
        factor = factor * tl.load(scales[0] + kv_head)

    table_ptr, table_sequence, table_head, table_entry = table
    line = table_ptr + sequence.to(tl.int64) * table_sequence + kv_head.to(tl.int64) * table_head, table_entry, max_pages, num_pages
    keys = k_ptr + kv_head.to(tl.int64) * k_strides[2], k_strides[0], k_strides[1], k_strides[3]
    values = v_ptr + kv_head.to(tl.int64) * v_strides[2], v_strides[0], v_strides[1], v_strides[3]
    codes_ptr, tiles_ptr = masks
    idx_ptr, key_pos_ptr = listed
    places = tl.minimum(place + query, RB - 1)
    m_i, l_i = softmax_begin(sink_logit(sinks_ptr, head, whole, SINKS), BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc, m_i, l_i = fold(
        acc, m_i, l_i, q_tile, places, asks, keys, values, line, (idx_ptr + begin, key_pos_ptr), codes_ptr + codes, tiles_ptr,
        low, tl.minimum(high, full_tiles), full, limit, factor, cap_log2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, RB, PAGE, MODE, CAPPED, False,
    )  # fmt: skip
    acc, m_i, l_i = fold(
        acc, m_i, l_i, q_tile, places, asks, keys, values, line, (idx_ptr + begin + full, key_pos_ptr), codes_ptr + codes, tiles_ptr,
        tl.maximum(low - full_tiles, 0), tl.maximum(high - full_tiles, 0), entries - full, limit, factor, cap_log2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, RB, PAGE, MODE, CAPPED, True,
    )  # fmt: skip
    out, lse = softmax_end(acc, m_i, l_i)
    if SCALED_V:
        out = out * tl.load(scales[1] + kv_head)
    if whole:
        store_result(results, out_strides, tokens, head, asks, out, lse, BLOCK_DV, DV)
    else:
        first = slot.to(tl.int64) * BLOCK_M
        store_slot(slot_out_ptr, first, out, True, BLOCK_M, BLOCK_DV)
        tl.store(slot_lse_ptr + first + tl.arange(0, BLOCK_M), lse)


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, lse_ptr, slot_out_ptr, slot_lse_ptr, k_scale_ptr, v_scale_ptr,
    table_ptr, lens_ptr, cu_ptr, ends_ptr,
    ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr, key_pos_ptr, spans_ptr,
    factor, cap_log2, batch: tl.int32, tokens: tl.int32, room: tl.int32, q_len: tl.int32, per: tl.int32, max_pages: tl.int32,
    num_pages: tl.int64, lines: tl.int32, outputs: tl.int32, least: tl.int32,
    num_heads: tl.int32, num_kv_heads: tl.int32, layout_heads: tl.int32,
    q_token: tl.int64, q_head: tl.int64, q_dim,
    k_page: tl.int64, k_token: tl.int64, k_head: tl.int64, k_dim,
    v_page: tl.int64, v_token: tl.int64, v_head: tl.int64, v_dim,
    out_token: tl.int64, out_head: tl.int64, lse_head: tl.int64,
    table_sequence: tl.int64, table_head: tl.int64, table_entry: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RB: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, MODE: tl.constexpr,
    STREAM: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, SCALED_K: tl.constexpr, SCALED_V: tl.constexpr,
):  # fmt: skip
    """``out = softmax(logits) v`` of whole outputs, and states of pieces of others.

    STREAM: grid ``(programs,)``, every program takes an equal range of all key tiles, whose running numbers over the outputs are
    ``ends_ptr``. Otherwise grid ``(outputs, splits)``: every output is cut by itself, into ``splits`` pieces at most, ``least`` key tiles
    or more in each, so that its bits depend on nothing but its own sequence.
    """
    units = num_heads // MEMBERS
    lengths = lens_ptr, cu_ptr, spans_ptr
    memory = q_ptr, k_ptr, v_ptr, slot_out_ptr, slot_lse_ptr
    q_strides = q_token, q_head, q_dim
    k_strides, v_strides = (k_page, k_token, k_head, k_dim), (v_page, v_token, v_head, v_dim)
    strides = q_strides, k_strides, v_strides, (out_token, out_head, lse_head)
    results, scales = (out_ptr, lse_ptr), (k_scale_ptr, v_scale_ptr)
    table = table_ptr, table_sequence, table_head, table_entry
    lists, listed, masks = (ptr_ptr, full_ptr, sub_at_ptr), (idx_ptr, key_pos_ptr), (sub_ptr, tiles_ptr)
    sizes = lines, max_pages, num_pages, num_heads, num_kv_heads, layout_heads
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    if STREAM:
        program, programs = tl.program_id(0), tl.num_programs(0)
        total = tl.load(ends_ptr + outputs - 1)
        at, end = range_begin(program, total, programs), range_begin(program + 1, total, programs)
        output = find_output(ends_ptr, outputs, at)
        while at < end:
            begin = tl.load(ends_ptr + output - 1, mask=output > 0, other=0)
            stop = tl.load(ends_ptr + output)
            upto = tl.minimum(stop, end)
            if upto > at:
                found = find_queries(output // units, lengths, batch, tokens, room, q_len, per, QUERIES, RB, MODE)
                whole, slot = (at == begin) & (upto == stop), tl.where(at == begin, programs + program, program)
                attend_piece(
                    found, output % units, (at - begin).to(tl.int32), (upto - begin).to(tl.int32), whole, slot,
                    memory, strides, results, sinks_ptr, scales, table, lists, listed, masks, sizes, (factor, cap_log2),
                    D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, RB, PAGE, GROUP, MEMBERS, MODE, CAPPED, SINKS, SCALED_K, SCALED_V,
                )  # fmt: skip
                at = upto
            output += 1
    else:
        output, piece, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        found = find_queries(output // units, lengths, batch, tokens, room, q_len, per, QUERIES, RB, MODE)
        layout_head = output % units * MEMBERS // (num_heads // layout_heads)
        _, _, _, _, _, total = find_row(lists, layout_head, found[3], lines, RB, BLOCK_N)
        pieces, size = cut(total, splits, least)
        if (found[2] > 0) & (piece < pieces):
            attend_piece(
                found, output % units, piece * size, tl.minimum(piece * size + size, total), pieces == 1, output * splits + piece,
                memory, strides, results, sinks_ptr, scales, table, lists, listed, masks, sizes, (factor, cap_log2),
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, RB, PAGE, GROUP, MEMBERS, MODE, CAPPED, SINKS, SCALED_K, SCALED_V,
            )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def count_kernel(
    lens_ptr, cu_ptr, counts_ptr, ptr_ptr, full_ptr, sub_at_ptr, spans_ptr,
    batch: tl.int32, tokens: tl.int32, room: tl.int32, q_len: tl.int32, per: tl.int32, lines: tl.int32,
    num_heads: tl.int32, layout_heads: tl.int32,
    BLOCK_N: tl.constexpr, QUERIES: tl.constexpr, RB: tl.constexpr, MEMBERS: tl.constexpr, MODE: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Key tiles of each output, from row pointers and lengths; grid ``(query tiles,)``."""
    tile, units = tl.program_id(0), num_heads // MEMBERS
    found = find_queries(tile, (lens_ptr, cu_ptr, spans_ptr), batch, tokens, room, q_len, per, QUERIES, RB, MODE)
    unit = tl.arange(0, UNITS)
    layout_head = tl.minimum(unit, units - 1) * MEMBERS // (num_heads // layout_heads)
    _, _, _, _, _, total = find_row((ptr_ptr, full_ptr, sub_at_ptr), layout_head, found[3], lines, RB, BLOCK_N)
    tl.store(counts_ptr + tile * units + unit, tl.where(found[2] > 0, total, 0), mask=unit < units)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    slot_out_ptr, slot_lse_ptr, sinks_ptr, out_ptr, lse_ptr, lens_ptr, cu_ptr, ends_ptr, ptr_ptr, full_ptr, sub_at_ptr, spans_ptr,
    batch: tl.int32, tokens: tl.int32, room: tl.int32, q_len: tl.int32, per: tl.int32, lines: tl.int32, outputs: tl.int32,
    programs: tl.int32, splits: tl.int32, least: tl.int32, num_heads: tl.int32, layout_heads: tl.int32,
    out_token: tl.int64, out_head: tl.int64, lse_head: tl.int64,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    RB: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, MODE: tl.constexpr,
    STREAM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The states of the pieces of an output into the result, in the order of its keys; grid ``(outputs, BLOCK_M / ROWS)``.

    ``programs``, or ``splits`` and ``least``: those of the walk. An output in one piece is there already; one without key tiles is
    written here where STREAM.
    """
    output, part, units = tl.program_id(0), tl.program_id(1) * ROWS, num_heads // MEMBERS
    unit = output % units
    found = find_queries(output // units, (lens_ptr, cu_ptr, spans_ptr), batch, tokens, room, q_len, per, BLOCK_M // GROUP, RB, MODE)
    if STREAM:
        total = tl.load(ends_ptr + outputs - 1)
        begin, stop = tl.load(ends_ptr + output - 1, mask=output > 0, other=0), tl.load(ends_ptr + output)
        first = program_of(begin, total, programs)
        lead = programs + first
        pieces = tl.where(stop > begin, program_of(stop - 1, total, programs) - first + 1, 0)
    else:
        layout_head = unit * MEMBERS // (num_heads // layout_heads)
        _, _, _, _, _, total = find_row((ptr_ptr, full_ptr, sub_at_ptr), layout_head, found[3], lines, RB, BLOCK_N)
        pieces, _ = cut(total, splits, least)
        first = output * splits
        lead = first
    if (found[2] > 0) & (pieces != 1):
        lane, d = part + tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
        query, member = lane // GROUP, lane % GROUP
        asks = (query < found[2]) & (member < MEMBERS)
        head = unit * MEMBERS + tl.minimum(member, MEMBERS - 1)
        m_i, l_i = softmax_begin(sink_logit(sinks_ptr, head, True, SINKS), ROWS)
        acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        for number in range(first, first + pieces):
            slot = tl.where(number == first, lead, number)
            row = slot.to(tl.int64) * BLOCK_M + lane
            lse = tl.load(slot_lse_ptr + row) * LOG2E
            m_i, shift, keep = rescaled(m_i, lse)
            weight = tl.exp2(lse - shift)
            l_i = l_i * keep + weight
            acc = acc * keep[:, None] + tl.load(slot_out_ptr + row[:, None] * BLOCK_DV + d[None, :]) * weight[:, None]
        out, lse = softmax_end(acc, m_i, l_i)
        token = tl.where(asks, found[1] + query, 0).to(tl.int64)
        store_result((out_ptr, lse_ptr), (out_token, out_head, lse_head), token, head, asks, out, lse, BLOCK_DV, DV)
