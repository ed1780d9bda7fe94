"""dq for Hopper: one program takes two tiles of 64 query rows at a time and goes on to its next two when they are done.

The two consumers have the same 64 tokens of two query heads with one list, the halves of 128 rows of one block, or two neighbouring query
blocks over the union of their lists. Only in the last form can an entry be absent for a consumer: it waits for the tiles and lets them go.

Over full entries a consumer asks for dP of one step and S of the next before it computes P, so that the tensor cores have work meanwhile;
the other consumer fills what gaps are left. Other entries, which are few, are taken one by one.
"""

from s2attn.kernels.hopper.names import (
    copy_in,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from s2attn.kernels.hopper.parts import ROWS, barriers, landed, probabilities, store_rows
from s2attn.kernels.hopper.pieces import ABSENT, advance, allowed_keys, in_turn, kept_here, read_work, rows_of
from s2attn.kernels.pieces.scores import LOG2E, product_gradient


@gluon.jit
def load_keys(
    k_rows, v_rows, batch, kv_head, list_ptr, tiles, stage, phase, rings, bars,
    BLOCK_N: gl.constexpr, PER: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Load keys and values of every tile of a list; the token of the next tile is looked up before this one waits for its place."""
    _, _, k_ring, v_ring = rings
    _, _, k_ready, v_ready, empty = bars
    if tiles > 0:
        key = gl.load(list_ptr)
        for j in range(tiles):
            after = gl.minimum(j + 1, tiles - 1)
            following = gl.load(list_ptr + after // PER) + after % PER * BLOCK_N
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), k_rows.block_type.nbytes)
            copy_in(k_rows, [batch, kv_head, key, 0], k_ready.index(stage), k_ring.index(stage))
            mbarrier.expect(v_ready.index(stage), v_rows.block_type.nbytes)
            copy_in(v_rows, [batch, kv_head, key, 0], v_ready.index(stage), v_ring.index(stage))
            stage, phase = advance(stage, phase, RING)
            key = following
    return stage, phase


@gluon.jit
def load_dq(
    pointers, strides, work_ptr, keys_ptr, extents, rings, bars,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, RB: gl.constexpr, STACK: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, Q_RING: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The producer: q and dout of both consumers, then keys and values of every listed tile; it runs ahead into the next items."""
    q_ptr, k_ptr, v_ptr, dout_ptr = pointers
    q_strides, k_strides, v_strides, dout_strides = strides
    items, batches, num_heads, num_kv_heads, layout_heads, tokens, key_tokens = extents
    q_ring, dout_ring, k_ring, v_ring = rings
    rows_ready, rows_empty, k_ready, v_ready, _ = bars
    PER: gl.constexpr = RB // BLOCK_N
    shared = num_heads // layout_heads
    q_layout: gl.constexpr = q_ring.layout
    dout_layout: gl.constexpr = dout_ring.layout
    k_layout: gl.constexpr = k_ring.layout
    v_layout: gl.constexpr = v_ring.layout
    q_rows = rows_of(q_ptr, (batches, num_heads, tokens), q_strides, ROWS, D, q_layout)
    dout_rows = rows_of(dout_ptr, (batches, num_heads, tokens), dout_strides, ROWS, DV, dout_layout)
    all_k = rows_of(k_ptr, (batches, num_kv_heads, key_tokens), k_strides, BLOCK_N, D, k_layout)
    all_v = rows_of(v_ptr, (batches, num_kv_heads, key_tokens), v_strides, BLOCK_N, DV, v_layout)
    stage, phase, turn, turn_phase = 0, 1, 0, 1
    step = gl.program_id(0)
    while step < items:
        batch, member, tile, at = read_work(in_turn(step, items), work_ptr, batches, shared // STACK, SUBS)
        head = gl.load(at).to(gl.int32) * shared + member * STACK
        row = gl.load(at + 1).to(gl.int32) + tile * (2 * ROWS // STACK)
        list_ptr, tiles = keys_ptr + gl.load(at + 3), (gl.load(at + 4) + gl.load(at + 5)).to(gl.int32) * PER
        kv_head = head // (num_heads // num_kv_heads)
        for which in gl.static_range(2):
            place, of_head, from_row = turn * 2 + which, head + which * (STACK - 1), row + which * ROWS * (2 - STACK)
            mbarrier.wait(rows_empty.index(place), turn_phase)
            mbarrier.expect(rows_ready.index(place), q_rows.block_type.nbytes + dout_rows.block_type.nbytes)
            copy_in(q_rows, [batch, of_head, from_row, 0], rows_ready.index(place), q_ring.index(place))
            copy_in(dout_rows, [batch, of_head, from_row, 0], rows_ready.index(place), dout_ring.index(place))
        if PACKED:
            # Keys end with their own sequence, so that nothing of the next one is read. A descriptor has one place in memory: the copies
            # through the old one must have landed.
            landed(k_ready, stage, phase, RING)
            landed(v_ready, stage, phase, RING)
            key_end = gl.load(at + 7).to(gl.int32)
            k_rows = rows_of(k_ptr, (batches, num_kv_heads, key_end), k_strides, BLOCK_N, D, k_layout)
            v_rows = rows_of(v_ptr, (batches, num_kv_heads, key_end), v_strides, BLOCK_N, DV, v_layout)
            stage, phase = load_keys(k_rows, v_rows, batch, kv_head, list_ptr, tiles, stage, phase, rings, bars, BLOCK_N, PER, RING)
        else:
            stage, phase = load_keys(all_k, all_v, batch, kv_head, list_ptr, tiles, stage, phase, rings, bars, BLOCK_N, PER, RING)
        turn, turn_phase = advance(turn, turn_phase, Q_RING)
        step += gl.num_programs(0)


@gluon.jit
def start_scores(rows, own, ring, ready, stage, phase, zeros):
    """Start S (of q and keys) or dP (of dout and values) of one tile as soon as it is there.

    Where the rows lie is worked out anew: the addresses of a whole tile are more than the registers that hold them through a loop.
    """
    mbarrier.wait(ready.index(stage), phase)
    own = kept_here(gl.to_tensor(own).to(gl.int64)).to(gl.int32)
    tile = rows.index(own).reshape([rows.shape[3], rows.shape[4]])
    listed = ring.index(stage).reshape([ring.shape[3], ring.shape[4]]).permute((1, 0))
    return warpgroup_mma(tile, listed, zeros, use_acc=False, is_async=True)


@gluon.jit
def fold_scores(dq, ds, k_ring, stage, OPERAND: gl.constexpr):
    """Start ``dS k`` of one tile on top of dq."""
    listed = k_ring.index(stage).reshape([k_ring.shape[3], k_ring.shape[4]])
    return warpgroup_mma(gl.convert_layout(ds.to(k_ring.dtype), OPERAND), listed, dq, is_async=True)


@gluon.jit
def last_products(
    dq, p, logits, dp, delta, cap_log2, allowed, keys, stage, OPERAND: gl.constexpr, CAPPED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What is left of a tile when P is known and dP is the only product under way; it is let go."""
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = product_gradient(p * (dp - delta[:, None]), logits, cap_log2, CAPPED)  # [ROWS, BLOCK_N]
    if MASKED:
        ds = gl.where(allowed, ds, 0.0)  # 0 times an infinite dP would not be 0
    dq = warpgroup_mma_wait(0, deps=[fold_scores(dq, ds, keys[0], stage, OPERAND)])
    mbarrier.arrive(keys[4].index(stage), count=1)
    return dq


@gluon.jit
def fold_full(dq, row_rings, own, tiles, stage, phase, keys, rows, scores, zeros, OPERAND: gl.constexpr, RING: gl.constexpr,
              CAPPED: gl.constexpr):  # fmt: skip
    """Fold at least one tile that is seen in full: while P of one is computed, its dP and S of the next are under way.

    Nothing is under way from one round of the loop to the next: the assembler would wait after every product.
    """
    q_ring, dout_ring = row_rings
    k_ring, v_ring, k_ready, v_ready, empty = keys
    minus_lse_log2, delta = rows
    factor, cap_log2 = scores
    s = warpgroup_mma_wait(0, deps=[start_scores(q_ring, own, k_ring, k_ready, stage, phase, zeros)])
    for _ in range(tiles - 1):
        dp = start_scores(dout_ring, own, v_ring, v_ready, stage, phase, zeros)
        next_stage, phase = advance(stage, phase, RING)
        following = start_scores(q_ring, own, k_ring, k_ready, next_stage, phase, zeros)
        p, logits = probabilities(s, minus_lse_log2[:, None], factor, cap_log2, True, CAPPED, False)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = product_gradient(p * (dp - delta[:, None]), logits, cap_log2, CAPPED)
        folded = fold_scores(dq, ds, k_ring, stage, OPERAND)
        s, dq = warpgroup_mma_wait(0, deps=[following, folded])
        mbarrier.arrive(empty.index(stage), count=1)
        stage = next_stage
    dp = start_scores(dout_ring, own, v_ring, v_ready, stage, phase, zeros)
    p, logits = probabilities(s, minus_lse_log2[:, None], factor, cap_log2, True, CAPPED, False)
    dq = last_products(dq, p, logits, dp, delta, cap_log2, True, keys, stage, OPERAND, CAPPED, False)
    stage, phase = advance(stage, phase, RING)
    return dq, stage, phase


@gluon.jit
def fold_others(
    dq, row_rings, own, tiles, code_ptr, bits_ptr, place, stage, phase, keys, rows, scores, zeros,
    OF_PAIRS: gl.constexpr, OPERAND: gl.constexpr, BLOCK_N: gl.constexpr, RB: gl.constexpr, RING: gl.constexpr, CODES: gl.constexpr,
    CAPPED: gl.constexpr,
):  # fmt: skip
    """Fold the other tiles, each by its code, every CODES-th from ``code_ptr`` on; ``place``: where the rows lie in their mask tiles."""
    q_ring, dout_ring = row_rings
    k_ring, v_ring, k_ready, v_ready, empty = keys
    minus_lse_log2, delta = rows
    factor, cap_log2 = scores
    PER: gl.constexpr = RB // BLOCK_N
    for j in range(tiles):
        code = gl.load(code_ptr + j // PER * CODES)
        if code == ABSENT:
            # The other consumer wants this tile; waiting for it keeps this one from letting go of a stage twice before the other has once.
            mbarrier.wait(k_ready.index(stage), phase)
            mbarrier.wait(v_ready.index(stage), phase)
            mbarrier.arrive(empty.index(stage), count=1)
        else:
            words = j % PER * (BLOCK_N // 64)
            allowed = allowed_keys(bits_ptr, code, code * RB + place, RB // 64, words, ROWS, OF_PAIRS)
            s = start_scores(q_ring, own, k_ring, k_ready, stage, phase, zeros)
            dp = start_scores(dout_ring, own, v_ring, v_ready, stage, phase, zeros)
            s = warpgroup_mma_wait(1, deps=[s])
            p, logits = probabilities(s, minus_lse_log2[:, None], factor, cap_log2, allowed, CAPPED, True)
            dq = last_products(dq, p, logits, dp, delta, cap_log2, allowed, keys, stage, OPERAND, CAPPED, True)
        stage, phase = advance(stage, phase, RING)
    return dq, stage, phase


@gluon.jit
def fold_dq(
    which, of_rows, lists, counts, scores, out, rows_in, keys,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, RB: gl.constexpr, STACK: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, Q_RING: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """A consumer: dq of 64 rows of one head of each item."""
    lse_ptr, delta_ptr, lse_batch, lse_head = of_rows
    work_ptr, codes_ptr, bits_ptr = lists
    items, batches, num_heads, layout_heads = counts
    dq_ptr, dq_batch, dq_token, dq_head, scale = out
    row_rings, rows_ready, rows_empty = rows_in
    of_pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_dq: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_dq, 2)
    # Query blocks of 64 that are not stacked come in pairs with a code for each; otherwise both consumers read one code.
    CODES: gl.constexpr = 2 if STACK == 1 and RB == ROWS else 1
    PER: gl.constexpr = RB // BLOCK_N
    shared = num_heads // layout_heads
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, of_pairs))
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, of_pairs)
    stage, phase, turn, turn_phase = 0, 0, 0, 0
    step = gl.program_id(0)
    while step < items:
        batch, member, tile, at = read_work(in_turn(step, items), work_ptr, batches, shared // STACK, SUBS)
        head = (gl.load(at).to(gl.int32) * shared + member * STACK + which * (STACK - 1)).to(gl.int64)
        below = tile * (2 * ROWS // STACK) + which * ROWS * (2 - STACK)
        row, count = gl.load(at + 1) + below, gl.load(at + 2).to(gl.int32) - below
        first = batch.to(gl.int64) * lse_batch + head * lse_head + row
        minus_lse_log2 = gl.load(lse_ptr + first + lane, mask=lane < count, other=float("inf")) * -LOG2E
        delta = gl.load(delta_ptr + first + lane, mask=lane < count, other=0.0)
        code_ptr, place = codes_ptr + gl.load(at + 6) + which * (CODES - 1), below * (2 - CODES)
        dq = gl.zeros([ROWS, D], gl.float32, of_dq)
        own = turn * 2 + which
        mbarrier.wait(rows_ready.index(own), turn_phase)
        full = gl.load(at + 4).to(gl.int32) * PER
        if full > 0:
            dq, stage, phase = fold_full(
                dq, row_rings, own, full, stage, phase, keys, (minus_lse_log2, delta), scores, zeros, operand, RING, CAPPED
            )  # fmt: skip
        dq, stage, phase = fold_others(
            dq, row_rings, own, gl.load(at + 5).to(gl.int32) * PER, code_ptr, bits_ptr, place, stage, phase, keys,
            (minus_lse_log2, delta), scores, zeros, of_pairs, operand, BLOCK_N, RB, RING, CODES, CAPPED,
        )  # fmt: skip
        mbarrier.arrive(rows_empty.index(own), count=1)
        store_rows(dq_ptr + batch.to(gl.int64) * dq_batch + head * dq_head + row * dq_token, dq_token, dq * scale, count, D, of_dq)
        turn, turn_phase = advance(turn, turn_phase, Q_RING)
        step += gl.num_programs(0)


@gluon.jit(
    do_not_specialize=["items", "batches", "num_heads", "num_kv_heads", "layout_heads", "tokens", "key_tokens", "lse_batch", "lse_head"]
)
def hopper_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, work_ptr, keys_ptr, codes_ptr, bits_ptr,
    scale, factor, cap_log2, items: gl.int32, batches: gl.int32, num_heads: gl.int32, num_kv_heads: gl.int32, layout_heads: gl.int32,
    tokens: gl.int32, key_tokens: gl.int32,
    q_batch: gl.int64, q_token: gl.int64, q_head: gl.int64, k_batch: gl.int64, k_token: gl.int64, k_head: gl.int64,
    v_batch: gl.int64, v_token: gl.int64, v_head: gl.int64, dout_batch: gl.int64, dout_token: gl.int64, dout_head: gl.int64,
    dq_batch: gl.int64, dq_token: gl.int64, dq_head: gl.int64, lse_batch: gl.int64, lse_head: gl.int64,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, RB: gl.constexpr, STACK: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, Q_RING: gl.constexpr, CAPPED: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """``dq = scale * dS k`` over the listed blocks of each row; grid and arguments of `s2attn.kernels.hopper.forward`.

    ``lse_ptr`` and ``delta_ptr`` have a number for each head and token. RING is at least 2: a consumer holds one stage and asks for the
    next.
    """
    gl.static_assert(RING >= 2, "a consumer holds one stage while it asks for the next")
    kind: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, D], kind)
    dout_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, DV], kind)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, BLOCK_N, D], kind)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, BLOCK_N, DV], kind)
    q_ring = gl.allocate_shared_memory(kind, [2 * Q_RING, 1, 1, ROWS, D], q_layout)
    dout_ring = gl.allocate_shared_memory(kind, [2 * Q_RING, 1, 1, ROWS, DV], dout_layout)
    k_ring = gl.allocate_shared_memory(kind, [RING, 1, 1, BLOCK_N, D], k_layout)
    v_ring = gl.allocate_shared_memory(kind, [RING, 1, 1, BLOCK_N, DV], v_layout)
    rows_ready, rows_empty, k_ready, v_ready, empty = (
        barriers(2 * Q_RING, 1), barriers(2 * Q_RING, 1), barriers(RING, 1), barriers(RING, 1), barriers(RING, 2)
    )  # fmt: skip
    fence_async_shared()
    pointers = (q_ptr, k_ptr, v_ptr, dout_ptr)
    q_strides, k_strides, v_strides = (q_batch, q_token, q_head), (k_batch, k_token, k_head), (v_batch, v_token, v_head)
    strides = (q_strides, k_strides, v_strides, (dout_batch, dout_token, dout_head))
    rings, bars = (q_ring, dout_ring, k_ring, v_ring), (rows_ready, rows_empty, k_ready, v_ready, empty)
    of_rows, lists = (lse_ptr, delta_ptr, lse_batch, lse_head), (work_ptr, codes_ptr, bits_ptr)
    counts, scores, out = (items, batches, num_heads, layout_heads), (factor, cap_log2), (dq_ptr, dq_batch, dq_token, dq_head, scale)
    extents = (items, batches, num_heads, num_kv_heads, layout_heads, tokens, key_tokens)
    rows_in, keys = ((q_ring, dout_ring), rows_ready, rows_empty), (k_ring, v_ring, k_ready, v_ready, empty)
    gl.warp_specialize([
        (fold_dq, (0, of_rows, lists, counts, scores, out, rows_in, keys, D, DV, BLOCK_N, RB, STACK, SUBS, RING, Q_RING, CAPPED)),
        (fold_dq, (1, of_rows, lists, counts, scores, out, rows_in, keys, D, DV, BLOCK_N, RB, STACK, SUBS, RING, Q_RING, CAPPED)),
        (load_dq, (pointers, strides, work_ptr, keys_ptr, extents, rings, bars,
                   D, DV, BLOCK_N, RB, STACK, SUBS, RING, Q_RING, PACKED)),
    ], [4, 1], [240, 24])  # fmt: skip
