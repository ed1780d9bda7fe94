"""dk and dv on Hopper: a producer warp walks a column's list, two consumer warpgroups share its work; no atomics.

Everything is transposed, ``S^T = k q^T`` with 64 keys as rows, so that P^T and dS^T come out of one product as the operand of the next. The
query heads of a group share their lists, and one flat walk takes every listed tile once for each of them. Two ways to share it:

* Blocks of 128 keys or more (``KEYS = 128``): each consumer has 64 keys of its own, and both read every tile of q and dout, which then
  comes from memory once for 128 keys. Nothing is joined.
* Blocks of 64 (``KEYS = 64``): both consumers have the same keys and take every other tile. Each works without a pause, which two
  columns over the union of their lists would not. At the end the second leaves its sums in shared memory and the first adds them to its
  own: always in this order.

lse and delta come with the tiles, through shared memory, and are read where they are used: they take no registers before, and nobody waits
for global memory in every step.
"""

from s2attn.kernels.hopper.names import copy_in, fence_async_shared, gl, gluon, make_descriptor, mbarrier, warpgroup_mma, warpgroup_mma_wait
from s2attn.kernels.hopper.parts import ROWS, WORD, allowed_bits, barriers, probabilities, rows_of_heads, store_rows
from s2attn.kernels.pieces.scores import LOG2E, product_gradient
from s2attn.kernels.pieces.work import find_list, read_piece, slot_rows


