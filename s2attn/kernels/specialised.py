"""The forward kernel in the form that Triton cuts into a loading warp group and two computing ones (sm_90).

Loads travel ahead of the products through the tensor memory accelerator, and while one computing warp group is in its softmax the other
can use the tensor cores. Triton 3.6 makes that cut by itself, and only for a kernel that keeps to a narrow form; outside it, it fails or
(worse) drops the cut without a word. `tests/compile` therefore asks every build whether the cut was made. The form:

* ``num_warps=4``; with another number the cut is silently not made.
* A tile has 128 query rows: the two computing warp groups take 64 each. They are 128 neighbours (``ROWS = 128``), or the same 64 tokens
  of two query heads that read the same keys (``ROWS = 64, STACK = 2``), which keeps the granularity of 64 and repeats no work.
* Whatever reaches a product (queries, keys, values, mask tiles) is loaded by descriptors made in the kernel. A load through pointers of
  128 elements or more that reaches a product does not compile; loads of fewer (the index) do, in whichever warp group needs them.
* No branch anywhere, and no loop inside a loop: what is not wanted is masked. Full and other entries have a loop each, and only the
  first is marked.
* What the second loop starts from must be *computed* from what the first one leaves; handed over untouched it does not compile. Adding 0.0
  is enough, and is not folded away.
* No reshape, join or concatenation of tiles. So two heads are stacked by loading each into a box of 128 rows (the other half is thrown
  away), and the mask of all 128 rows is one tile of a table that the launcher prepares.

Rows of a descriptor that lie beyond its end read as zero. Keys end with their own sequence, so a short block reads nothing of the next one.
"""

import triton
import triton.language as tl

from s2attn.kernels.pieces.scores import log2_logits
from s2attn.kernels.pieces.softmax import sink_logit, softmax_begin, softmax_end, softmax_step
from s2attn.kernels.pieces.work import find_list, program_of, read_piece


@triton.jit
def tall_rows(head_ptr, tokens, row, stride_token, stride_head, ROWS: tl.constexpr, STACK: tl.constexpr, D: tl.constexpr):
    """ROWS tokens of one head from ``row`` on, or of STACK = 2 neighbouring heads one below the other."""
    tile = tl.make_tensor_descriptor(head_ptr, [tokens, D], [stride_token, 1], [ROWS * STACK, D]).load([row, 0])
    if STACK == 2:
        below = tl.make_tensor_descriptor(head_ptr + stride_head, [tokens, D], [stride_token, 1], [ROWS * STACK, D])
        tile = tl.where((tl.arange(0, ROWS * STACK) < ROWS)[:, None], tile, below.load([row - ROWS, 0]))
    return tile


