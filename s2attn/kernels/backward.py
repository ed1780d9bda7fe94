"""The backward kernels: delta, dq by rows, dk and dv by columns; no atomics, so the same bits every run."""

import triton
import triton.language as tl

from s2attn.kernels.forward import which_tile
from s2attn.kernels.pieces.address import listed_tokens, load_rows, store_rows
from s2attn.kernels.pieces.gradient import LOG2E, score_gradient
from s2attn.kernels.pieces.masks import allowed_pairs


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, tokens,
    out_batch, out_token, out_head, dout_batch, dout_token, dout_head, dout_dim, lse_batch, lse_head, dlse_batch, dlse_head, dlse_token,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """``delta = sum(dout * out) - dlse`` per query, 0 where a query saw nothing; grid ``(ceil(T / BLOCK_M), H, B)``."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, lane = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    exists = row + lane < tokens
    out = load_rows(out_ptr + batch * out_batch + head * out_head, row, lane, exists, out_token, 1, BLOCK_DV, DV)
    dout = load_rows(dout_ptr + batch * dout_batch + head * dout_head, row, lane, exists, dout_token, dout_dim, BLOCK_DV, DV)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + batch * dlse_batch + head * dlse_head + (row + lane) * dlse_token, mask=exists, other=0.0)
    lse = tl.load(lse_ptr + batch * lse_batch + head * lse_head + row + lane, mask=exists, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + batch * lse_batch + head * lse_head + row + lane, delta, mask=exists)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    order_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    key_start_ptr, key_length_ptr,
    scale, scale_log2, lines, num_heads, num_kv_heads, layout_heads,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim, v_batch, v_token, v_head, v_dim,
    dout_batch, dout_token, dout_head, dout_dim, dq_batch, dq_token, dq_head, lse_batch, lse_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr, F: tl.constexpr, SUBS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq = scale * dS k`` over the listed blocks of each row; the grid and the walk of the forward kernel."""
    batch, head, layout_head, line, tile = which_tile(order_ptr, lines, num_heads, layout_heads, SUBS)
    batch, head, kv_head = batch.to(tl.int64), head.to(tl.int64), (head // (num_heads // num_kv_heads)).to(tl.int64)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(line_start_ptr + line).to(tl.int64)
    row_exists = place < tl.load(line_length_ptr + line)
    q_tile = load_rows(q_ptr + batch * q_batch + head * q_head, row, place, row_exists, q_token, q_dim, BLOCK_D, D)
    dout = load_rows(dout_ptr + batch * dout_batch + head * dout_head, row, place, row_exists, dout_token, dout_dim, BLOCK_DV, DV)
    of_row = batch * lse_batch + head * lse_head + row + place
    lse_log2 = tl.load(lse_ptr + of_row, mask=row_exists, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + of_row, mask=row_exists, other=0.0)

    at = layout_head.to(tl.int64) * (lines + 1) + line
    begin, end = tl.load(ptr_ptr + at), tl.load(ptr_ptr + at + 1)
    full = tl.load(full_ptr + layout_head.to(tl.int64) * lines + line)
    others = (end - begin).to(tl.int32) - full
    codes_ptr = sub_ptr + tl.load(sub_at_ptr + layout_head.to(tl.int64) * lines + line) * F
    k_base, v_base = k_ptr + batch * k_batch + kv_head * k_head, v_ptr + batch * v_batch + kv_head * v_head

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for position in range(0, full * RB, BLOCK_N):
        key, lane, exists, _, _ = listed_tokens(idx_ptr + begin, key_start_ptr, key_length_ptr, position, full, RB, BLOCK_N)
        k_tile = load_rows(k_base, key, lane, exists, k_token, k_dim, BLOCK_D, D, RB < BLOCK_N)
        v_tile = load_rows(v_base, key, lane, exists, v_token, v_dim, BLOCK_DV, DV, RB < BLOCK_N)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        _, ds = score_gradient(scores, dp, lse_log2[:, None], delta[:, None], exists[None, :], RB < BLOCK_N)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    for position in range(0, others * RB, BLOCK_N):
        key, lane, exists, entry, inside = listed_tokens(
            idx_ptr + begin + full, key_start_ptr, key_length_ptr, position, others, RB, BLOCK_N
        )
        allowed = allowed_pairs(codes_ptr, tiles_ptr, entry, inside, place, exists, F, RB, BLOCK_N, False)
        k_tile = load_rows(k_base, key, lane, exists, k_token, k_dim, BLOCK_D, D)
        v_tile = load_rows(v_base, key, lane, exists, v_token, v_dim, BLOCK_DV, DV)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        _, ds = score_gradient(scores, dp, lse_log2[:, None], delta[:, None], allowed, True)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    store_rows(dq_ptr + batch * dq_batch + head * dq_head, row, place, row_exists, dq_token, dq * scale, BLOCK_D, D)


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    order_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    query_start_ptr, query_length_ptr,
    scale, scale_log2, lines, num_heads, num_kv_heads, layout_heads,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim, v_batch, v_token, v_head, v_dim,
    dout_batch, dout_token, dout_head, dout_dim, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head, lse_batch, lse_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr, F: tl.constexpr, SUBS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dv = P^T dout`` and ``dk = scale * dS^T q`` of one tile of keys; the group's query heads are the inner loop.

    Here the lines are key blocks and the listed tokens queries: BLOCK_N keys against BLOCK_M queries. Grid ``(G * lines * SUBS, B)``.
    """
    item = tl.load(order_ptr + tl.program_id(0) // SUBS)
    kv_head, line = (item // lines).to(tl.int64), item % lines
    batch, group = tl.program_id(1).to(tl.int64), num_heads // num_kv_heads
    place = tl.program_id(0) % SUBS * BLOCK_N + tl.arange(0, BLOCK_N)
    key = tl.load(line_start_ptr + line).to(tl.int64)
    key_exists = place < tl.load(line_length_ptr + line)
    k_tile = load_rows(k_ptr + batch * k_batch + kv_head * k_head, key, place, key_exists, k_token, k_dim, BLOCK_D, D)
    v_tile = load_rows(v_ptr + batch * v_batch + kv_head * v_head, key, place, key_exists, v_token, v_dim, BLOCK_DV, DV)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        layout_head = head * layout_heads // num_heads
        at = layout_head * (lines + 1) + line
        begin, end = tl.load(ptr_ptr + at), tl.load(ptr_ptr + at + 1)
        full = tl.load(full_ptr + layout_head * lines + line)
        others = (end - begin).to(tl.int32) - full
        codes_ptr = sub_ptr + tl.load(sub_at_ptr + layout_head * lines + line) * F
        q_base, dout_base = q_ptr + batch * q_batch + head * q_head, dout_ptr + batch * dout_batch + head * dout_head
        of_head = batch * lse_batch + head * lse_head
        for position in range(0, full * RB, BLOCK_M):
            row, lane, exists, _, _ = listed_tokens(idx_ptr + begin, query_start_ptr, query_length_ptr, position, full, RB, BLOCK_M)
            q_tile = load_rows(q_base, row, lane, exists, q_token, q_dim, BLOCK_D, D)
            dout = load_rows(dout_base, row, lane, exists, dout_token, dout_dim, BLOCK_DV, DV)
            lse_log2 = tl.load(lse_ptr + of_head + row + lane, mask=exists, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + of_head + row + lane, mask=exists, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
            dp = tl.dot(v_tile, tl.trans(dout), input_precision=PRECISION)
            p, ds = score_gradient(scores, dp, lse_log2[None, :], delta[None, :], exists[None, :], False)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
        for position in range(0, others * RB, BLOCK_M):
            row, lane, exists, entry, inside = listed_tokens(
                idx_ptr + begin + full, query_start_ptr, query_length_ptr, position, others, RB, BLOCK_M
            )
            allowed = allowed_pairs(codes_ptr, tiles_ptr, entry, inside, place, exists, F, RB, BLOCK_M, True)
            q_tile = load_rows(q_base, row, lane, exists, q_token, q_dim, BLOCK_D, D)
            dout = load_rows(dout_base, row, lane, exists, dout_token, dout_dim, BLOCK_DV, DV)
            lse_log2 = tl.load(lse_ptr + of_head + row + lane, mask=exists, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + of_head + row + lane, mask=exists, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
            dp = tl.dot(v_tile, tl.trans(dout), input_precision=PRECISION)
            p, ds = score_gradient(scores, dp, lse_log2[None, :], delta[None, :], allowed, True)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    store_rows(dk_ptr + batch * dk_batch + kv_head * dk_head, key, place, key_exists, dk_token, dk * scale, BLOCK_D, D)
    store_rows(dv_ptr + batch * dv_batch + kv_head * dv_head, key, place, key_exists, dv_token, dv, BLOCK_DV, DV)
