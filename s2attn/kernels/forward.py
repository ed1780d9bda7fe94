"""The forward kernel: one program computes one tile of query rows of one head."""

import triton
import triton.language as tl

from s2attn.kernels.pieces.address import listed_tokens, load_rows, store_rows
from s2attn.kernels.pieces.masks import allowed_pairs
from s2attn.kernels.pieces.softmax import softmax_end, softmax_step


@triton.jit
def which_tile(order_ptr, lines, num_heads, layout_heads, SUBS: tl.constexpr):
    """This program's work: batch, query head, layout head, line of the index, and tile of that line.

    Programs that differ only in the query heads of one layout head are neighbours: they read the same keys.
    """
    program = tl.program_id(0)
    shared = num_heads // layout_heads
    item = tl.load(order_ptr + program // (SUBS * shared))
    tile = program // shared % SUBS
    layout_head = item // lines
    return tl.program_id(1), layout_head * shared + program % shared, layout_head, item % lines, tile


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    order_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    key_start_ptr, key_length_ptr,
    scale_log2, lines, num_heads, num_kv_heads, layout_heads,
    q_batch, q_token, q_head, q_dim, k_batch, k_token, k_head, k_dim, v_batch, v_token, v_head, v_dim,
    out_batch, out_token, out_head, lse_batch, lse_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr, F: tl.constexpr, SUBS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = softmax(scale * q k^T) v`` over listed blocks, and its lse; grid ``(items * SUBS * heads per layout head, batch)``.

    Full blocks are walked first and without masks; then the others, each pair looked up in its mask tile.
    """
    batch, head, layout_head, line, tile = which_tile(order_ptr, lines, num_heads, layout_heads, SUBS)
    batch, head, kv_head = batch.to(tl.int64), head.to(tl.int64), (head // (num_heads // num_kv_heads)).to(tl.int64)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(line_start_ptr + line).to(tl.int64)
    row_exists = place < tl.load(line_length_ptr + line)
    q_tile = load_rows(q_ptr + batch * q_batch + head * q_head, row, place, row_exists, q_token, q_dim, BLOCK_D, D)

    at = layout_head.to(tl.int64) * (lines + 1) + line
    begin, end = tl.load(ptr_ptr + at), tl.load(ptr_ptr + at + 1)
    full = tl.load(full_ptr + layout_head.to(tl.int64) * lines + line)
    others = (end - begin).to(tl.int32) - full
    codes_ptr = sub_ptr + tl.load(sub_at_ptr + layout_head.to(tl.int64) * lines + line) * F
    k_base, v_base = k_ptr + batch * k_batch + kv_head * k_head, v_ptr + batch * v_batch + kv_head * v_head

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for position in range(0, full * RB, BLOCK_N):
        key, lane, exists, _, _ = listed_tokens(idx_ptr + begin, key_start_ptr, key_length_ptr, position, full, RB, BLOCK_N)
        k_tile = load_rows(k_base, key, lane, exists, k_token, k_dim, BLOCK_D, D, RB < BLOCK_N)
        v_tile = load_rows(v_base, key, lane, exists, v_token, v_dim, BLOCK_DV, DV, RB < BLOCK_N)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        if RB < BLOCK_N:  # the last tile may hold fewer blocks than it has room for
            scores = tl.where(exists[None, :], scores, float("-inf"))
        acc, m_i, l_i = softmax_step(acc, m_i, l_i, scores, v_tile, PRECISION)
    for position in range(0, others * RB, BLOCK_N):
        key, lane, exists, entry, inside = listed_tokens(
            idx_ptr + begin + full, key_start_ptr, key_length_ptr, position, others, RB, BLOCK_N
        )
        allowed = allowed_pairs(codes_ptr, tiles_ptr, entry, inside, place, exists, F, RB, BLOCK_N, False)
        k_tile = load_rows(k_base, key, lane, exists, k_token, k_dim, BLOCK_D, D)
        v_tile = load_rows(v_base, key, lane, exists, v_token, v_dim, BLOCK_DV, DV)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
        acc, m_i, l_i = softmax_step(acc, m_i, l_i, tl.where(allowed, scores, float("-inf")), v_tile, PRECISION)

    out, lse = softmax_end(acc, m_i, l_i)
    store_rows(out_ptr + batch * out_batch + head * out_head, row, place, row_exists, out_token, out, BLOCK_DV, DV)
    tl.store(lse_ptr + batch * lse_batch + head * lse_head + row + place, lse, mask=row_exists)
