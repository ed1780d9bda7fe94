"""The backward kernels: delta, dq by rows, dk and dv by columns; no atomics, so the same bits every run."""

import triton
import triton.language as tl

from s2attn.kernels.pieces.address import listed_tokens, load_rows, store_rows
from s2attn.kernels.pieces.gradient import score_gradient
from s2attn.kernels.pieces.masks import allowed_pairs
from s2attn.kernels.pieces.scores import LOG2E, log2_logits
from s2attn.kernels.pieces.work import find_list, program_of, read_piece, slot_rows, store_slot

UNCOUNTED = ["slots", "lines", "num_heads", "num_kv_heads", "layout_heads", "lse_batch", "lse_head"]
"""Numbers that follow the length or the heads: no kernel is compiled anew for them."""


@triton.jit(do_not_specialize=["tokens", "lse_batch", "lse_head", "dlse_batch", "dlse_head", "dlse_token"])
def delta_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, tokens: tl.int32,
    out_batch: tl.int64, out_token: tl.int64, out_head: tl.int64,
    dout_batch: tl.int64, dout_token: tl.int64, dout_head: tl.int64, dout_dim,
    lse_batch: tl.int64, lse_head: tl.int64, dlse_batch: tl.int64, dlse_head: tl.int64, dlse_token: tl.int64,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """``delta = sum(dout * out) - dlse`` per query, 0 where a query saw nothing; grid ``(ceil(T / BLOCK_M), H, B)``."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, lane = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    exists = row + lane < tokens
    out = load_rows((out_ptr + batch * out_batch + head * out_head, out_token, 1), row, lane, exists, BLOCK_DV, DV)
    dout = load_rows((dout_ptr + batch * dout_batch + head * dout_head, dout_token, dout_dim), row, lane, exists, BLOCK_DV, DV)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + batch * dlse_batch + head * dlse_head + (row + lane) * dlse_token, mask=exists, other=0.0)
    lse = tl.load(lse_ptr + batch * lse_batch + head * lse_head + row + lane, mask=exists, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + batch * lse_batch + head * lse_head + row + lane, delta, mask=exists)


@triton.jit
def dq_listed(
    dq, q_tile, dout, lse_log2, delta, place, keys, values, listed, codes_ptr, tiles_ptr, first, last, factor, cap_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    RB: tl.constexpr, F: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add ``dS k`` over entries ``first .. last - 1`` of one part of a row's list."""
    for position in range(first * RB, last * RB, BLOCK_N):
        key, lane, exists, entry, inside = listed_tokens(listed, position, last, RB, BLOCK_N)
        if MASKED:
            allowed = allowed_pairs(codes_ptr, tiles_ptr, entry, inside, place, exists, F, RB, BLOCK_N, False)
        else:
            allowed = exists[None, :]
        k_tile = load_rows(keys, key, lane, exists, BLOCK_D, D, MASKED or RB < BLOCK_N)
        v_tile = load_rows(values, key, lane, exists, BLOCK_DV, DV, MASKED or RB < BLOCK_N)
        logits = log2_logits(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), factor, cap_log2, CAPPED)
        dp = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
        _, ds = score_gradient(logits, dp, lse_log2[:, None], delta[:, None], allowed, cap_log2, CAPPED, MASKED or RB < BLOCK_N)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
    return dq