@triton.jit
def which_stack(pieces_ptr, lines, num_heads, layout_heads, SUBS: tl.constexpr, STACK: tl.constexpr):
    """This program's line, tile, layout head, first query head of its stack, and the entries of its list (the whole of it)."""
    number, member, tile = program_of(lines, num_heads // STACK, layout_heads, SUBS)
    item, full_from, full_to, other_from, other_to, _ = read_piece(pieces_ptr, number)
    layout_head = item // lines
    head = (layout_head * (num_heads // layout_heads) + member * STACK).to(tl.int64)
    return item % lines, tile, layout_head, head, full_from, full_to, other_from, other_to


@triton.jit
def store_stack(out_ptr, head_stride, token_stride, head, row, count, values, ROWS: tl.constexpr, STACK: tl.constexpr, WIDTH: tl.constexpr):
    """Write the first ``count`` of ROWS tokens from ``row`` on of every head of a stack."""
    lane = tl.arange(0, ROWS * STACK)
    token, member = (row + lane % ROWS).to(tl.int64), head + lane // ROWS
    rows = out_ptr + (member * head_stride + token * token_stride)[:, None]
    tl.store(rows + tl.arange(0, WIDTH)[None, :], values.to(out_ptr.dtype.element_ty), mask=(lane % ROWS < count)[:, None])


@triton.jit(do_not_specialize=["lines", "num_heads", "num_kv_heads", "layout_heads", "tokens", "tile_rows", "lse_batch", "lse_head"])
def specialised_forward_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, lse_ptr,
    pieces_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, tiles_ptr,
    key_start_ptr, key_end_ptr,
    factor, cap_log2, lines: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, layout_heads: tl.int32,
    tokens: tl.int32, tile_rows: tl.int32,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64, out_batch: tl.int64, out_token: tl.int64, out_head: tl.int64,
    lse_batch: tl.int64, lse_head: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, STACK: tl.constexpr, BLOCK_N: tl.constexpr, RB: tl.constexpr,
    SUBS: tl.constexpr, STAGES: tl.constexpr, OTHER_STAGES: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """``out = softmax(logits) v`` and its lse; grid ``(pieces * SUBS * heads per layout head / STACK, batch)``.

    The arguments are those of `s2attn.kernels.forward.forward_kernel`, except that

    * the innermost strides are 1, all other strides and addresses multiples of 16 bytes, D and DV powers of two, RB >= BLOCK_N;
    * ``sub_ptr`` has one code per other entry, the number of a tall mask tile in ``tiles_ptr``: ``SUBS * ROWS * STACK`` rows of RB bytes,
      so ``tile_rows`` rows in all;
    * ``key_end_ptr`` has, for each line, the first token after the keys of its sequence; ``tokens`` counts the query tokens;
    * no list is cut: a tile of float32 partial results would have to pass through shared memory, of which nothing is left;
    * full entries are loaded STAGES tiles ahead, the others OTHER_STAGES ahead, each loop in shared memory of its own.
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
    k_rows = tl.make_tensor_descriptor(k_ptr + batch * k_batch + kv_head * k_head, [key_end, D], [k_token, 1], [BLOCK_N, D])
    v_rows = tl.make_tensor_descriptor(v_ptr + batch * v_batch + kv_head * v_head, [key_end, DV], [v_token, 1], [BLOCK_N, DV])
    masks = tl.make_tensor_descriptor(tiles_ptr, [tile_rows, RB], [RB, 1], [BLOCK_M, BLOCK_N])

    sink = sink_logit(sinks_ptr, head, True, SINKS)
    if SINKS and STACK == 2:
        sink = tl.where(tl.arange(0, BLOCK_M) < ROWS, sink, sink_logit(sinks_ptr, head + 1, True, SINKS))
    m_i, l_i = softmax_begin(sink, BLOCK_M)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    for i in tl.range(full_from * PER, full_to * PER, num_stages=STAGES, warp_specialize=True):
        key = tl.load(key_start_ptr + tl.load(list_ptr + i // PER)) + i % PER * BLOCK_N
        k_tile, v_tile = k_rows.load([key, 0]), v_rows.load([key, 0])
        scores = log2_logits(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), factor, cap_log2, CAPPED)
        acc, m_i, l_i = softmax_step(acc, m_i, l_i, scores, v_tile)
    # The compiler must see the second loop start from computed values (see the module's docstring).
    acc, m_i, l_i = acc + 0.0, m_i + 0.0, l_i + 0.0
    for i in tl.range(other_from * PER, other_to * PER, num_stages=OTHER_STAGES):
        key = tl.load(key_start_ptr + tl.load(list_ptr + full + i // PER)) + i % PER * BLOCK_N
        code = tl.load(codes_ptr + i // PER)
        k_tile, v_tile = k_rows.load([key, 0]), v_rows.load([key, 0])
        mask = masks.load([(code * SUBS + tile) * BLOCK_M, i % PER * BLOCK_N])
        scores = log2_logits(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), factor, cap_log2, CAPPED)
        acc, m_i, l_i = softmax_step(acc, m_i, l_i, tl.where(mask != 0, scores, float("-inf")), v_tile)

    out, lse = softmax_end(acc, m_i, l_i)
    count = tl.load(line_length_ptr + line) - tile * ROWS
    lane = tl.arange(0, BLOCK_M)
    store_stack(out_ptr + batch * out_batch, out_head, out_token, head, row, count, out, ROWS, STACK, DV)
    of_rows = lse_ptr + batch * lse_batch + (head + lane // ROWS) * lse_head + row + lane % ROWS
    tl.store(of_rows, lse, mask=lane % ROWS < count)
