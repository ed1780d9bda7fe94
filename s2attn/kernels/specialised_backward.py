"""The backward kernels in the specialised form of `s2attn.kernels.specialised`, whose docstring lists what that form demands.

One more thing reaches a product here: lse and delta, one number per row, and 128 of them are too many for a load through pointers. A
descriptor must start at a multiple of 16 bytes, so both come *by block*: ``(B, H, blocks * RB)`` with every query block in RB places
of its own; rows that do not exist have lse = +inf and delta = 0, and so P = 0.
"""

import triton
import triton.language as tl

from s2attn.kernels.pieces.gradient import score_gradient
from s2attn.kernels.pieces.scores import LOG2E, log2_logits
from s2attn.kernels.pieces.work import find_list, read_piece, slot_rows, store_slot
from s2attn.kernels.specialised import store_stack, tall_rows, which_stack

UNCOUNTED = ["slots", "lines", "num_heads", "num_kv_heads", "layout_heads", "tokens", "tile_rows", "places"]
"""Numbers that follow the length or the heads: no kernel is compiled anew for them."""


@triton.jit
def numbers_by_row(by_block_ptr, count, at, per_head, ROWS: tl.constexpr, STACK: tl.constexpr):
    """One number per row of a tile: ROWS of one head from ``at`` on, or of two neighbouring heads one below the other."""
    whole = tl.make_tensor_descriptor(by_block_ptr, [count], [1], [ROWS * STACK])
    if STACK == 2:
        return tl.where(tl.arange(0, ROWS * STACK) < ROWS, whole.load([at]), whole.load([at + per_head - ROWS]))
    else:
        return whole.load([at])


