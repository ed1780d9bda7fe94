"""dk and dv for Hopper: one program takes 64 or 128 keys at a time and goes on to its next ones when they are done; no atomics.

Everything is transposed, ``S^T = k q^T`` with 64 keys as rows, so that P^T and dS^T come out of one product as the operand of the next. The
query heads of a group share their lists, and one flat walk takes every listed tile once for each of them. Two ways to share it:

* Blocks of 128 keys or more (``KEYS = 128``): each consumer has 64 keys of its own, and both read every tile of q and dout, which then
  comes from memory once for 128 keys. Nothing is joined.
* Blocks of 64 (``KEYS = 64``): both consumers have the same keys and take every other tile. Each works without a pause, which two
  columns over the union of their lists would not. At the end the second leaves its sums in shared memory and the first adds them to its
  own: always in this order. A stage belongs to one of them: a consumer tells the phases of a barrier apart by their parity, and a stage
  that both took in turns could be two phases ahead of it.

lse and delta come with the tiles, through shared memory, and are read where they are used: they take no registers before, and nobody waits
for global memory in every step.
"""

from s2attn.kernels.hopper.names import (
    copy_in,
    fence_async_shared,
    gl,
    gluon,
    make_descriptor,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from s2attn.kernels.hopper.parts import ROWS, allowed_bits, barriers, landed, probabilities, store_rows
from s2attn.kernels.hopper.pieces import advance, in_turn, kept_here, rows_of
from s2attn.kernels.pieces.scores import LOG2E, product_gradient

COLUMN = gl.constexpr(12)


@gluon.jit
def find_column(step, items, work_ptr, batches, SUBS: gl.constexpr):
    """Batch entry, tile of the line, and row of the table of a program's item at a step of its own."""
    number = in_turn(step, items)
    return number // SUBS % batches, number % SUBS, work_ptr + number // SUBS // batches * COLUMN


@gluon.jit
def column_steps(at, PER: gl.constexpr):
    """Steps over full entries and over others, and what leads from them to the flat walk of either."""
    full_from, other_from = gl.load(at + 4).to(gl.int32), gl.load(at + 6).to(gl.int32)
    full_steps = (gl.load(at + 5).to(gl.int32) - full_from) * PER
    other_steps = (gl.load(at + 7).to(gl.int32) - other_from) * PER
    return full_steps, other_steps, full_from * PER, other_from * PER - full_steps


@gluon.jit
def query_of(step, walk, listed_ptr, full, group, RB: gl.constexpr, BLOCK_M: gl.constexpr):
    """First query token of a step, its place by block, and its head in the group."""
    full_steps, _, to_full, to_other = walk
    is_full = step < full_steps
    at = step + gl.where(is_full, to_full, to_other)
    tile = at // group
    entry = listed_ptr + (gl.where(is_full, 0, full) + tile * BLOCK_M // RB) * 2
    inside = tile * BLOCK_M % RB
    return gl.load(entry) + inside, gl.load(entry + 1) + inside, at % group


@gluon.jit
def load_queries(
    q_rows, dout_rows, numbers, batch, place_in, entries, stage, phase, tiles_in, RB: gl.constexpr, BLOCK_M: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    """Load q, dout, lse and delta of every step; the next step's place is looked up before this one waits."""
    q_ring, dout_ring, number_ring, ready, empty = tiles_in
    head, first_place, places, group = place_in
    listed_ptr, full, walk = entries
    steps = walk[0] + walk[1]
    if steps > 0:
        row, place, member = query_of(0, walk, listed_ptr, full, group, RB, BLOCK_M)
        for step in range(steps):
            after = gl.minimum(step + 1, steps - 1)
            next_row, next_place, next_member = query_of(after, walk, listed_ptr, full, group, RB, BLOCK_M)
            barrier = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(barrier, q_rows.block_type.nbytes + dout_rows.block_type.nbytes + numbers.block_type.nbytes)
            copy_in(q_rows, [batch, head + member, row, 0], barrier, q_ring.index(stage))
            copy_in(numbers, [0, first_place + member * places + place], barrier, number_ring.index(stage))
            copy_in(dout_rows, [batch, head + member, row, 0], barrier, dout_ring.index(stage))
            stage, phase = advance(stage, phase, RING)
            row, place, member = next_row, next_place, next_member
    return stage, phase


@gluon.jit
def load_dkv(
    pointers, strides, work_ptr, listed_ptr, extents, keys_in, tiles_in,
    D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr, BLOCK_M: gl.constexpr, RB: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, K_RING: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The producer: keys and values of an item, then the tiles of its list for every head of the group."""
    q_ptr, k_ptr, v_ptr, dout_ptr, numbers_ptr = pointers
    q_strides, k_strides, v_strides, dout_strides = strides
    items, batches, num_heads, num_kv_heads, tokens, key_tokens, places = extents
    k_ring, v_ring, keys_ready, keys_empty = keys_in
    q_ring, dout_ring, number_ring, ready, _ = tiles_in
    q_layout: gl.constexpr = q_ring.layout
    dout_layout: gl.constexpr = dout_ring.layout
    k_layout: gl.constexpr = k_ring.layout
    v_layout: gl.constexpr = v_ring.layout
    PARTS: gl.constexpr = KEYS // ROWS
    k_rows = rows_of(k_ptr, (batches, num_kv_heads, key_tokens), k_strides, ROWS, D, k_layout)
    v_rows = rows_of(v_ptr, (batches, num_kv_heads, key_tokens), v_strides, ROWS, DV, v_layout)
    every_place = kept_here((batches * num_heads).to(gl.int64) * places)
    number_layout: gl.constexpr = number_ring.layout
    numbers = make_descriptor(numbers_ptr, [2, every_place.to(gl.int32)], [every_place, 1], [2, BLOCK_M], number_layout)
    all_q = rows_of(q_ptr, (batches, num_heads, tokens), q_strides, BLOCK_M, D, q_layout)
    all_dout = rows_of(dout_ptr, (batches, num_heads, tokens), dout_strides, BLOCK_M, DV, dout_layout)
    group = num_heads // num_kv_heads
    stage, phase, turn, turn_phase = 0, 1, 0, 1
    step = gl.program_id(0)
    while step < items:
        batch, tile, at = find_column(step, items, work_ptr, batches, SUBS)
        kv_head, key = gl.load(at).to(gl.int32), gl.load(at + 1).to(gl.int32) + tile * KEYS
        mbarrier.wait(keys_empty.index(turn), turn_phase)
        mbarrier.expect(keys_ready.index(turn), PARTS * (k_rows.block_type.nbytes + v_rows.block_type.nbytes))
        for i in gl.static_range(PARTS):
            copy_in(k_rows, [batch, kv_head, key + i * ROWS, 0], keys_ready.index(turn), k_ring.index(turn * PARTS + i))
            copy_in(v_rows, [batch, kv_head, key + i * ROWS, 0], keys_ready.index(turn), v_ring.index(turn * PARTS + i))
        head = kv_head * group
        place = (head, (batch * num_heads + head) * places, places, group)
        entries = (listed_ptr + gl.load(at + 3) * 2, gl.load(at + 8).to(gl.int32), column_steps(at, RB // BLOCK_M))
        if PACKED:
            # Queries end with their own sequence. A descriptor has one place in memory: the copies through the old one must have landed.
            landed(ready, stage, phase, RING)
            end = gl.load(at + 10).to(gl.int32)
            q_rows = rows_of(q_ptr, (batches, num_heads, end), q_strides, BLOCK_M, D, q_layout)
            dout_rows = rows_of(dout_ptr, (batches, num_heads, end), dout_strides, BLOCK_M, DV, dout_layout)
            stage, phase = load_queries(q_rows, dout_rows, numbers, batch, place, entries, stage, phase, tiles_in, RB, BLOCK_M, RING)
        else:
            stage, phase = load_queries(all_q, all_dout, numbers, batch, place, entries, stage, phase, tiles_in, RB, BLOCK_M, RING)
        turn, turn_phase = advance(turn, turn_phase, K_RING)
        step += gl.num_programs(0)


@gluon.jit
def advance_by(stage, phase, BY: gl.constexpr, RING: gl.constexpr):
    """A consumer's next stage of a ring, BY stages on, and the parity of the phase in which it is used."""
    stage += BY
    around = stage >= RING
    return gl.where(around, stage - RING, stage), gl.where(around, phase ^ 1, phase)


@gluon.jit
def start_scores(keys, own, of_ring, stage, zeros):
    """Start S^T (of keys and q) or dP^T (of values and dout) of one tile.

    Where the keys lie is worked out anew: the addresses of a whole tile are more than the registers that hold them through a loop.
    """
    own = kept_here(gl.to_tensor(own).to(gl.int64)).to(gl.int32)
    tile = keys.index(own).reshape([keys.shape[3], keys.shape[4]])
    listed = of_ring.index(stage).reshape([of_ring.shape[3], of_ring.shape[4]]).permute((1, 0))
    return warpgroup_mma(tile, listed, zeros, use_acc=False, is_async=True)


@gluon.jit
def start_sum(total, weights, of_ring, stage, OPERAND: gl.constexpr):
    """Start adding weights times a listed tile to dk or dv."""
    listed = of_ring.index(stage).reshape([of_ring.shape[3], of_ring.shape[4]])
    return warpgroup_mma(gl.convert_layout(weights.to(of_ring.dtype), OPERAND), listed, total, is_async=True)


@gluon.jit
def by_query(number_ring, stage, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    """lse (0) or delta (1) of one stage, one number for each column."""
    return number_ring.index(stage).slice(WHICH, 1).load(LAYOUT)


@gluon.jit
def last_sums(
    dk, dv, st, dpt, tiles_in, stage, scores, allowed, OF_PAIRS: gl.constexpr, OF_DK: gl.constexpr, OF_DV: gl.constexpr,
    CAPPED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What is left of a tile when S is known and dP is the only product under way; it is let go."""
    q_ring, dout_ring, number_ring, _, empty = tiles_in
    factor, cap_log2 = scores
    p, logits = probabilities(st, by_query(number_ring, stage, 0, OF_PAIRS) * -LOG2E, factor, cap_log2, allowed, CAPPED, MASKED)
    dv_sum = start_sum(dv, p, dout_ring, stage, OF_DV)
    dpt = warpgroup_mma_wait(1, deps=[dpt])
    ds = product_gradient(p * (dpt - by_query(number_ring, stage, 1, OF_PAIRS)), logits, cap_log2, CAPPED)
    if MASKED:
        ds = gl.where(allowed, ds, 0.0)  # 0 times an infinite dP would not be 0; [ROWS, BLOCK_M]
    dk_sum = start_sum(dk, ds, q_ring, stage, OF_DK)
    dk, dv = warpgroup_mma_wait(0, deps=[dk_sum, dv_sum])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def fold_full(
    dk, dv, keys, own, tiles, stage, phase, tiles_in, scores, zeros, OF_PAIRS: gl.constexpr, OF_DK: gl.constexpr, OF_DV: gl.constexpr,
    STRIDE: gl.constexpr, RING: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Fold at least one tile that is seen in full: while P of one is computed, its dP and S of the next are under way.

    Nothing is under way from one round of the loop to the next: the assembler would wait after every product.
    """
    k_ring, v_ring = keys
    q_ring, dout_ring, number_ring, ready, empty = tiles_in
    factor, cap_log2 = scores
    mbarrier.wait(ready.index(stage), phase)
    st = warpgroup_mma_wait(0, deps=[start_scores(k_ring, own, q_ring, stage, zeros)])
    for _ in range(tiles - 1):
        dpt = start_scores(v_ring, own, dout_ring, stage, zeros)
        after, phase = advance_by(stage, phase, STRIDE, RING)
        mbarrier.wait(ready.index(after), phase)
        following = start_scores(k_ring, own, q_ring, after, zeros)
        p, logits = probabilities(st, by_query(number_ring, stage, 0, OF_PAIRS) * -LOG2E, factor, cap_log2, True, CAPPED, False)
        dv_sum = start_sum(dv, p, dout_ring, stage, OF_DV)
        dpt = warpgroup_mma_wait(2, deps=[dpt])
        ds = product_gradient(p * (dpt - by_query(number_ring, stage, 1, OF_PAIRS)), logits, cap_log2, CAPPED)
        dk_sum = start_sum(dk, ds, q_ring, stage, OF_DK)
        st, dv, dk = warpgroup_mma_wait(0, deps=[following, dv_sum, dk_sum])
        mbarrier.arrive(empty.index(stage), count=1)
        stage = after
    dpt = start_scores(v_ring, own, dout_ring, stage, zeros)
    dk, dv = last_sums(dk, dv, st, dpt, tiles_in, stage, scores, True, OF_PAIRS, OF_DK, OF_DV, CAPPED, False)
    stage, phase = advance_by(stage, phase, STRIDE, RING)
    return dk, dv, stage, phase


@gluon.jit
def fold_others(
    dk, dv, keys, own, first, walk, group, code_ptr, bits_ptr, place, stage, phase, tiles_in, scores, zeros,
    OF_PAIRS: gl.constexpr, OF_DK: gl.constexpr, OF_DV: gl.constexpr,
    STRIDE: gl.constexpr, BLOCK_M: gl.constexpr, RB: gl.constexpr, RING: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Fold the other tiles from step ``first`` on, each by its code; ``place``: where the keys lie in their mask tiles."""
    k_ring, v_ring = keys
    q_ring, dout_ring, _, ready, _ = tiles_in
    full_steps, other_steps, _, to_other = walk
    for step in range(first, full_steps + other_steps, STRIDE):
        at = (step + to_other) // group * BLOCK_M
        allowed = allowed_bits(bits_ptr, gl.load(code_ptr + at // RB) * RB + place, at % RB, RB // 64, BLOCK_M, OF_PAIRS)
        mbarrier.wait(ready.index(stage), phase)
        st = start_scores(k_ring, own, q_ring, stage, zeros)
        dpt = start_scores(v_ring, own, dout_ring, stage, zeros)
        st = warpgroup_mma_wait(1, deps=[st])
        dk, dv = last_sums(dk, dv, st, dpt, tiles_in, stage, scores, allowed, OF_PAIRS, OF_DK, OF_DV, CAPPED, True)
        stage, phase = advance_by(stage, phase, STRIDE, RING)
    return dk, dv, stage, phase


@gluon.jit
def join_sums(dk, dv, which: gl.constexpr, left, turn, OF_DK: gl.constexpr, OF_DV: gl.constexpr):
    """The second consumer leaves its sums, the first adds them to its own; ``turn`` counts items."""
    dk_left, dv_left, given, taken = left
    if which == 1:
        mbarrier.wait(taken, turn & 1 ^ 1)
        dk_left.store(dk)
        dv_left.store(dv)
        mbarrier.arrive(given, count=1)
    else:
        mbarrier.wait(given, turn & 1)
        dk, dv = dk + dk_left.load(OF_DK), dv + dv_left.load(OF_DV)
        mbarrier.arrive(taken, count=1)
    return dk, dv


@gluon.jit
def store_sums(dk, dv, at, out, batch, tile, half, D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr, SUBS: gl.constexpr,
               OF_DK: gl.constexpr, OF_DV: gl.constexpr):  # fmt: skip
    """Write 64 rows of dk and dv to the result, or unscaled to the slot of their piece."""
    to_dk, to_dv, scale, slots = out
    dk_ptr, slot_dk_ptr, dk_batch, dk_token, dk_head = to_dk
    dv_ptr, slot_dv_ptr, dv_batch, dv_token, dv_head = to_dv
    below, kv_head, slot = half * ROWS, gl.load(at), gl.load(at + 11)
    if slot >= 0:
        first = ((batch.to(gl.int64) * slots + slot) * SUBS + tile) * KEYS + below
        store_rows(slot_dk_ptr + first * D, D, dk, ROWS, D, OF_DK)
        store_rows(slot_dv_ptr + first * DV, DV, dv, ROWS, DV, OF_DV)
    else:
        key, count = gl.load(at + 1) + tile * KEYS + below, gl.load(at + 2).to(gl.int32) - tile * KEYS - below
        store_rows(dk_ptr + batch.to(gl.int64) * dk_batch + kv_head * dk_head + key * dk_token, dk_token, dk * scale, count, D, OF_DK)
        store_rows(dv_ptr + batch.to(gl.int64) * dv_batch + kv_head * dv_head + key * dv_token, dv_token, dv, count, DV, OF_DV)


@gluon.jit
def fold_dkv(
    which: gl.constexpr, lists, counts, scores, out, left, keys_in, tiles_in,
    D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr, BLOCK_M: gl.constexpr, RB: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, K_RING: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """A consumer: dk and dv of 64 keys of each item from every step (``KEYS = 128``), or from every other one."""
    work_ptr, codes_ptr, bits_ptr = lists
    items, batches, group = counts
    k_ring, v_ring, keys_ready, keys_empty = keys_in
    of_pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    of_dk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    of_dv: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    dk_operand: gl.constexpr = gl.DotOperandLayout(0, of_dk, 2)
    dv_operand: gl.constexpr = gl.DotOperandLayout(0, of_dv, 2)
    STRIDE: gl.constexpr = 2 * ROWS // KEYS
    HALF: gl.constexpr = which * (2 - STRIDE)
    FIRST: gl.constexpr = which * (STRIDE - 1)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, of_pairs)
    stage, phase, turn, turn_phase, item, begun = gl.to_tensor(FIRST), 0, 0, 0, 0, 0
    step = gl.program_id(0)
    while step < items:
        batch, tile, at = find_column(step, items, work_ptr, batches, SUBS)
        walk = column_steps(at, RB // BLOCK_M)
        # Steps are counted over all items, and a consumer has the even or the odd ones.
        first = (begun + FIRST) % STRIDE
        mine = (walk[0] - first + STRIDE - 1) // STRIDE
        dk = gl.zeros([ROWS, D], gl.float32, of_dk)
        dv = gl.zeros([ROWS, DV], gl.float32, of_dv)
        own = turn * (KEYS // ROWS) + HALF
        mbarrier.wait(keys_ready.index(turn), turn_phase)
        if mine > 0:
            dk, dv, stage, phase = fold_full(
                dk, dv, (k_ring, v_ring), own, mine, stage, phase, tiles_in, scores, zeros, of_pairs, dk_operand, dv_operand,
                STRIDE, RING, CAPPED,
            )  # fmt: skip
        dk, dv, stage, phase = fold_others(
            dk, dv, (k_ring, v_ring), own, walk[0] + (begun + walk[0] + FIRST) % STRIDE, walk, group, codes_ptr + gl.load(at + 9),
            bits_ptr, tile * KEYS + HALF * ROWS, stage, phase, tiles_in, scores, zeros, of_pairs, dk_operand, dv_operand,
            STRIDE, BLOCK_M, RB, RING, CAPPED,
        )  # fmt: skip
        mbarrier.arrive(keys_empty.index(turn), count=1)
        if STRIDE == 2:
            dk, dv = join_sums(dk, dv, which, left, item, of_dk, of_dv)
        if STRIDE == 1 or which == 0:
            store_sums(dk, dv, at, out, batch, tile, HALF, D, DV, KEYS, SUBS, of_dk, of_dv)
        begun += walk[0] + walk[1]
        item += 1
        turn, turn_phase = advance(turn, turn_phase, K_RING)
        step += gl.num_programs(0)


@gluon.jit
def room_for_sums(D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr):
    """Where the second consumer leaves its dk and dv, and barriers for "given" and "taken"; nothing much where both keep theirs."""
    SIZE: gl.constexpr = ROWS if KEYS == ROWS else 8
    dk_left = gl.allocate_shared_memory(gl.float32, [SIZE, D], gl.NVMMASharedLayout.get_default_for([SIZE, D], gl.float32))
    dv_left = gl.allocate_shared_memory(gl.float32, [SIZE, DV], gl.NVMMASharedLayout.get_default_for([SIZE, DV], gl.float32))
    given_and_taken = barriers(2, 1)
    return dk_left, dv_left, given_and_taken.index(0), given_and_taken.index(1)


@gluon.jit
def room_for_tiles(kind: gl.constexpr, COUNT: gl.constexpr, ROWS_EACH: gl.constexpr, WIDTH: gl.constexpr):
    """COUNT tiles of tokens of a head."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, ROWS_EACH, WIDTH], kind)
    return gl.allocate_shared_memory(kind, [COUNT, 1, 1, ROWS_EACH, WIDTH], layout)


@gluon.jit(do_not_specialize=["items", "batches", "num_heads", "num_kv_heads", "tokens", "key_tokens", "places", "slots"])
def hopper_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, numbers_ptr, dk_ptr, dv_ptr, slot_dk_ptr, slot_dv_ptr, work_ptr, listed_ptr, codes_ptr, bits_ptr,
    scale, factor, cap_log2, items: gl.int32, batches: gl.int32, num_heads: gl.int32, num_kv_heads: gl.int32,
    tokens: gl.int32, key_tokens: gl.int32, places: gl.int32, slots: gl.int32,
    q_batch: gl.int64, q_token: gl.int64, q_head: gl.int64, k_batch: gl.int64, k_token: gl.int64, k_head: gl.int64,
    v_batch: gl.int64, v_token: gl.int64, v_head: gl.int64, dout_batch: gl.int64, dout_token: gl.int64, dout_head: gl.int64,
    dk_batch: gl.int64, dk_token: gl.int64, dk_head: gl.int64, dv_batch: gl.int64, dv_token: gl.int64, dv_head: gl.int64,
    D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr, BLOCK_M: gl.constexpr, RB: gl.constexpr, SUBS: gl.constexpr,
    RING: gl.constexpr, K_RING: gl.constexpr, CAPPED: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """``dv = P^T dout`` and ``dk = scale * dS^T q``; grid ``(programs,)``, at most one for each item of KEYS = 64 or 128 keys.

    * Innermost strides are 1; all other strides and addresses of q, k, v, dout are multiples of 16 bytes, and no stride is 0.
    * ``work_ptr`` int64 has a row of 12 for each piece of a column, longest first: KV head, first token, tokens, first entry in
      ``listed_ptr``, full entries from and to and other entries from and to (counted over all heads of the group), full entries of the
      column, first code of its others in ``codes_ptr``, first token after the queries of its sequence, slot (-1: none).
    * ``listed_ptr`` int32 has the first token and the first place by block of each listed block; ``codes_ptr`` int32 the number of the
      mask tile of each other entry; ``bits_ptr`` int64 has the tiles by key, RB rows of RB / 64 words along the queries.
    * ``numbers_ptr`` has all of lse and then all of delta by block, ``places`` of each per head, lse = +inf where there is no query.
    * RING stages of q and dout; keys are loaded K_RING items ahead. ``slots`` of the workspace are per batch entry.
    """
    STRIDE: gl.constexpr = 2 * ROWS // KEYS
    gl.static_assert(RING > STRIDE, "a consumer holds one stage while it asks for its next one")
    gl.static_assert(RING % STRIDE == 0, "each stage belongs to one consumer where they take turns")
    kind: gl.constexpr = q_ptr.dtype.element_ty
    k_ring, v_ring = room_for_tiles(kind, K_RING * KEYS // ROWS, ROWS, D), room_for_tiles(kind, K_RING * KEYS // ROWS, ROWS, DV)
    q_ring, dout_ring = room_for_tiles(kind, RING, BLOCK_M, D), room_for_tiles(kind, RING, BLOCK_M, DV)
    number_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2, BLOCK_M], gl.float32)
    number_ring = gl.allocate_shared_memory(gl.float32, [RING, 2, BLOCK_M], number_layout)
    keys_in = (k_ring, v_ring, barriers(K_RING, 1), barriers(K_RING, 2))
    tiles_in = (q_ring, dout_ring, number_ring, barriers(RING, 1), barriers(RING, KEYS // ROWS))
    left = room_for_sums(D, DV, KEYS)
    fence_async_shared()
    pointers = (q_ptr, k_ptr, v_ptr, dout_ptr, numbers_ptr)
    q_strides, k_strides, v_strides = (q_batch, q_token, q_head), (k_batch, k_token, k_head), (v_batch, v_token, v_head)
    strides = (q_strides, k_strides, v_strides, (dout_batch, dout_token, dout_head))
    to_dk, to_dv = (dk_ptr, slot_dk_ptr, dk_batch, dk_token, dk_head), (dv_ptr, slot_dv_ptr, dv_batch, dv_token, dv_head)
    lists, counts, scores = (work_ptr, codes_ptr, bits_ptr), (items, batches, num_heads // num_kv_heads), (factor, cap_log2)
    extents, out = (items, batches, num_heads, num_kv_heads, tokens, key_tokens, places), (to_dk, to_dv, scale, slots)
    gl.warp_specialize([
        (fold_dkv, (0, lists, counts, scores, out, left, keys_in, tiles_in, D, DV, KEYS, BLOCK_M, RB, SUBS, RING, K_RING, CAPPED)),
        (fold_dkv, (1, lists, counts, scores, out, left, keys_in, tiles_in, D, DV, KEYS, BLOCK_M, RB, SUBS, RING, K_RING, CAPPED)),
        (load_dkv, (pointers, strides, work_ptr, listed_ptr, extents, keys_in, tiles_in,
                    D, DV, KEYS, BLOCK_M, RB, SUBS, RING, K_RING, PACKED)),
    ], [4, 1], [240, 24])  # fmt: skip
