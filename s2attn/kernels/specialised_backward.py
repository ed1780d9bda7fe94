"""The backward kernels in the specialised form of `s2attn.kernels.specialised`, whose docstring lists what that form demands.

One more thing reaches a product here: lse and delta, one number per row, and 128 of them are too many for a load through pointers. A
descriptor must start at a multiple of 16 bytes, so both come *by block*: ``(B, H, blocks * RB)`` with every query block in a slot of RB
numbers of its own; rows that do not exist have lse = +inf and delta = 0, and so P = 0.
"""

import triton
import triton.language as tl

from s2attn.kernels.forward import which_tile
from s2attn.kernels.pieces.gradient import LOG2E, score_gradient
from s2attn.kernels.specialised import lists, tall_rows


@triton.jit
def numbers_by_row(by_block_ptr, count, at, per_head, ROWS: tl.constexpr, STACK: tl.constexpr):
    """One number per row of a tile: ROWS of one head from ``at`` on, or of two neighbouring heads one below the other."""
    whole = tl.make_tensor_descriptor(by_block_ptr, [count], [1], [ROWS * STACK])
    if STACK == 2:
        return tl.where(tl.arange(0, ROWS * STACK) < ROWS, whole.load([at]), whole.load([at + per_head - ROWS]))
    else:
        return whole.load([at])


@triton.jit
def dq_step(dq, q_tile, dout, k_tile, v_tile, lse_log2, delta, scale_log2, allowed, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Fold one tile of keys into dq (not yet scaled)."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
    dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
    _, ds = score_gradient(scores, dp, lse_log2[:, None], delta[:, None], allowed, MASKED)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)