@gluon.jit
def query_of(step, lists, walk, RB: gl.constexpr, BLOCK_M: gl.constexpr):
    """First query token of a step of the flat walk, its place by block, and its head in the group."""
    list_ptr, query_start_ptr = lists
    full_steps, _, to_full, to_other, group, full = walk
    is_full = step < full_steps
    at = step + gl.where(is_full, to_full, to_other)
    tile = at // group
    block = gl.load(list_ptr + gl.where(is_full, 0, full) + tile * BLOCK_M // RB)
    inside = tile * BLOCK_M % RB
    return gl.load(query_start_ptr + block) + inside, block * RB + inside, at % group


@gluon.jit
def dkv_producer(sources, ring, lists, walk, STAGES: gl.constexpr, RB: gl.constexpr, BLOCK_M: gl.constexpr):
    """Load q, dout, lse and delta of every step; the next step's place is looked up before this one waits."""
    q_rows, dout_rows, numbers, q_head, dout_head, places = sources
    q_ring, dout_ring, number_ring, ready, empty = ring
    steps = walk[0] + walk[1]
    if steps > 0:
        row, place, member = query_of(0, lists, walk, RB, BLOCK_M)
        for step in range(steps):
            next_row, next_place, next_member = query_of(gl.minimum(step + 1, steps - 1), lists, walk, RB, BLOCK_M)
            stage, phase = step % STAGES, step // STAGES & 1
            barrier = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            tiles: gl.constexpr = q_rows.block_type.nbytes + dout_rows.block_type.nbytes
            mbarrier.expect(barrier, tiles + numbers.block_type.nbytes)
            copy_in(q_rows, [row, (member * q_head).to(gl.int32)], barrier, q_ring.index(stage))
            copy_in(numbers, [0, member * places + place], barrier, number_ring.index(stage))
            copy_in(dout_rows, [row, (member * dout_head).to(gl.int32)], barrier, dout_ring.index(stage))
            row, place, member = next_row, next_place, next_member


@gluon.jit
def start_product(tile, of_ring, stage, zeros):
    """Start ``tile`` times a listed tile, transposed."""
    return warpgroup_mma(tile, of_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def start_sum(total, weights, of_ring, stage, operand: gl.constexpr):
    """Start adding weights times a listed tile to dk or dv."""
    return warpgroup_mma(gl.convert_layout(weights.to(of_ring.dtype), operand), of_ring.index(stage), total, is_async=True)


@gluon.jit
def by_query(ring, stage, which: gl.constexpr, layout: gl.constexpr):
    """lse (0) or delta (1) of one stage, one number for each column."""
    return ring[2].index(stage).slice(which, 1).load(layout)


@gluon.jit
def dkv_full(
    dk, dv, k_tile, v_tile, ring, turn, scaling, zeros, of_dk: gl.constexpr, of_dv: gl.constexpr, across: gl.constexpr,
    STAGES: gl.constexpr, STRIDE: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Fold this consumer's full steps into dk and dv: while P of one step is computed, its dP and S of the next are under way.

    Nothing is in flight from one round of the loop to the next: the assembler would wait after every product.
    """
    q_ring, dout_ring, _, ready, empty = ring
    factor, cap_log2 = scaling
    first, steps = turn
    mbarrier.wait(ready.index(first % STAGES), first // STAGES & 1)
    st = warpgroup_mma_wait(0, deps=[start_product(k_tile, q_ring, first % STAGES, zeros)])
    for step in range(first, steps - STRIDE, STRIDE):
        stage, after = step % STAGES, step + STRIDE
        dpt = start_product(v_tile, dout_ring, stage, zeros)
        mbarrier.wait(ready.index(after % STAGES), after // STAGES & 1)
        following = start_product(k_tile, q_ring, after % STAGES, zeros)
        p, logits = probabilities(st, by_query(ring, stage, 0, across) * -LOG2E, factor, cap_log2, True, CAPPED, False)
        dv_sum = start_sum(dv, p, dout_ring, stage, of_dv)
        dpt = warpgroup_mma_wait(2, deps=[dpt])
        ds = product_gradient(p * (dpt - by_query(ring, stage, 1, across)), logits, cap_log2, CAPPED)
        dk_sum = start_sum(dk, ds, q_ring, stage, of_dk)
        st, dv, dk = warpgroup_mma_wait(0, deps=[following, dv_sum, dk_sum])
        mbarrier.arrive(empty.index(stage), count=1)
    last = first + (steps - 1 - first) // STRIDE * STRIDE
    dpt = start_product(v_tile, dout_ring, last % STAGES, zeros)
    return last_of_step(dk, dv, st, dpt, ring, last, scaling, True, of_dk, of_dv, across, STAGES, CAPPED, False)


@gluon.jit
def last_of_step(
    dk, dv, st, dpt, ring, step, scaling, allowed, of_dk: gl.constexpr, of_dv: gl.constexpr, across: gl.constexpr,
    STAGES: gl.constexpr, CAPPED: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What is left of a step when S is known and dP is the only product in flight; its tiles are let go."""
    q_ring, dout_ring, _, _, empty = ring
    factor, cap_log2 = scaling
    stage = step % STAGES
    p, logits = probabilities(st, by_query(ring, stage, 0, across) * -LOG2E, factor, cap_log2, allowed, CAPPED, MASKED)
    dv_sum = start_sum(dv, p, dout_ring, stage, of_dv)
    dpt = warpgroup_mma_wait(1, deps=[dpt])
    ds = product_gradient(p * (dpt - by_query(ring, stage, 1, across)), logits, cap_log2, CAPPED)
    dk_sum = start_sum(dk, ds, q_ring, stage, of_dk)
    dk, dv = warpgroup_mma_wait(0, deps=[dk_sum, dv_sum])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def dkv_others(
    dk, dv, k_tile, v_tile, ring, turn, walk, scaling, zeros, codes_ptr, words_ptr,
    of_dk: gl.constexpr, of_dv: gl.constexpr, across: gl.constexpr,
    STAGES: gl.constexpr, STRIDE: gl.constexpr, RB: gl.constexpr, BLOCK_M: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Fold this consumer's other steps into dk and dv; ``words_ptr`` points to the words of its keys in mask tile 0."""
    q_ring, dout_ring, _, ready, _ = ring
    full_steps, other_steps, _, to_other, group, _ = walk
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, across))
    column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, across))
    for step in range(turn[0], full_steps + other_steps, STRIDE):
        tile = (step + to_other) // group
        code = gl.load(codes_ptr + tile * BLOCK_M // RB).to(gl.int64)
        first = words_ptr + code * (RB * RB // WORD) + tile * BLOCK_M % RB // WORD
        allowed = allowed_bits(first + lane * (RB // WORD), lane >= 0, column, BLOCK_M)
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        st = start_product(k_tile, q_ring, stage, zeros)
        dpt = start_product(v_tile, dout_ring, stage, zeros)
        st = warpgroup_mma_wait(1, deps=[st])
        dk, dv = last_of_step(dk, dv, st, dpt, ring, step, scaling, allowed, of_dk, of_dv, across, STAGES, CAPPED, True)
    return dk, dv


@gluon.jit
def dkv_consumer(
    which, key_tiles, ring, walk, masks, scaling, left, place, out,
    D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, RB: gl.constexpr, BLOCK_M: gl.constexpr,
    CAPPED: gl.constexpr,
):  # fmt: skip
    """dk and dv of 64 keys from every step (``KEYS = 128``), or from every other one."""
    across: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    of_dk: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    of_dv: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    STRIDE: gl.constexpr = 2 * ROWS // KEYS
    k_tiles, v_tiles, keys_ready = key_tiles
    half, turn = which * (2 - STRIDE), which * (STRIDE - 1)
    k_tile, v_tile = k_tiles.index(half), v_tiles.index(half)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, across)
    dk = gl.zeros([ROWS, D], gl.float32, dk_layout)
    dv = gl.zeros([ROWS, DV], gl.float32, dv_layout)
    mbarrier.wait(keys_ready, 0)
    if turn < walk[0]:
        dk, dv = dkv_full(dk, dv, k_tile, v_tile, ring, (turn, walk[0]), scaling, zeros, of_dk, of_dv, across, STAGES, STRIDE, CAPPED)
    # Whose turn it is at the first of the other steps follows from the number of full ones.
    turn = walk[0] + (walk[0] + turn) % STRIDE
    codes_ptr, words_ptr = masks
    words_ptr += (place + half * ROWS) * (RB // WORD)
    dk, dv = dkv_others(
        dk, dv, k_tile, v_tile, ring, (turn, 0), walk, scaling, zeros, codes_ptr, words_ptr, of_dk, of_dv, across,
        STAGES, STRIDE, RB, BLOCK_M, CAPPED,
    )  # fmt: skip
    dk_left, dv_left, given = left
    if STRIDE == 1:
        store_result(dk, dv, half * ROWS, out, D, DV, dk_layout, dv_layout)
    elif which == 1:
        dk_left.store(dk)
        dv_left.store(dv)
        mbarrier.arrive(given, count=1)
    else:
        mbarrier.wait(given, 0)
        dk, dv = dk + dk_left.load(dk_layout), dv + dv_left.load(dv_layout)
        store_result(dk, dv, 0, out, D, DV, dk_layout, dv_layout)


@gluon.jit
def store_result(dk, dv, below, out, D: gl.constexpr, DV: gl.constexpr, dk_layout: gl.constexpr, dv_layout: gl.constexpr):
    """Write 64 rows of dk and dv, ``below`` the tile's first one, to the result, or unscaled to their slot."""
    to_dk, to_dv, scale, count, in_slot = out
    dk_ptr, dk_token, slot_dk_ptr = to_dk
    dv_ptr, dv_token, slot_dv_ptr = to_dv
    if in_slot:
        store_rows(slot_dk_ptr + below * D, D, dk, ROWS, D, dk_layout)
        store_rows(slot_dv_ptr + below * DV, DV, dv, ROWS, DV, dv_layout)
    else:
        store_rows(dk_ptr + below * dk_token, dk_token, dk * scale, count - below, D, dk_layout)
        store_rows(dv_ptr + below * dv_token, dv_token, dv, count - below, DV, dv_layout)


@gluon.jit
def load_key_tiles(k_of, v_of, key, D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr):
    """Ask for the tile's keys and values in parts of 64, and make the barrier that says that all are there."""
    k_rows, v_rows = rows_of_heads(k_of, 1, ROWS, D), rows_of_heads(v_of, 1, ROWS, DV)
    PARTS: gl.constexpr = KEYS // ROWS
    k_tiles = gl.allocate_shared_memory(k_rows.dtype, [PARTS, ROWS, D], k_rows.layout)
    v_tiles = gl.allocate_shared_memory(v_rows.dtype, [PARTS, ROWS, DV], v_rows.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    mbarrier.expect(ready, PARTS * (k_rows.block_type.nbytes + v_rows.block_type.nbytes))
    for i in gl.static_range(PARTS):
        copy_in(k_rows, [key + i * ROWS, 0], ready, k_tiles.index(i))
        copy_in(v_rows, [key + i * ROWS, 0], ready, v_tiles.index(i))
    return k_tiles, v_tiles, ready


@gluon.jit
def make_ring(sources, STAGES: gl.constexpr, COUNT: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, DV: gl.constexpr):
    """STAGES tiles of q and dout with their lse and delta, and barriers for "loaded" and "let go by COUNT consumers"."""
    q_rows, dout_rows, numbers, _, _, _ = sources
    q_ring = gl.allocate_shared_memory(q_rows.dtype, [STAGES, BLOCK_M, D], q_rows.layout)
    dout_ring = gl.allocate_shared_memory(dout_rows.dtype, [STAGES, BLOCK_M, DV], dout_rows.layout)
    number_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 2, BLOCK_M], numbers.layout)
    return q_ring, dout_ring, number_ring, barriers(STAGES, 1), barriers(STAGES, COUNT)


@gluon.jit
def room_for_sums(D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr):
    """Where the second consumer leaves its dk and dv, and the barrier that says that they are there; unused where both keep theirs."""
    SIZE: gl.constexpr = ROWS if KEYS == ROWS else 8
    dk_left = gl.allocate_shared_memory(gl.float32, [SIZE, D], gl.NVMMASharedLayout.get_default_for([SIZE, D], gl.float32))
    dv_left = gl.allocate_shared_memory(gl.float32, [SIZE, DV], gl.NVMMASharedLayout.get_default_for([SIZE, DV], gl.float32))
    given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(given, count=1)
    return dk_left, dv_left, given


@gluon.jit(do_not_specialize=["slots", "lines", "num_heads", "num_kv_heads", "layout_heads", "tokens", "places"])
def hopper_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, numbers_ptr, dk_ptr, dv_ptr, slot_dk_ptr, slot_dv_ptr,
    pieces_ptr, line_start_ptr, line_length_ptr, ptr_ptr, full_ptr, sub_at_ptr, idx_ptr, sub_ptr, words_ptr,
    query_start_ptr, query_end_ptr,
    scale, factor, cap_log2, slots, lines, num_heads, num_kv_heads, layout_heads, tokens, places,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, dout_batch, dout_token, dout_head,
    dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head,
    D: gl.constexpr, DV: gl.constexpr, KEYS: gl.constexpr, BLOCK_M: gl.constexpr, RB: gl.constexpr, SUBS: gl.constexpr,
    STAGES: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """``dv = P^T dout`` and ``dk = scale * dS^T q`` of KEYS = 64 or 128 keys; grid ``(pieces * SUBS, batch)``.

    The arguments are those of `s2attn.kernels.specialised_backward.specialised_dkv_kernel`, except that ``sub_ptr`` has the numbers of the
    mask tiles, and ``words_ptr`` these tiles ``[tile, key, query]`` as 32-bit words along the queries. ``numbers_ptr``
    has all of lse and then all of delta by block, ``places`` of each per head, lse = +inf where there is no query.
    """
    STRIDE: gl.constexpr = 2 * ROWS // KEYS
    gl.static_assert(STAGES > STRIDE, "a consumer holds one step while it asks for its next one")
    # A consumer tells phases of a barrier apart by their parity. A stage that both took in turns could be two phases ahead of one of them.
    gl.static_assert(STAGES % STRIDE == 0, "each stage belongs to one consumer where they take turns")
    number, tile = gl.program_id(0) // SUBS, gl.program_id(0) % SUBS
    item, full_from, full_to, other_from, other_to, slot = read_piece(pieces_ptr, number)
    kv_head, line = (item // lines).to(gl.int64), item % lines
    batch, group = gl.program_id(1).to(gl.int64), num_heads // num_kv_heads
    begin, full, _, codes_ptr = find_list((ptr_ptr, full_ptr, sub_at_ptr, sub_ptr), kv_head * layout_heads // num_kv_heads, line, lines, 1)
    place, end = tile * KEYS, gl.load(query_end_ptr + line)
    key, count = gl.load(line_start_ptr + line) + place, gl.load(line_length_ptr + line) - place

    k_of = (k_ptr + batch * k_batch + kv_head * k_head, tokens, k_token, k_head)
    v_of = (v_ptr + batch * v_batch + kv_head * v_head, tokens, v_token, v_head)
    key_tiles = load_key_tiles(k_of, v_of, key, D, DV, KEYS)
    head = kv_head * group
    q_rows = rows_of_heads((q_ptr + batch * q_batch + head * q_head, end, q_token, q_head), group, BLOCK_M, D)
    dout_rows = rows_of_heads((dout_ptr + batch * dout_batch + head * dout_head, end, dout_token, dout_head), group, BLOCK_M, DV)
    of_group, apart = numbers_ptr + (batch * num_heads + head) * places, gl.num_programs(1).to(gl.int64) * num_heads * places
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2, BLOCK_M], gl.float32)
    numbers = make_descriptor(of_group, [2, group * places], [apart, 1], [2, BLOCK_M], layout)
    sources = (q_rows, dout_rows, numbers, q_head, dout_head, places)
    ring = make_ring(sources, STAGES, KEYS // ROWS, BLOCK_M, D, DV)
    left = room_for_sums(D, DV, KEYS)

    PER: gl.constexpr = RB // BLOCK_M
    full_steps, other_steps = (full_to - full_from) * PER, (other_to - other_from) * PER
    walk = (full_steps, other_steps, full_from * PER, other_from * PER - full_steps, group, full)
    first = slot_rows(batch, slots, slot, 1, 0, tile, SUBS, KEYS)
    to_dk = (dk_ptr + batch * dk_batch + kv_head * dk_head + key * dk_token, dk_token, slot_dk_ptr + first * D)
    to_dv = (dv_ptr + batch * dv_batch + kv_head * dv_head + key * dv_token, dv_token, slot_dv_ptr + first * DV)
    masks, scaling, out = (codes_ptr, words_ptr), (factor, cap_log2), (to_dk, to_dv, scale, count, slot >= 0)
    gl.warp_specialize([
        (dkv_consumer, (0, key_tiles, ring, walk, masks, scaling, left, place, out, D, DV, KEYS, STAGES, RB, BLOCK_M, CAPPED)),
        (dkv_consumer, (1, key_tiles, ring, walk, masks, scaling, left, place, out, D, DV, KEYS, STAGES, RB, BLOCK_M, CAPPED)),
        (dkv_producer, (sources, ring, (idx_ptr + begin, query_start_ptr), walk, STAGES, RB, BLOCK_M)),
    ], [4, 1], [240, 24])  # fmt: skip