@triton.jit
def dkv_listed(
    dk, dv, k_tile, v_tile, place, queries, douts, lse_ptr, delta_ptr, listed, codes_ptr, tiles_ptr, first, last, factor, cap_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    RB: tl.constexpr, F: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add ``dS^T q`` and ``P^T dout`` over entries ``first .. last - 1`` of one part of a column's list, for one query head."""
    for position in range(first * RB, last * RB, BLOCK_M):
        row, lane, exists, entry, inside = listed_tokens(listed, position, last, RB, BLOCK_M)
        if MASKED:
            allowed = allowed_pairs(codes_ptr, tiles_ptr, entry, inside, place, exists, F, RB, BLOCK_M, True)
        else:
            allowed = exists[None, :]
        q_tile = load_rows(queries, row, lane, exists, BLOCK_D, D)
        dout = load_rows(douts, row, lane, exists, BLOCK_DV, DV)
        lse_log2 = tl.load(lse_ptr + row + lane, mask=exists, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + row + lane, mask=exists, other=0.0)
        logits = log2_logits(tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee"), factor, cap_log2, CAPPED)
        dp = tl.dot(v_tile, tl.trans(dout), input_precision="ieee")
        p, ds = score_gradient(logits, dp, lse_log2[None, :], delta[None, :], allowed, cap_log2, CAPPED, MASKED)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=UNCOUNTED)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, slot_dq_ptr,
    pieces_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    key_start_ptr, key_length_ptr,
    scale, factor, cap_log2,
    slots: tl.int32, lines: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, layout_heads: tl.int32,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, q_dim,
    k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64, k_dim,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, v_dim,
    dout_batch: tl.int64, dout_token: tl.int64, dout_head: tl.int64, dout_dim,
    dq_batch: tl.int64, dq_token: tl.int64, dq_head: tl.int64, lse_batch: tl.int64, lse_head: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr, F: tl.constexpr, SUBS: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """``dq = scale * dS k`` over the listed blocks of each row; the grid and the walk of the forward kernel."""
    number, member, tile = program_of(lines, num_heads, layout_heads, SUBS)
    item, full_from, full_to, other_from, other_to, slot = read_piece(pieces_ptr, number)
    layout_head, line, shared = item // lines, item % lines, num_heads // layout_heads
    batch, head = tl.program_id(1).to(tl.int64), (layout_head * shared + member).to(tl.int64)
    kv_head = head // (num_heads // num_kv_heads)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(line_start_ptr + line).to(tl.int64)
    row_exists = place < tl.load(line_length_ptr + line)
    q_tile = load_rows((q_ptr + batch * q_batch + head * q_head, q_token, q_dim), row, place, row_exists, BLOCK_D, D)
    dout = load_rows((dout_ptr + batch * dout_batch + head * dout_head, dout_token, dout_dim), row, place, row_exists, BLOCK_DV, DV)
    of_row = batch * lse_batch + head * lse_head + row + place
    lse_log2 = tl.load(lse_ptr + of_row, mask=row_exists, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + of_row, mask=row_exists, other=0.0)

    begin, full, _, codes_ptr = find_list((ptr_ptr, full_ptr, sub_at_ptr, sub_ptr), layout_head, line, lines, F)
    keys = (k_ptr + batch * k_batch + kv_head * k_head, k_token, k_dim)
    values = (v_ptr + batch * v_batch + kv_head * v_head, v_token, v_dim)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = dq_listed(
        dq, q_tile, dout, lse_log2, delta, place, keys, values, (idx_ptr + begin, key_start_ptr, key_length_ptr), codes_ptr, tiles_ptr,
        full_from, full_to, factor, cap_log2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, RB, F, CAPPED, False,
    )  # fmt: skip
    dq = dq_listed(
        dq, q_tile, dout, lse_log2, delta, place, keys, values, (idx_ptr + begin + full, key_start_ptr, key_length_ptr), codes_ptr,
        tiles_ptr, other_from, other_to, factor, cap_log2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, RB, F, CAPPED, True,
    )  # fmt: skip
    if slot < 0:
        store_rows(dq_ptr + batch * dq_batch + head * dq_head, row, place, row_exists, dq_token, dq * scale, BLOCK_D, D)
    else:
        first = slot_rows(batch, slots, slot, shared, member, tile, SUBS, BLOCK_M)
        store_slot(slot_dq_ptr, first, dq, True, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=UNCOUNTED)
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, slot_dk_ptr, slot_dv_ptr,
    pieces_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    query_start_ptr, query_length_ptr,
    scale, factor, cap_log2,
    slots: tl.int32, lines: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, layout_heads: tl.int32,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, q_dim,
    k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64, k_dim,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, v_dim,
    dout_batch: tl.int64, dout_token: tl.int64, dout_head: tl.int64, dout_dim,
    dk_batch: tl.int64, dk_token: tl.int64, dk_head: tl.int64,
    dv_batch: tl.int64, dv_token: tl.int64, dv_head: tl.int64, lse_batch: tl.int64, lse_head: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr, F: tl.constexpr, SUBS: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """``dv = P^T dout`` and ``dk = scale * dS^T q`` of one tile of keys; the group's query heads are the inner loop.

    Here the lines are key blocks and the listed tokens queries: BLOCK_N keys against BLOCK_M queries. An item's list is that of the
    group's heads one after another. Grid ``(pieces * SUBS, batch)``.
    """
    number, tile = tl.program_id(0) // SUBS, tl.program_id(0) % SUBS
    item, full_from, full_to, other_from, other_to, slot = read_piece(pieces_ptr, number)
    kv_head, line = (item // lines).to(tl.int64), item % lines
    batch, group = tl.program_id(1).to(tl.int64), num_heads // num_kv_heads
    place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key = tl.load(line_start_ptr + line).to(tl.int64)
    key_exists = place < tl.load(line_length_ptr + line)
    k_tile = load_rows((k_ptr + batch * k_batch + kv_head * k_head, k_token, k_dim), key, place, key_exists, BLOCK_D, D)
    v_tile = load_rows((v_ptr + batch * v_batch + kv_head * v_head, v_token, v_dim), key, place, key_exists, BLOCK_DV, DV)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        begin, full, listed, codes_ptr = find_list(
            (ptr_ptr, full_ptr, sub_at_ptr, sub_ptr), head * layout_heads // num_heads, line, lines, F
        )
        queries = (q_ptr + batch * q_batch + head * q_head, q_token, q_dim)
        douts = (dout_ptr + batch * dout_batch + head * dout_head, dout_token, dout_dim)
        of_head = batch * lse_batch + head * lse_head
        dk, dv = dkv_listed(
            dk, dv, k_tile, v_tile, place, queries, douts, lse_ptr + of_head, delta_ptr + of_head,
            (idx_ptr + begin, query_start_ptr, query_length_ptr), codes_ptr, tiles_ptr, tl.maximum(full_from, 0), tl.minimum(full_to, full),
            factor, cap_log2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, RB, F, CAPPED, False,
        )  # fmt: skip
        dk, dv = dkv_listed(
            dk, dv, k_tile, v_tile, place, queries, douts, lse_ptr + of_head, delta_ptr + of_head,
            (idx_ptr + begin + full, query_start_ptr, query_length_ptr), codes_ptr, tiles_ptr,
            tl.maximum(other_from, 0), tl.minimum(other_to, listed - full),
            factor, cap_log2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, RB, F, CAPPED, True,
        )  # fmt: skip
        # From here on the piece is counted from the next head's first entry.
        full_from, full_to = full_from - full, full_to - full
        other_from, other_to = other_from - (listed - full), other_to - (listed - full)
    if slot < 0:
        store_rows(dk_ptr + batch * dk_batch + kv_head * dk_head, key, place, key_exists, dk_token, dk * scale, BLOCK_D, D)
        store_rows(dv_ptr + batch * dv_batch + kv_head * dv_head, key, place, key_exists, dv_token, dv, BLOCK_DV, DV)
    else:
        first = slot_rows(batch, slots, slot, 1, 0, tile, SUBS, BLOCK_N)
        store_slot(slot_dk_ptr, first, dk, True, BLOCK_N, BLOCK_D)
        store_slot(slot_dv_ptr, first, dv, True, BLOCK_N, BLOCK_DV)
