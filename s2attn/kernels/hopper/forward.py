"""The forward kernel for Hopper: one program takes two tiles of 64 query rows at a time and goes on to its next two when they are done."""

from s2attn.kernels.hopper.names import (
    copy_in,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from s2attn.kernels.hopper.pieces import ABSENT, FULL, advance, allowed_keys, as_tiles, begin_barriers, in_turn, read_work, rows_of
from s2attn.kernels.pieces.scores import LN2, LOG2E, log2_logits

ROWS = gl.constexpr(64)
TILE = gl.constexpr(64)


@gluon.jit
def load_tiles(
    k_rows, v_rows, batch, kv_head, list_ptr, tiles, stage, phase, keys,
    RB: gl.constexpr, JOIN: gl.constexpr, RING: gl.constexpr, USED: gl.constexpr,
):  # fmt: skip
    """Load USED tiles of 64 keys into each stage, keys and values, until a list is at its end, as stages become free."""
    k_ring, v_ring, k_ready, k_empty, v_ready, v_empty = keys
    PER: gl.constexpr = RB // TILE
    for j in range(tiles // USED):
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), USED * k_rows.block_type.nbytes)
        for i in gl.static_range(USED):
            at = j * USED + i
            key = gl.load(list_ptr + at // PER) + at % PER * TILE
            copy_in(k_rows, [batch, kv_head, key, 0], k_ready.index(stage), k_ring.index(stage * JOIN + i))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_ready.index(stage), USED * v_rows.block_type.nbytes)
        for i in gl.static_range(USED):
            at = j * USED + i
            key = gl.load(list_ptr + at // PER) + at % PER * TILE
            copy_in(v_rows, [batch, kv_head, key, 0], v_ready.index(stage), v_ring.index(stage * JOIN + i))
        stage, phase = advance(stage, phase, RING)
    return stage, phase


@gluon.jit
def load_list(
    k_rows, v_rows, batch, kv_head, list_ptr, full, others, stage, phase, keys,
    RB: gl.constexpr, JOIN: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Load the tiles of a list: of the full ones JOIN to a stage as long as there are so many, then one to a stage."""
    if JOIN == 2:
        joined = full // 2 * 2
        stage, phase = load_tiles(k_rows, v_rows, batch, kv_head, list_ptr, joined, stage, phase, keys, RB, JOIN, RING, 2)
        return load_tiles(
            k_rows, v_rows, batch, kv_head, list_ptr + joined // (RB // TILE), full - joined + others, stage, phase, keys, RB, JOIN, RING, 1
        )
    else:
        return load_tiles(k_rows, v_rows, batch, kv_head, list_ptr, full + others, stage, phase, keys, RB, JOIN, RING, 1)


@gluon.jit
def load_forward(
    q_ptr, k_ptr, v_ptr, work_ptr, keys_ptr, extents, q_strides, k_strides, v_strides, queries, keys,
    D: gl.constexpr, DV: gl.constexpr, JOIN: gl.constexpr, RB: gl.constexpr, STACK: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, Q_RING: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The producer: queries of both consumers, then keys and values of every listed tile; it runs ahead into the next items."""
    items, batches, num_heads, num_kv_heads, layout_heads, tokens, key_tokens = extents
    q_ring, q_ready, q_empty = queries
    k_ring, v_ring, k_ready, _, v_ready, _ = keys
    q_layout: gl.constexpr = q_ring.layout
    k_layout: gl.constexpr = k_ring.layout
    v_layout: gl.constexpr = v_ring.layout
    shared = num_heads // layout_heads
    q_rows = rows_of(q_ptr, (batches, num_heads, tokens), q_strides, ROWS, D, q_layout)
    all_k = rows_of(k_ptr, (batches, num_kv_heads, key_tokens), k_strides, TILE, D, k_layout)
    all_v = rows_of(v_ptr, (batches, num_kv_heads, key_tokens), v_strides, TILE, DV, v_layout)
    stage = 0
    phase = 1
    turn = 0
    q_phase = 1
    step = gl.program_id(0)
    while step < items:
        batch, member, tile, at = read_work(in_turn(step, items), work_ptr, batches, shared // STACK, SUBS)
        head = gl.load(at).to(gl.int32) * shared + member * STACK
        row = gl.load(at + 1).to(gl.int32) + tile * (2 * ROWS // STACK)
        for which in gl.static_range(2):
            place = turn * 2 + which
            mbarrier.wait(q_empty.index(place), q_phase)
            mbarrier.expect(q_ready.index(place), q_rows.block_type.nbytes)
            if STACK == 2:
                copy_in(q_rows, [batch, head + which, row, 0], q_ready.index(place), q_ring.index(place))
            else:
                copy_in(q_rows, [batch, head, row + which * ROWS, 0], q_ready.index(place), q_ring.index(place))
        kv_head = head // (num_heads // num_kv_heads)
        list_ptr = keys_ptr + gl.load(at + 3)
        full = gl.load(at + 4).to(gl.int32) * (RB // TILE)
        others = gl.load(at + 5).to(gl.int32) * (RB // TILE)
        if PACKED:
            # Keys end with their own sequence, so that nothing of the next one is read. A descriptor has one place in memory: the copies
            # through the old one must have landed, of which the last ones are in the last stages used.
            for i in gl.static_range(RING):
                mbarrier.wait(k_ready.index(i), gl.where(i < stage, phase ^ 1, phase))
                mbarrier.wait(v_ready.index(i), gl.where(i < stage, phase ^ 1, phase))
            key_end = gl.load(at + 7).to(gl.int32)
            k_rows = rows_of(k_ptr, (batches, num_kv_heads, key_end), k_strides, TILE, D, k_layout)
            v_rows = rows_of(v_ptr, (batches, num_kv_heads, key_end), v_strides, TILE, DV, v_layout)
            stage, phase = load_list(k_rows, v_rows, batch, kv_head, list_ptr, full, others, stage, phase, keys, RB, JOIN, RING)
        else:
            stage, phase = load_list(all_k, all_v, batch, kv_head, list_ptr, full, others, stage, phase, keys, RB, JOIN, RING)
        turn, q_phase = advance(turn, q_phase, Q_RING)
        step += gl.num_programs(0)


@gluon.jit
def softmax_tile(
    acc, m_i, l_i, products, allowed, factor, cap_log2, OF_ROWS: gl.constexpr, CAPPED: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """Scale what was summed to the new maximum; returns it with maximum, sum, and the probabilities of this tile."""
    if CAPPED:
        products = log2_logits(products, factor, cap_log2, True)
    if MASKED:
        products = gl.where(allowed, products, float("-inf"))
    top = gl.max(products, 1)
    if not CAPPED:
        # The factor is positive: the largest product gives the largest logit, and what is left is one multiply-add for each pair.
        top = top * factor
    m_new = gl.maximum(m_i, top)
    if MASKED:
        # A row that has seen nothing yet keeps -inf; it is shifted by 0 so that no -inf - -inf appears.
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        shift = m_new
    if CAPPED:
        p = gl.exp2(products - shift[:, None])
    else:
        p = gl.exp2(products * factor - shift[:, None])
    # The same maximum keeps what was summed, also where it is a sink of +inf.
    keep = gl.where(m_i == m_new, 1.0, gl.exp2(m_i - shift))  # [ROWS]
    return acc * gl.convert_layout(keep, OF_ROWS)[:, None], m_new, l_i * keep + gl.sum(p, 1), p


@gluon.jit
def fold_full(
    acc, m_i, l_i, q_tile, stages, stage, phase, wide, scores,
    WIDE: gl.constexpr, RING: gl.constexpr, CAPPED: gl.constexpr,
    OF_PAIRS: gl.constexpr, OF_OUT: gl.constexpr,
):  # fmt: skip
    """Fold ``stages`` stages of keys that are seen in full: the softmax of each runs while the products of queries and the next keys do."""
    factor, cap_log2 = scores
    k_ring, v_ring, k_ready, k_empty, v_ready, v_empty = wide
    rows: gl.constexpr = gl.SliceLayout(1, OF_OUT)
    operand: gl.constexpr = gl.DotOperandLayout(0, OF_OUT, 2)
    zeros = gl.zeros([ROWS, WIDE], gl.float32, OF_PAIRS)
    if stages > 0:
        mbarrier.wait(k_ready.index(stage), phase)
        products = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(k_empty.index(stage), count=1)
        for _j in range(stages - 1):
            next_stage, next_phase = advance(stage, phase, RING)
            mbarrier.wait(k_ready.index(next_stage), next_phase)
            k_tile = k_ring.index(next_stage).permute((1, 0))
            coming = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
            acc, m_i, l_i, p = softmax_tile(acc, m_i, l_i, products, zeros, factor, cap_log2, rows, CAPPED, False)
            p = gl.convert_layout(p.to(v_ring.dtype), operand)
            mbarrier.wait(v_ready.index(stage), phase)
            summed = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
            products = warpgroup_mma_wait(1, deps=[coming])
            mbarrier.arrive(k_empty.index(next_stage), count=1)
            acc = warpgroup_mma_wait(0, deps=[summed])
            mbarrier.arrive(v_empty.index(stage), count=1)
            stage = next_stage
            phase = next_phase
        acc, m_i, l_i, p = softmax_tile(acc, m_i, l_i, products, zeros, factor, cap_log2, rows, CAPPED, False)
        p = gl.convert_layout(p.to(v_ring.dtype), operand)
        mbarrier.wait(v_ready.index(stage), phase)
        summed = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[summed])
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, phase = advance(stage, phase, RING)
    return acc, m_i, l_i, stage, phase


@gluon.jit
def fold_others(
    acc, m_i, l_i, q_tile, single, others, code_ptr, bits_ptr, place, stage, phase, tiles, scores,
    JOIN: gl.constexpr, RB: gl.constexpr, RING: gl.constexpr, CODES: gl.constexpr,
    CAPPED: gl.constexpr, OF_PAIRS: gl.constexpr, OF_OUT: gl.constexpr,
):  # fmt: skip
    """Fold tiles one by one: ``single`` full ones, then those of the other entries, each by its code, every CODES-th from ``code_ptr`` on.

    ``place``: where the rows lie in their mask tiles.
    """
    factor, cap_log2 = scores
    k_ring, v_ring, k_ready, k_empty, v_ready, v_empty = tiles
    rows: gl.constexpr = gl.SliceLayout(1, OF_OUT)
    operand: gl.constexpr = gl.DotOperandLayout(0, OF_OUT, 2)
    PER: gl.constexpr = RB // TILE
    zeros = gl.zeros([ROWS, TILE], gl.float32, OF_PAIRS)
    for j in range(single + others):
        at = j - single
        code = gl.load(code_ptr + at // PER * CODES, mask=at >= 0, other=FULL)
        mbarrier.wait(k_ready.index(stage), phase)
        if code == ABSENT:
            # The other consumer wants this tile; waiting for it keeps this one from running around the ring.
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.wait(v_ready.index(stage), phase)
        else:
            k_tile = k_ring.index(stage * JOIN).permute((1, 0))
            products = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
            allowed = allowed_keys(bits_ptr, code, code * RB + place, PER, at % PER, ROWS, OF_PAIRS)
            products = warpgroup_mma_wait(0, deps=[products])
            mbarrier.arrive(k_empty.index(stage), count=1)
            acc, m_i, l_i, p = softmax_tile(acc, m_i, l_i, products, allowed, factor, cap_log2, rows, CAPPED, True)
            p = gl.convert_layout(p.to(v_ring.dtype), operand)
            mbarrier.wait(v_ready.index(stage), phase)
            summed = warpgroup_mma(p, v_ring.index(stage * JOIN), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[summed])
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, phase = advance(stage, phase, RING)
    return acc, m_i, l_i, stage, phase


@gluon.jit
def store_forward(
    acc, m_i, l_i, out_ptr, lse_ptr, out_token, start, count, DV: gl.constexpr, OF_PAIRS: gl.constexpr, OF_OUT: gl.constexpr
):  # fmt: skip
    """Divide by the sums, and write ``count`` of the rows and their lse from token ``start`` on; the pointers are those of the head."""
    rows: gl.constexpr = gl.SliceLayout(1, OF_OUT)
    empty = l_i == 0.0  # [ROWS]; a sum of NaN is not empty
    total = gl.where(empty, 1.0, l_i)  # [ROWS]
    lse = gl.where(empty, float("-inf"), (m_i + gl.log2(total)) * LN2)  # [ROWS]
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, OF_PAIRS))
    gl.store(lse_ptr + start + lane, lse, mask=lane < count)
    lane = gl.arange(0, ROWS, rows)
    column = gl.arange(0, DV, gl.SliceLayout(0, OF_OUT))
    acc = acc / gl.convert_layout(total, rows)[:, None]
    out = out_ptr + start * out_token + (lane.to(gl.int64) * out_token)[:, None] + column[None, :]
    gl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(lane < count)[:, None])


@gluon.jit
def attend_forward(
    which, sinks_ptr, out_ptr, lse_ptr, work_ptr, codes_ptr, bits_ptr, counts, scores, out_strides, lse_strides, queries, wide, tiles,
    D: gl.constexpr, DV: gl.constexpr, JOIN: gl.constexpr, RB: gl.constexpr, STACK: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, Q_RING: gl.constexpr, CAPPED: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 rows of one head of each item against every listed tile."""
    items, batches, num_heads, layout_heads = counts
    q_ring, q_ready, q_empty = queries
    of_pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    of_wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE * JOIN, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    # Query blocks of 64 that are not stacked come in pairs with a code for each; otherwise both consumers read one code.
    CODES: gl.constexpr = 2 if STACK == 1 and RB == ROWS else 1
    shared = num_heads // layout_heads
    stage = 0
    phase = 0
    turn = 0
    q_phase = 0
    step = gl.program_id(0)
    while step < items:
        batch, member, tile, at = read_work(in_turn(step, items), work_ptr, batches, shared // STACK, SUBS)
        head = gl.load(at).to(gl.int32) * shared + member * STACK
        row = tile * (2 * ROWS // STACK)
        if STACK == 2:
            head += which
        else:
            row += which * ROWS
        m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, of_wide))
        l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, of_wide))
        if SINKS:
            m_i = gl.maximum(m_i, gl.load(sinks_ptr + head).to(gl.float32) * LOG2E)
            l_i = gl.where(m_i == float("-inf"), 0.0, 1.0)
        acc = gl.zeros([ROWS, DV], gl.float32, of_out)
        code_ptr = codes_ptr + gl.load(at + 6)
        place = row
        if CODES == 2:
            code_ptr += which
            place = 0
        own = turn * 2 + which
        mbarrier.wait(q_ready.index(own), q_phase)
        q_tile = q_ring.index(own).reshape([ROWS, D])
        full = gl.load(at + 4).to(gl.int32) * (RB // TILE)
        others = gl.load(at + 5).to(gl.int32) * (RB // TILE)
        acc, m_i, l_i, stage, phase = fold_full(
            acc, m_i, l_i, q_tile, full // JOIN, stage, phase, wide, scores, TILE * JOIN, RING, CAPPED, of_wide, of_out
        )
        m_i = gl.convert_layout(m_i, gl.SliceLayout(1, of_pairs))
        l_i = gl.convert_layout(l_i, gl.SliceLayout(1, of_pairs))
        acc, m_i, l_i, stage, phase = fold_others(
            acc, m_i, l_i, q_tile, full % JOIN, others, code_ptr, bits_ptr, place, stage, phase, tiles, scores,
            JOIN, RB, RING, CODES, CAPPED, of_pairs, of_out,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(own), count=1)
        of_out_head = out_ptr + batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[2]
        of_lse_head = lse_ptr + batch.to(gl.int64) * lse_strides[0] + head.to(gl.int64) * lse_strides[1]
        count = gl.load(at + 2) - row
        store_forward(acc, m_i, l_i, of_out_head, of_lse_head, out_strides[1], gl.load(at + 1) + row, count, DV, of_pairs, of_out)
        turn, q_phase = advance(turn, q_phase, Q_RING)
        step += gl.num_programs(0)


@gluon.jit(
    do_not_specialize=["items", "batches", "num_heads", "num_kv_heads", "layout_heads", "tokens", "key_tokens", "lse_batch", "lse_head"]
)
def hopper_forward_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, lse_ptr, work_ptr, keys_ptr, codes_ptr, bits_ptr, factor, cap_log2,
    items: gl.int32, batches: gl.int32, num_heads: gl.int32, num_kv_heads: gl.int32, layout_heads: gl.int32,
    tokens: gl.int32, key_tokens: gl.int32,
    q_batch: gl.int64, q_token: gl.int64, q_head: gl.int64, k_batch: gl.int64, k_token: gl.int64, k_head: gl.int64,
    v_batch: gl.int64, v_token: gl.int64, v_head: gl.int64, out_batch: gl.int64, out_token: gl.int64, out_head: gl.int64,
    lse_batch: gl.int64, lse_head: gl.int64,
    D: gl.constexpr, DV: gl.constexpr, JOIN: gl.constexpr, RB: gl.constexpr, STACK: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, Q_RING: gl.constexpr, CAPPED: gl.constexpr, SINKS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """``out = softmax(logits) v`` and its natural-log lse; grid ``(programs,)``, at most one for each item.

    An item is two tiles of 64 query tokens with one list: the same tokens of two query heads (STACK 2), or 128 neighbours.

    * Innermost strides are 1; all other strides and addresses of q, k, v are multiples of 16 bytes, and no stride is 0.
    * ``work_ptr`` int64 has a row of 8 for each line, longest first: layout head, first token, tokens, first entry in ``keys_ptr``, entries
      seen in full, others (which follow them), first code in ``codes_ptr``, first token after the keys of its sequence.
    * ``keys_ptr`` int32 has the first token of each listed block. ``codes_ptr`` int32 has a code for each other entry and each query block
      of the line: FULL, ABSENT, or the number of a mask tile; ``bits_ptr`` int64 has these, RB rows of RB / 64 words, lowest bit first.
    * ``factor`` (positive without a soft-cap) and ``cap_log2`` are those of `s2attn.kernels.pieces.scores.log2_logits`.
    * PACKED: keys end with their own sequence, else with ``key_tokens``. RING stages of K and V; queries are loaded Q_RING items ahead.
    * A stage holds JOIN tiles of 64 keys; 2 only where a row of a tile is 128 bytes wide, so that two tiles in memory are one of twice
      the height. Full entries fill stages; what is left of them, and the others, take a stage for each tile.
    """
    gl.static_assert(JOIN == 1 or (D == 64 and DV == 64), "only rows of 128 bytes lie one below the other")
    kind: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS, D], kind)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, TILE, D], kind)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, TILE, DV], kind)
    q_ring = gl.allocate_shared_memory(kind, [2 * Q_RING, 1, 1, ROWS, D], q_layout)
    k_ring = gl.allocate_shared_memory(kind, [RING * JOIN, 1, 1, TILE, D], k_layout)
    v_ring = gl.allocate_shared_memory(kind, [RING * JOIN, 1, 1, TILE, DV], v_layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2 * Q_RING, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * Q_RING, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    begin_barriers(q_ready, 2 * Q_RING, 1)
    begin_barriers(q_empty, 2 * Q_RING, 1)
    begin_barriers(k_ready, RING, 1)
    begin_barriers(k_empty, RING, 2)
    begin_barriers(v_ready, RING, 1)
    begin_barriers(v_empty, RING, 2)
    fence_async_shared()
    counts = (items, batches, num_heads, layout_heads)
    extents = (items, batches, num_heads, num_kv_heads, layout_heads, tokens, key_tokens)
    queries = (q_ring, q_ready, q_empty)
    keys = (k_ring, v_ring, k_ready, k_empty, v_ready, v_empty)
    wide = (as_tiles(k_ring, RING, TILE * JOIN, D), as_tiles(v_ring, RING, TILE * JOIN, DV), k_ready, k_empty, v_ready, v_empty)
    tiles = (as_tiles(k_ring, RING * JOIN, TILE, D), as_tiles(v_ring, RING * JOIN, TILE, DV), k_ready, k_empty, v_ready, v_empty)
    q_strides = (q_batch, q_token, q_head)
    k_strides = (k_batch, k_token, k_head)
    v_strides = (v_batch, v_token, v_head)
    out_strides = (out_batch, out_token, out_head)
    lse_strides = (lse_batch, lse_head)
    scores = (factor, cap_log2)
    gl.warp_specialize([
        (attend_forward, (0, sinks_ptr, out_ptr, lse_ptr, work_ptr, codes_ptr, bits_ptr, counts, scores, out_strides, lse_strides,
                          queries, wide, tiles, D, DV, JOIN, RB, STACK, SUBS, RING, Q_RING, CAPPED, SINKS)),
        (attend_forward, (1, sinks_ptr, out_ptr, lse_ptr, work_ptr, codes_ptr, bits_ptr, counts, scores, out_strides, lse_strides,
                          queries, wide, tiles, D, DV, JOIN, RB, STACK, SUBS, RING, Q_RING, CAPPED, SINKS)),
        (load_forward, (q_ptr, k_ptr, v_ptr, work_ptr, keys_ptr, extents, q_strides, k_strides, v_strides, queries, keys,
                        D, DV, JOIN, RB, STACK, SUBS, RING, Q_RING, PACKED)),
    ], [4, 1], [232, 40])  # fmt: skip