@triton.jit
def dq_step(
    dq, q_tile, dout, k_tile, v_tile, lse_log2, delta, factor, cap_log2, allowed,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into dq (not yet scaled)."""
    scores = log2_logits(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), factor, cap_log2, CAPPED)
    dp = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
    _, ds = score_gradient(scores, dp, lse_log2[:, None], delta[:, None], allowed, cap_log2, CAPPED, MASKED)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@triton.jit
def dkv_step(
    dk, dv, k_tile, v_tile, q_tile, dout, lse_log2, delta, factor, cap_log2, allowed,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one tile of queries into dk (not yet scaled) and dv."""
    scores = log2_logits(tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee"), factor, cap_log2, CAPPED)
    dp = tl.dot(v_tile, tl.trans(dout), input_precision="ieee")
    p, ds = score_gradient(scores, dp, lse_log2[None, :], delta[None, :], allowed, cap_log2, CAPPED, MASKED)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=UNCOUNTED[1:])
def specialised_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    pieces_ptr, line_start_ptr, line_length_ptr, line_block_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    key_start_ptr, key_end_ptr,
    scale, factor, cap_log2, lines: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, layout_heads: tl.int32,
    tokens: tl.int32, tile_rows: tl.int32, places: tl.int32,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, dout_batch: tl.int64, dout_token: tl.int64, dout_head: tl.int64,
    dq_batch: tl.int64, dq_token: tl.int64, dq_head: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, STACK: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr,
    SUBS: tl.constexpr, STAGES: tl.constexpr, OTHER_STAGES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """``dq = scale * dS k`` over the listed blocks of each row; grid, walk and arguments of the specialised forward kernel.

    ``line_block_ptr`` has the first query block of each line; ``places`` is the length of lse and delta per head.
    """
    BLOCK_M: tl.constexpr = ROWS * STACK
    PER: tl.constexpr = RB // BLOCK_N
    line, tile, layout_head, head, full_from, full_to, other_from, other_to = which_stack(
        pieces_ptr, lines, num_heads, layout_heads, SUBS, STACK
    )
    batch = tl.program_id(1).to(tl.int64)
    kv_head = head // (num_heads // num_kv_heads)
    row = tl.load(line_start_ptr + line) + tile * ROWS
    begin, full, _, codes_ptr = find_list((ptr_ptr, full_ptr, sub_at_ptr, sub_ptr), layout_head, line, lines, 1)
    list_ptr, key_end = idx_ptr + begin, tl.load(key_end_ptr + line)

    q_tile = tall_rows(q_ptr + batch * q_batch + head * q_head, tokens, row, q_token, q_head, ROWS, STACK, D)
    dout = tall_rows(dout_ptr + batch * dout_batch + head * dout_head, tokens, row, dout_token, dout_head, ROWS, STACK, DV)
    k_rows = tl.make_tensor_descriptor(k_ptr + batch * k_batch + kv_head * k_head, [key_end, D], [k_token, 1], [BLOCK_N, D])
    v_rows = tl.make_tensor_descriptor(v_ptr + batch * v_batch + kv_head * v_head, [key_end, DV], [v_token, 1], [BLOCK_N, DV])
    masks = tl.make_tensor_descriptor(tiles_ptr, [tile_rows, RB], [RB, 1], [BLOCK_M, BLOCK_N])
    of_tile = ((tl.program_id(1) * num_heads + head) * places + tl.load(line_block_ptr + line) * RB + tile * ROWS).to(tl.int32)
    lse_log2 = numbers_by_row(lse_ptr, places * num_heads * tl.num_programs(1), of_tile, places, ROWS, STACK) * LOG2E
    delta = numbers_by_row(delta_ptr, places * num_heads * tl.num_programs(1), of_tile, places, ROWS, STACK)

    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for i in tl.range(full_from * PER, full_to * PER, num_stages=STAGES, warp_specialize=True):
        key = tl.load(key_start_ptr + tl.load(list_ptr + i // PER)) + i % PER * BLOCK_N
        k_tile, v_tile = k_rows.load([key, 0]), v_rows.load([key, 0])
        dq = dq_step(dq, q_tile, dout, k_tile, v_tile, lse_log2, delta, factor, cap_log2, True, CAPPED, False)
    dq += 0.0
    for i in tl.range(other_from * PER, other_to * PER, num_stages=OTHER_STAGES):
        key = tl.load(key_start_ptr + tl.load(list_ptr + full + i // PER)) + i % PER * BLOCK_N
        code = tl.load(codes_ptr + i // PER)
        k_tile, v_tile = k_rows.load([key, 0]), v_rows.load([key, 0])
        mask = masks.load([(code * SUBS + tile) * BLOCK_M, i % PER * BLOCK_N])
        dq = dq_step(dq, q_tile, dout, k_tile, v_tile, lse_log2, delta, factor, cap_log2, mask != 0, CAPPED, True)
    count = tl.load(line_length_ptr + line) - tile * ROWS
    store_stack(dq_ptr + batch * dq_batch, dq_head, dq_token, head, row, count, dq * scale, ROWS, STACK, D)


@triton.jit(do_not_specialize=UNCOUNTED)
def specialised_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, slot_dk_ptr, slot_dv_ptr,
    pieces_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    query_start_ptr, query_end_ptr,
    scale, factor, cap_log2, slots: tl.int32, lines: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, layout_heads: tl.int32,
    tokens: tl.int32, tile_rows: tl.int32, places: tl.int32,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, dout_batch: tl.int64, dout_token: tl.int64, dout_head: tl.int64,
    dk_batch: tl.int64, dk_token: tl.int64, dk_head: tl.int64, dv_batch: tl.int64, dv_token: tl.int64, dv_head: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr,
    SUBS: tl.constexpr, STAGES: tl.constexpr, OTHER_STAGES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """``dv = P^T dout`` and ``dk = scale * dS^T q`` of BLOCK_N = 128 keys; grid ``(pieces * SUBS, batch)``.

    Lines are key blocks, listed tokens queries, and mask tiles are tall in keys. The query heads of a group share their lists (a layout
    head serves whole groups), so one flat loop walks every listed tile once for each of them: loops inside loops do not compile. A piece
    counts entries over the whole group, and so takes its share of that flat walk. ``tokens`` counts the key tokens.
    """
    PER: tl.constexpr = RB // BLOCK_M
    number, tile = tl.program_id(0) // SUBS, tl.program_id(0) % SUBS
    item, full_from, full_to, other_from, other_to, slot = read_piece(pieces_ptr, number)
    kv_head, line = (item // lines).to(tl.int64), item % lines
    batch, group = tl.program_id(1).to(tl.int64), num_heads // num_kv_heads
    key = tl.load(line_start_ptr + line) + tile * BLOCK_N
    begin, full, _, codes_ptr = find_list((ptr_ptr, full_ptr, sub_at_ptr, sub_ptr), kv_head * layout_heads // num_kv_heads, line, lines, 1)
    list_ptr, query_end = idx_ptr + begin, tl.load(query_end_ptr + line)

    k_tile = tall_rows(k_ptr + batch * k_batch + kv_head * k_head, tokens, key, k_token, k_head, BLOCK_N, 1, D)
    v_tile = tall_rows(v_ptr + batch * v_batch + kv_head * v_head, tokens, key, v_token, v_head, BLOCK_N, 1, DV)
    # The heads of a group side by side: member m begins at column m * head stride.
    q_base, dout_base = q_ptr + batch * q_batch + kv_head * group * q_head, dout_ptr + batch * dout_batch + kv_head * group * dout_head
    q_columns, dout_columns = ((group - 1) * q_head + D).to(tl.int32), ((group - 1) * dout_head + DV).to(tl.int32)
    q_rows = tl.make_tensor_descriptor(q_base, [query_end, q_columns], [q_token, 1], [BLOCK_M, D])
    dout_rows = tl.make_tensor_descriptor(dout_base, [query_end, dout_columns], [dout_token, 1], [BLOCK_M, DV])
    masks = tl.make_tensor_descriptor(tiles_ptr, [tile_rows, RB], [RB, 1], [BLOCK_N, BLOCK_M])
    of_group = (batch * num_heads + kv_head * group) * places + tl.arange(0, BLOCK_M)

    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    for i in tl.range(full_from * PER, full_to * PER, num_stages=STAGES, warp_specialize=True):
        at, member = i // group, i % group
        block = tl.load(list_ptr + at // PER)
        row = tl.load(query_start_ptr + block) + at % PER * BLOCK_M
        q_tile, dout = q_rows.load([row, (member * q_head).to(tl.int32)]), dout_rows.load([row, (member * dout_head).to(tl.int32)])
        of_rows = of_group + member * places + block * RB + at % PER * BLOCK_M
        lse_log2, delta = tl.load(lse_ptr + of_rows) * LOG2E, tl.load(delta_ptr + of_rows)
        dk, dv = dkv_step(dk, dv, k_tile, v_tile, q_tile, dout, lse_log2, delta, factor, cap_log2, True, CAPPED, False)
    dk, dv = dk + 0.0, dv + 0.0
    for i in tl.range(other_from * PER, other_to * PER, num_stages=OTHER_STAGES):
        at, member = i // group, i % group
        block = tl.load(list_ptr + full + at // PER)
        row = tl.load(query_start_ptr + block) + at % PER * BLOCK_M
        q_tile, dout = q_rows.load([row, (member * q_head).to(tl.int32)]), dout_rows.load([row, (member * dout_head).to(tl.int32)])
        mask = masks.load([(tl.load(codes_ptr + at // PER) * SUBS + tile) * BLOCK_N, at % PER * BLOCK_M])
        of_rows = of_group + member * places + block * RB + at % PER * BLOCK_M
        lse_log2, delta = tl.load(lse_ptr + of_rows) * LOG2E, tl.load(delta_ptr + of_rows)
        dk, dv = dkv_step(dk, dv, k_tile, v_tile, q_tile, dout, lse_log2, delta, factor, cap_log2, mask != 0, CAPPED, True)
    # A result is written to one of two places; a branch around the stores would undo the cut, a mask does not.
    count = tl.where(slot < 0, tl.load(line_length_ptr + line) - tile * BLOCK_N, 0)
    store_stack(dk_ptr + batch * dk_batch, dk_head, dk_token, kv_head, key, count, dk * scale, BLOCK_N, 1, D)
    store_stack(dv_ptr + batch * dv_batch, dv_head, dv_token, kv_head, key, count, dv, BLOCK_N, 1, DV)
    first = slot_rows(batch, slots, slot, 1, 0, tile, SUBS, BLOCK_N)
    store_slot(slot_dk_ptr, first, dk, slot >= 0, BLOCK_N, D)
    store_slot(slot_dv_ptr, first, dv, slot >= 0, BLOCK_N, DV)
