"""dq on Hopper: a producer warp walks a row's list, two consumer warpgroups hold 64 query rows each and read the same keys.

The two consumers have the same 64 tokens of two query heads with one list (``STACK = 2``), the halves of 128 rows of one block
(``RB >= 128``), or two neighbouring query blocks over the union of their lists (``F = 2``). Only in the last form can an entry be absent
for a consumer: it waits for the tiles and lets them go. It must wait, or it could let go of one stage twice before the other does so once.

Over full entries a consumer asks for dP of one step and S of the next before it computes P, so that the tensor cores have work meanwhile;
the other consumer fills what gaps are left. Other entries, which are few, are taken one by one.
"""

from s2attn.kernels.hopper.names import copy_in, fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from s2attn.kernels.hopper.parts import ROWS, WORD, allowed_bits, barriers, probabilities, rows_of_heads, store_rows
from s2attn.kernels.pieces.scores import LOG2E, product_gradient
from s2attn.kernels.pieces.work import find_list, program_of, read_piece, slot_rows

ABSENT: gl.constexpr = gl.constexpr(-2)


@gluon.jit
def load_row_tiles(q_of, dout_of, row, D: gl.constexpr, DV: gl.constexpr, STACK: gl.constexpr):
    """Ask for the rows of q and dout of both consumers: two tiles of each, and the barrier that says that all are there."""
    q_rows = rows_of_heads(q_of, STACK, ROWS, D)
    dout_rows = rows_of_heads(dout_of, STACK, ROWS, DV)
    q_tiles = gl.allocate_shared_memory(q_rows.dtype, [2, ROWS, D], q_rows.layout)
    dout_tiles = gl.allocate_shared_memory(dout_rows.dtype, [2, ROWS, DV], dout_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    mbarrier.expect(ready, 2 * q_rows.block_type.nbytes + 2 * dout_rows.block_type.nbytes)
    for i in gl.static_range(2):
        below, member = i * ROWS * (2 - STACK), i * (STACK - 1)
        copy_in(q_rows, [row + below, (member * q_of[3]).to(gl.int32)], ready, q_tiles.index(i))
        copy_in(dout_rows, [row + below, (member * dout_of[3]).to(gl.int32)], ready, dout_tiles.index(i))
    return q_tiles, dout_tiles, ready


@gluon.jit
def make_ring(k_rows, v_rows, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, DV: gl.constexpr):
    """STAGES tiles of keys and of values, with a barrier each for "loaded", and one for "let go by both consumers"."""
    k_ring = gl.allocate_shared_memory(k_rows.dtype, [STAGES, BLOCK_N, D], k_rows.layout)
    v_ring = gl.allocate_shared_memory(v_rows.dtype, [STAGES, BLOCK_N, DV], v_rows.layout)
    return k_ring, v_ring, barriers(STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2)


@gluon.jit
def key_of(step, lists, walk, PER: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first key token of a step of the flat walk: full entries, then the others."""
    list_ptr, key_start_ptr = lists
    full_steps, _, to_full, to_other = walk
    at = step + gl.where(step < full_steps, to_full, to_other)
    return gl.load(key_start_ptr + gl.load(list_ptr + at // PER)) + at % PER * BLOCK_N


@gluon.jit
def dq_producer(k_rows, v_rows, ring, lists, walk, STAGES: gl.constexpr, PER: gl.constexpr, BLOCK_N: gl.constexpr):
    """Load keys and values of every step; the token of the next step is looked up before this one waits."""
    k_ring, v_ring, k_ready, v_ready, empty = ring
    steps = walk[0] + walk[1]
    if steps > 0:
        key = key_of(0, lists, walk, PER, BLOCK_N)
        for step in range(steps):
            following = key_of(gl.minimum(step + 1, steps - 1), lists, walk, PER, BLOCK_N)
            stage, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), k_rows.block_type.nbytes)
            copy_in(k_rows, [key, 0], k_ready.index(stage), k_ring.index(stage))
            mbarrier.expect(v_ready.index(stage), v_rows.block_type.nbytes)
            copy_in(v_rows, [key, 0], v_ready.index(stage), v_ring.index(stage))
            key = following


@gluon.jit
def start_scores(tile, ring, of, step, zeros, STAGES: gl.constexpr):
    """Start S (``of = 0``: q and keys) or dP (1: dout and values) of one step as soon as its tile is there."""
    stage, phase = step % STAGES, step // STAGES & 1
    mbarrier.wait(ring[2 + of].index(stage), phase)
    return warpgroup_mma(tile, ring[of].index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def fold_scores(dq, ds, ring, step, operand: gl.constexpr, STAGES: gl.constexpr):
    """Start ``dS k`` of one step on top of dq."""
    k_ring = ring[0]
    return warpgroup_mma(gl.convert_layout(ds.to(k_ring.dtype), operand), k_ring.index(step % STAGES), dq, is_async=True)


@gluon.jit
def dq_full(dq, q_smem, dout_smem, ring, steps, rows, scaling, zeros, operand: gl.constexpr, STAGES: gl.constexpr, CAPPED: gl.constexpr):
    """Fold every full step into dq: while P of one step is computed, its dP and S of the next are under way.

    Nothing is in flight from one round of the loop to the next: the assembler would wait after every product.
    """
    minus_lse_log2, delta = rows
    factor, cap_log2 = scaling
    s = warpgroup_mma_wait(0, deps=[start_scores(q_smem, ring, 0, 0, zeros, STAGES)])
    for step in range(steps - 1):
        dp = start_scores(dout_smem, ring, 1, step, zeros, STAGES)
        following = start_scores(q_smem, ring, 0, step + 1, zeros, STAGES)
        p, logits = probabilities(s, minus_lse_log2[:, None], factor, cap_log2, True, CAPPED, False)
        dp = warpgroup_mma_wait(1, deps=[dp])
        total = fold_scores(dq, product_gradient(p * (dp - delta[:, None]), logits, cap_log2, CAPPED), ring, step, operand, STAGES)
        s = warpgroup_mma_wait(1, deps=[following])
        dq = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(ring[4].index(step % STAGES), count=1)
    dp = start_scores(dout_smem, ring, 1, steps - 1, zeros, STAGES)
    p, logits = probabilities(s, minus_lse_log2[:, None], factor, cap_log2, True, CAPPED, False)
    return last_of_step(dq, p, dp, logits, delta, cap_log2, ring, steps - 1, operand, STAGES, CAPPED)


@gluon.jit
def last_of_step(dq, p, dp, logits, delta, cap_log2, ring, step, operand: gl.constexpr, STAGES: gl.constexpr, CAPPED: gl.constexpr):
    """What is left of a step when P is known and dP is the only product in flight; its tiles are let go."""
    dp = warpgroup_mma_wait(0, deps=[dp])
    total = fold_scores(dq, product_gradient(p * (dp - delta[:, None]), logits, cap_log2, CAPPED), ring, step, operand, STAGES)
    dq = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(ring[4].index(step % STAGES), count=1)
    return dq


@gluon.jit
def dq_others(
    dq, q_smem, dout_smem, ring, walk, rows, scaling, zeros, exists, codes_ptr, words_ptr,
    operand: gl.constexpr, across_layout: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, RB: gl.constexpr, F: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Fold the other entries into dq; ``words_ptr`` points to the words of this consumer's rows in mask tile 0."""
    PER: gl.constexpr = RB // BLOCK_N
    minus_lse_log2, delta = rows
    factor, cap_log2 = scaling
    across = gl.arange(0, BLOCK_N, across_layout)
    for i in range(walk[1]):
        step = walk[0] + i
        stage, phase = step % STAGES, step // STAGES & 1
        code = gl.load(codes_ptr + i // PER * F)
        if code == ABSENT:
            mbarrier.wait(ring[2].index(stage), phase)
            mbarrier.wait(ring[3].index(stage), phase)
            mbarrier.arrive(ring[4].index(stage), count=1)
        else:
            # A block that the other row of the group does not see in full may be full for this one: no words, all ones.
            first = words_ptr + gl.maximum(code, 0).to(gl.int64) * (RB * RB // WORD) + i % PER * (BLOCK_N // WORD)
            allowed = allowed_bits(first, exists & (code >= 0), across, BLOCK_N)
            s = start_scores(q_smem, ring, 0, step, zeros, STAGES)
            dp = start_scores(dout_smem, ring, 1, step, zeros, STAGES)
            s = warpgroup_mma_wait(1, deps=[s])
            p, logits = probabilities(s, minus_lse_log2[:, None], factor, cap_log2, allowed, CAPPED, True)
            dq = last_of_step(dq, p, dp, logits, delta, cap_log2, ring, step, operand, STAGES, CAPPED)
    return dq


@gluon.jit
def dq_consumer(
    which, row_tiles, ring, walk, row_of, codes_ptr, words_ptr, scaling, out,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, RB: gl.constexpr, F: gl.constexpr, D: gl.constexpr, CAPPED: gl.constexpr,
    STACK: gl.constexpr,
):  # fmt: skip
    """dq of 64 rows: those of the first or of the second of the two tiles; ``out`` and ``row_of`` point to the first one's."""
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    q_tiles, dout_tiles, rows_ready = row_tiles
    lse_ptr, delta_ptr, lse_head, place, count = row_of
    dq_ptr, dq_token, dq_head, scale, slot_ptr, slot_head, in_slot = out
    head, below = which * (STACK - 1), which * ROWS * (2 - STACK)

    lane, place = below + gl.arange(0, ROWS, gl.SliceLayout(1, mma_s)), place + below
    exists = lane < count
    minus_lse_log2 = gl.load(lse_ptr + head * lse_head + lane, mask=exists, other=float("inf")) * -LOG2E
    delta = gl.load(delta_ptr + head * lse_head + lane, mask=exists, other=0.0)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, mma_s)
    dq = gl.zeros([ROWS, D], gl.float32, mma_o)
    q_smem, dout_smem, rows = q_tiles.index(which), dout_tiles.index(which), (minus_lse_log2, delta)
    mbarrier.wait(rows_ready, 0)
    if walk[0] > 0:
        dq = dq_full(dq, q_smem, dout_smem, ring, walk[0], rows, scaling, zeros, operand, STAGES, CAPPED)
    words_ptr += (place % RB + lane - below) * (RB // WORD)
    dq = dq_others(
        dq, q_smem, dout_smem, ring, walk, rows, scaling, zeros, exists, codes_ptr + place // RB, words_ptr, operand,
        gl.SliceLayout(0, mma_s), STAGES, BLOCK_N, RB, F, CAPPED,
    )  # fmt: skip
    if in_slot:
        store_rows(slot_ptr + (head * slot_head + below) * D, D, dq, ROWS, D, mma_o)
    else:
        store_rows(dq_ptr + head * dq_head + below * dq_token, dq_token, dq * scale, count - below, D, mma_o)


@gluon.jit(do_not_specialize=["slots", "lines", "num_heads", "num_kv_heads", "layout_heads", "tokens", "lse_batch", "lse_head"])
def hopper_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, slot_dq_ptr,
    pieces_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, words_ptr,
    key_start_ptr, key_end_ptr,
    scale, factor, cap_log2, slots, lines, num_heads, num_kv_heads, layout_heads, tokens,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dout_batch, dout_token, dout_head,
    dq_batch, dq_token, dq_head, lse_batch, lse_head,
    D: gl.constexpr, DV: gl.constexpr, STACK: gl.constexpr, BLOCK_N: gl.constexpr, RB: gl.constexpr, F: gl.constexpr,
    SUBS: gl.constexpr, STAGES: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """``dq = scale * dS k`` over the listed blocks of each row; grid ``(pieces * SUBS * heads per layout head / STACK, batch)``.

    The arguments are those of `s2attn.kernels.backward.dq_kernel`, except that

    * the innermost strides are 1, all other strides and addresses multiples of 16 bytes, D and DV 64 or 128, RB >= BLOCK_N;
    * a tile has 128 rows: F = 2 neighbouring blocks, or STACK = 2 query heads with one list, or one of the SUBS tiles of a block;
    * ``words_ptr`` has the mask tiles ``[tile, query, key]`` as 32-bit words along the keys;
    * ``key_end_ptr`` has, for each line, the first token after the keys of its sequence; ``tokens`` counts the query tokens.
    """
    gl.static_assert(STAGES >= 2, "K of a step stays in its stage while the next step is asked for")
    LINE: gl.constexpr = 2 * ROWS // STACK
    PER: gl.constexpr = RB // BLOCK_N
    number, member, tile = program_of(lines, num_heads // STACK, layout_heads, SUBS)
    item, full_from, full_to, other_from, other_to, slot = read_piece(pieces_ptr, number)
    shared, layout_head, line = num_heads // layout_heads, item // lines, item % lines
    batch, head = gl.program_id(1).to(gl.int64), (layout_head * shared + member * STACK).to(gl.int64)
    kv_head = head // (num_heads // num_kv_heads)
    begin, full, _, codes_ptr = find_list((ptr_ptr, full_ptr, sub_at_ptr, sub_ptr), layout_head, line, lines, F)
    place, key_end = tile * LINE, gl.load(key_end_ptr + line)
    row, count = gl.load(line_start_ptr + line) + place, gl.load(line_length_ptr + line) - place

    q_of = (q_ptr + batch * q_batch + head * q_head, tokens, q_token, q_head)
    dout_of = (dout_ptr + batch * dout_batch + head * dout_head, tokens, dout_token, dout_head)
    row_tiles = load_row_tiles(q_of, dout_of, row, D, DV, STACK)
    k_rows = rows_of_heads((k_ptr + batch * k_batch + kv_head * k_head, key_end, k_token, k_head), 1, BLOCK_N, D)
    v_rows = rows_of_heads((v_ptr + batch * v_batch + kv_head * v_head, key_end, v_token, v_head), 1, BLOCK_N, DV)
    ring = make_ring(k_rows, v_rows, STAGES, BLOCK_N, D, DV)

    full_steps, other_steps = (full_to - full_from) * PER, (other_to - other_from) * PER
    walk = (full_steps, other_steps, full_from * PER, (full + other_from) * PER - full_steps)
    at = batch * lse_batch + head * lse_head + row
    row_of = (lse_ptr + at, delta_ptr + at, lse_head, place, count)
    first = slot_rows(batch, slots, slot, shared, member * STACK, tile, SUBS, LINE)
    to_dq = dq_ptr + batch * dq_batch + head * dq_head + row * dq_token
    out = (to_dq, dq_token, dq_head, scale, slot_dq_ptr + first * D, SUBS * LINE, slot >= 0)
    codes_ptr, scaling = codes_ptr + other_from * F, (factor, cap_log2)
    gl.warp_specialize([
        (dq_consumer, (0, row_tiles, ring, walk, row_of, codes_ptr, words_ptr, scaling, out, STAGES, BLOCK_N, RB, F, D, CAPPED, STACK)),
        (dq_consumer, (1, row_tiles, ring, walk, row_of, codes_ptr, words_ptr, scaling, out, STAGES, BLOCK_N, RB, F, D, CAPPED, STACK)),
        (dq_producer, (k_rows, v_rows, ring, (idx_ptr + begin, key_start_ptr), walk, STAGES, PER, BLOCK_N)),
    ], [4, 1], [240, 24])  # fmt: skip