@triton.jit
def dkv_step(dk, dv, k_tile, v_tile, q_tile, dout, lse_log2, delta, scale_log2, allowed, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Fold one tile of queries into dk (not yet scaled) and dv."""
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_log2
    dp = tl.dot(v_tile, tl.trans(dout), input_precision=PRECISION)
    p, ds = score_gradient(scores, dp, lse_log2[None, :], delta[None, :], allowed, MASKED)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def specialised_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    order_ptr, line_start_ptr, line_length_ptr, line_block_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    key_start_ptr, key_end_ptr,
    scale, scale_log2, lines, num_heads, num_kv_heads, layout_heads, tokens, tile_rows, slots,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    dout_batch, dout_token, dout_head, dq_batch, dq_token, dq_head,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, STACK: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr,
    SUBS: tl.constexpr, STAGES: tl.constexpr, OTHER_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq = scale * dS k`` over the listed blocks of each row; grid, walk and arguments of the specialised forward kernel.

    ``line_block_ptr`` has the first query block of each line; ``slots`` is the length of lse and delta per head.
    """
    BLOCK_M: tl.constexpr = ROWS * STACK
    PER: tl.constexpr = RB // BLOCK_N
    batch, head, layout_head, line, tile = which_tile(order_ptr, lines, num_heads // STACK, layout_heads, SUBS)
    batch, head = batch.to(tl.int64), head.to(tl.int64) * STACK
    kv_head = head // (num_heads // num_kv_heads)
    row = tl.load(line_start_ptr + line) + tile * ROWS
    list_ptr, full, others, codes_ptr = lists(ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, layout_head, line, lines)
    key_end = tl.load(key_end_ptr + line)

    q_tile = tall_rows(q_ptr + batch * q_batch + head * q_head, tokens, row, q_token, q_head, ROWS, STACK, D)
    dout = tall_rows(dout_ptr + batch * dout_batch + head * dout_head, tokens, row, dout_token, dout_head, ROWS, STACK, DV)
    k_rows = tl.make_tensor_descriptor(k_ptr + batch * k_batch + kv_head * k_head, [key_end, D], [k_token, 1], [BLOCK_N, D])
    v_rows = tl.make_tensor_descriptor(v_ptr + batch * v_batch + kv_head * v_head, [key_end, DV], [v_token, 1], [BLOCK_N, DV])
    masks = tl.make_tensor_descriptor(tiles_ptr, [tile_rows, RB], [RB, 1], [BLOCK_M, BLOCK_N])
    of_tile = ((tl.program_id(1) * num_heads + head) * slots + tl.load(line_block_ptr + line) * RB + tile * ROWS).to(tl.int32)
    lse_log2 = numbers_by_row(lse_ptr, slots * num_heads * tl.num_programs(1), of_tile, slots, ROWS, STACK) * LOG2E
    delta = numbers_by_row(delta_ptr, slots * num_heads * tl.num_programs(1), of_tile, slots, ROWS, STACK)

    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for i in tl.range(0, full * PER, num_stages=STAGES, warp_specialize=True):
        key = tl.load(key_start_ptr + tl.load(list_ptr + i // PER)) + i % PER * BLOCK_N
        k_tile, v_tile = k_rows.load([key, 0]), v_rows.load([key, 0])
        dq = dq_step(dq, q_tile, dout, k_tile, v_tile, lse_log2, delta, scale_log2, True, False, PRECISION)
    dq += 0.0
    for i in tl.range(0, others * PER, num_stages=OTHER_STAGES):
        key = tl.load(key_start_ptr + tl.load(list_ptr + full + i // PER)) + i % PER * BLOCK_N
        code = tl.load(codes_ptr + i // PER)
        k_tile, v_tile = k_rows.load([key, 0]), v_rows.load([key, 0])
        mask = masks.load([(code * SUBS + tile) * BLOCK_M, i % PER * BLOCK_N])
        dq = dq_step(dq, q_tile, dout, k_tile, v_tile, lse_log2, delta, scale_log2, mask != 0, True, PRECISION)
    lane = tl.arange(0, BLOCK_M)
    exists = tile * ROWS + lane % ROWS < tl.load(line_length_ptr + line)
    token, member = (row + lane % ROWS).to(tl.int64), head + lane // ROWS
    dq_rows = dq_ptr + batch * dq_batch + (member * dq_head + token * dq_token)[:, None]
    tl.store(dq_rows + tl.arange(0, D)[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=exists[:, None])


@triton.jit
def specialised_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    order_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    query_start_ptr, query_end_ptr,
    scale, scale_log2, lines, num_heads, num_kv_heads, layout_heads, tokens, tile_rows, slots,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    dout_batch, dout_token, dout_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr,
    SUBS: tl.constexpr, STAGES: tl.constexpr, OTHER_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dv = P^T dout`` and ``dk = scale * dS^T q`` of BLOCK_N = 128 keys; grid ``(G * lines * SUBS, B)``.

    Lines are key blocks, listed tokens queries, and mask tiles are tall in keys. The query heads of a group share their lists (a layout
    head serves whole groups), so one flat loop walks every listed tile once for each of them: loops inside loops do not compile.
    ``tokens`` counts the key tokens.
    """
    PER: tl.constexpr = RB // BLOCK_M
    item, tile = tl.load(order_ptr + tl.program_id(0) // SUBS), tl.program_id(0) % SUBS
    kv_head, line = (item // lines).to(tl.int64), item % lines
    batch, group = tl.program_id(1).to(tl.int64), num_heads // num_kv_heads
    key = tl.load(line_start_ptr + line) + tile * BLOCK_N
    layout_head = kv_head * layout_heads // num_kv_heads
    list_ptr, full, others, codes_ptr = lists(ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, layout_head, line, lines)
    query_end = tl.load(query_end_ptr + line)

    k_tile = tall_rows(k_ptr + batch * k_batch + kv_head * k_head, tokens, key, k_token, k_head, BLOCK_N, 1, D)
    v_tile = tall_rows(v_ptr + batch * v_batch + kv_head * v_head, tokens, key, v_token, v_head, BLOCK_N, 1, DV)
    # The heads of a group side by side: member m begins at column m * head stride.
    q_base, dout_base = q_ptr + batch * q_batch + kv_head * group * q_head, dout_ptr + batch * dout_batch + kv_head * group * dout_head
    q_columns, dout_columns = ((group - 1) * q_head + D).to(tl.int32), ((group - 1) * dout_head + DV).to(tl.int32)
    q_rows = tl.make_tensor_descriptor(q_base, [query_end, q_columns], [q_token, 1], [BLOCK_M, D])
    dout_rows = tl.make_tensor_descriptor(dout_base, [query_end, dout_columns], [dout_token, 1], [BLOCK_M, DV])
    masks = tl.make_tensor_descriptor(tiles_ptr, [tile_rows, RB], [RB, 1], [BLOCK_N, BLOCK_M])
    of_group = (batch * num_heads + kv_head * group) * slots + tl.arange(0, BLOCK_M)

    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    for i in tl.range(0, full * PER * group, num_stages=STAGES, warp_specialize=True):
        at, member = i // group, i % group
        block = tl.load(list_ptr + at // PER)
        row = tl.load(query_start_ptr + block) + at % PER * BLOCK_M
        q_tile, dout = q_rows.load([row, (member * q_head).to(tl.int32)]), dout_rows.load([row, (member * dout_head).to(tl.int32)])
        of_rows = of_group + member * slots + block * RB + at % PER * BLOCK_M
        lse_log2, delta = tl.load(lse_ptr + of_rows) * LOG2E, tl.load(delta_ptr + of_rows)
        dk, dv = dkv_step(dk, dv, k_tile, v_tile, q_tile, dout, lse_log2, delta, scale_log2, True, False, PRECISION)
    dk, dv = dk + 0.0, dv + 0.0
    for i in tl.range(0, others * PER * group, num_stages=OTHER_STAGES):
        at, member = i // group, i % group
        block = tl.load(list_ptr + full + at // PER)
        row = tl.load(query_start_ptr + block) + at % PER * BLOCK_M
        q_tile, dout = q_rows.load([row, (member * q_head).to(tl.int32)]), dout_rows.load([row, (member * dout_head).to(tl.int32)])
        mask = masks.load([(tl.load(codes_ptr + at // PER) * SUBS + tile) * BLOCK_N, at % PER * BLOCK_M])
        of_rows = of_group + member * slots + block * RB + at % PER * BLOCK_M
        lse_log2, delta = tl.load(lse_ptr + of_rows) * LOG2E, tl.load(delta_ptr + of_rows)
        dk, dv = dkv_step(dk, dv, k_tile, v_tile, q_tile, dout, lse_log2, delta, scale_log2, mask != 0, True, PRECISION)
    lane = tl.arange(0, BLOCK_N)
    exists_key = (tile * BLOCK_N + lane < tl.load(line_length_ptr + line))[:, None]
    token = (key + lane).to(tl.int64)[:, None]
    dk_rows = dk_ptr + batch * dk_batch + kv_head * dk_head + token * dk_token
    tl.store(dk_rows + tl.arange(0, D)[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=exists_key)
    dv_rows = dv_ptr + batch * dv_batch + kv_head * dv_head + token * dv_token
    tl.store(dv_rows + tl.arange(0, DV)[None, :], dv.to(dv_ptr.dtype.element_ty), mask=exists_key)
