"""The forward kernel: one program folds one piece of a list into one tile of query rows of one head."""

import triton
import triton.language as tl

from s2attn.kernels.pieces.address import listed_tokens, load_rows, store_rows
from s2attn.kernels.pieces.masks import allowed_pairs
from s2attn.kernels.pieces.scores import log2_logits
from s2attn.kernels.pieces.softmax import sink_logit, softmax_begin, softmax_end, softmax_step
from s2attn.kernels.pieces.work import find_list, program_of, read_piece, slot_rows, store_slot


@triton.jit
def attend(
    acc, m_i, l_i, q_tile, place, keys, values, listed, codes_ptr, tiles_ptr, first, last, factor, cap_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    RB: tl.constexpr, F: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold entries ``first .. last - 1`` of one part of a list into the running softmax; MASKED looks each pair up in its mask tile."""
    for position in range(first * RB, last * RB, BLOCK_N):
        key, lane, exists, entry, inside = listed_tokens(listed, position, last, RB, BLOCK_N)
        if MASKED:
            allowed = allowed_pairs(codes_ptr, tiles_ptr, entry, inside, place, exists, F, RB, BLOCK_N, False)
        else:
            allowed = exists[None, :]
        k_tile = load_rows(keys, key, lane, exists, BLOCK_D, D, MASKED or RB < BLOCK_N)
        v_tile = load_rows(values, key, lane, exists, BLOCK_DV, DV, MASKED or RB < BLOCK_N)
        scores = log2_logits(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), factor, cap_log2, CAPPED)
        if MASKED or RB < BLOCK_N:  # the last tile of several blocks may hold fewer than it has room for
            scores = tl.where(allowed, scores, float("-inf"))  # [BLOCK_M, BLOCK_N]
        acc, m_i, l_i = softmax_step(acc, m_i, l_i, scores, v_tile)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["slots", "lines", "num_heads", "num_kv_heads", "layout_heads", "lse_batch", "lse_head"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, lse_ptr, slot_out_ptr, slot_lse_ptr,
    pieces_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    key_start_ptr, key_length_ptr,
    factor, cap_log2, slots: tl.int32, lines: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, layout_heads: tl.int32,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, q_dim,
    k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64, k_dim,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, v_dim,
    out_batch: tl.int64, out_token: tl.int64, out_head: tl.int64, lse_batch: tl.int64, lse_head: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr, F: tl.constexpr, SUBS: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """``out = softmax(logits) v`` over listed blocks, and its lse; grid ``(pieces * SUBS * heads per layout head, batch)``.

    Full blocks are walked first and without masks; then the others.
    """
    number, member, tile = program_of(lines, num_heads, layout_heads, SUBS)
    item, full_from, full_to, other_from, other_to, slot = read_piece(pieces_ptr, number)
    layout_head, line, shared = item // lines, item % lines, num_heads // layout_heads
    batch, head = tl.program_id(1).to(tl.int64), (layout_head * shared + member).to(tl.int64)
    kv_head = head // (num_heads // num_kv_heads)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(line_start_ptr + line).to(tl.int64)
    row_exists = place < tl.load(line_length_ptr + line)
    q_tile = load_rows((q_ptr + batch * q_batch + head * q_head, q_token, q_dim), row, place, row_exists, BLOCK_D, D)

    begin, full, _, codes_ptr = find_list((ptr_ptr, full_ptr, sub_at_ptr, sub_ptr), layout_head, line, lines, F)
    keys = (k_ptr + batch * k_batch + kv_head * k_head, k_token, k_dim)
    values = (v_ptr + batch * v_batch + kv_head * v_head, v_token, v_dim)
    m_i, l_i = softmax_begin(sink_logit(sinks_ptr, head, slot < 0, SINKS), BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc, m_i, l_i = attend(
        acc, m_i, l_i, q_tile, place, keys, values, (idx_ptr + begin, key_start_ptr, key_length_ptr), codes_ptr, tiles_ptr,
        full_from, full_to, factor, cap_log2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, RB, F, CAPPED, False,
    )  # fmt: skip
    acc, m_i, l_i = attend(
        acc, m_i, l_i, q_tile, place, keys, values, (idx_ptr + begin + full, key_start_ptr, key_length_ptr), codes_ptr, tiles_ptr,
        other_from, other_to, factor, cap_log2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, RB, F, CAPPED, True,
    )  # fmt: skip

    out, lse = softmax_end(acc, m_i, l_i)
    if slot < 0:
        store_rows(out_ptr + batch * out_batch + head * out_head, row, place, row_exists, out_token, out, BLOCK_DV, DV)
        tl.store(lse_ptr + batch * lse_batch + head * lse_head + row + place, lse, mask=row_exists)
    else:
        first = slot_rows(batch, slots, slot, shared, member, tile, SUBS, BLOCK_M)
        store_slot(slot_out_ptr, first, out, True, BLOCK_M, BLOCK_DV)
        tl.store(slot_lse_ptr + first + tl.arange(0, BLOCK_M), lse)
