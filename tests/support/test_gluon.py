"""The runner of Gluon kernels: right numbers for a right kernel in any order, and an error for every planted fault."""

from __future__ import annotations

import pytest
import torch

gluon = pytest.importorskip("triton.experimental.gluon", reason="triton is not installed")
hopper = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper", reason="triton is not installed")
gl, mbarrier, tma = gluon.language, hopper.mbarrier, hopper.tma
fence_async_shared, warpgroup_mma, warpgroup_mma_wait = hopper.fence_async_shared, hopper.warpgroup_mma, hopper.warpgroup_mma_wait

SIZE, W = 16, 32


# A small kernel with every construct that the attention kernels use, into which single faults can be planted: two consumers add up
# (x a_j^T) a_j over the blocks a_j that a list names, for tiles x of their own; the programs are persistent.


@gluon.jit
def load_ring(a_ptr, x_ptr, list_ptr, count_ptr, rows, items, lists, rings, bars, SIZE: gl.constexpr, W: gl.constexpr, RING: gl.constexpr,
              FAULT: gl.constexpr):  # fmt: skip
    x_ring, a_ring = rings
    x_ready, x_empty, ready, empty = bars
    box_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIZE, W], gl.float16)
    if FAULT != "a descriptor per item":
        boxes = tma.make_tensor_descriptor(a_ptr, [rows, W], [W, 1], [SIZE, W], box_layout)
    x_boxes = tma.make_tensor_descriptor(x_ptr, [items * 2 * SIZE, W], [W, 1], [SIZE, W], box_layout)
    use = 0
    if FAULT == "phase from another counter":
        use = 1
    turn = 0
    item = gl.program_id(0)
    while item < items:
        if FAULT == "a descriptor per item":
            boxes = tma.make_tensor_descriptor(a_ptr, [rows, W], [W, 1], [SIZE, W], box_layout)
        for which in gl.static_range(2):
            if FAULT != "no wait for an empty place":
                mbarrier.wait(x_empty.index(which), (turn & 1) ^ 1)
            mbarrier.expect(x_ready.index(which), x_boxes.block_type.nbytes)
            tma.async_copy_global_to_shared(x_boxes, [(item * 2 + which) * SIZE, 0], x_ready.index(which), x_ring.index(which))
        for j in range(gl.load(count_ptr + item)):
            at = gl.load(list_ptr + item * lists + j)
            stage = use % RING
            phase = (use // RING) & 1
            if FAULT == "wrong first phase":
                mbarrier.wait(empty.index(stage), phase)
            else:
                mbarrier.wait(empty.index(stage), phase ^ 1)
            if FAULT == "too few bytes":
                mbarrier.expect(ready.index(stage), boxes.block_type.nbytes // 2)
            else:
                mbarrier.expect(ready.index(stage), boxes.block_type.nbytes)
            if FAULT == "wrong stage":
                tma.async_copy_global_to_shared(boxes, [at * SIZE, 0], ready.index(stage), a_ring.index((use + 1) % RING))
            else:
                tma.async_copy_global_to_shared(boxes, [at * SIZE, 0], ready.index(stage), a_ring.index(stage))
            use += 1
        turn += 1
        item += gl.num_programs(0)


@gluon.jit
def fold_ring(which, out_ptr, count_ptr, n, items, rings, bars, SIZE: gl.constexpr, W: gl.constexpr, RING: gl.constexpr,
              FAULT: gl.constexpr):  # fmt: skip
    x_ring, a_ring = rings
    x_ready, x_empty, ready, empty = bars
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    zeros = gl.zeros([SIZE, SIZE], gl.float32, mma_s)
    use = 0
    turn = 0
    item = gl.program_id(0)
    while item < items:
        acc = gl.zeros([SIZE, W], gl.float32, mma_o)
        if FAULT != "no wait for x":
            mbarrier.wait(x_ready.index(which), turn & 1)
        for _j in range(gl.load(count_ptr + item)):
            stage = use % RING
            if FAULT == "phase never flips":
                mbarrier.wait(ready.index(stage), 0)
            elif FAULT != "no wait for a":
                mbarrier.wait(ready.index(stage), (use // RING) & 1)
            s = warpgroup_mma(x_ring.index(which), a_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            if FAULT == "product used unfinished":
                s = s * 2
            if FAULT == "released before the first product":
                mbarrier.arrive(empty.index(stage), count=1)
            s = warpgroup_mma_wait(0, deps=[s])
            p = gl.convert_layout(s.to(gl.float16), gl.DotOperandLayout(0, mma_o, 2))
            acc_next = warpgroup_mma(p, a_ring.index(stage), acc, is_async=True)
            if FAULT == "released before the last product":
                mbarrier.arrive(empty.index(stage), count=1)
            if FAULT == "a wait that lets one slip":
                acc = warpgroup_mma_wait(1, deps=[acc_next])
            elif FAULT == "a product for ever":
                acc = acc
            else:
                acc = warpgroup_mma_wait(0, deps=[acc_next])
            if FAULT == "two arrivals":
                mbarrier.arrive(empty.index(stage), count=2)
            elif FAULT != "never released" and FAULT != "released before the first product" and FAULT != "released before the last product":
                mbarrier.arrive(empty.index(stage), count=1)
            use += 1
        mbarrier.arrive(x_empty.index(which), count=1)
        row = (item * 2 + which) * SIZE + gl.arange(0, SIZE, gl.SliceLayout(1, mma_o))
        at = row[:, None] * W + gl.arange(0, W, gl.SliceLayout(0, mma_o))[None, :]
        if FAULT == "no mask":
            gl.store(out_ptr + at, acc)
        else:
            gl.store(out_ptr + at, acc, mask=(row < n)[:, None])
        turn += 1
        item += gl.num_programs(0)


@gluon.jit
def ring(a_ptr, x_ptr, out_ptr, list_ptr, count_ptr, rows, n, items, lists, SIZE: gl.constexpr, W: gl.constexpr, RING: gl.constexpr,
         FAULT: gl.constexpr):  # fmt: skip
    box_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIZE, W], gl.float16)
    x_ring = gl.allocate_shared_memory(gl.float16, [2, SIZE, W], box_layout)
    a_ring = gl.allocate_shared_memory(gl.float16, [RING, SIZE, W], box_layout)
    x_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(x_ready.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    for i in gl.static_range(RING):
        mbarrier.init(ready.index(i), count=1)
        if FAULT == "wrong count of arrivals":
            mbarrier.init(empty.index(i), count=1)
        elif FAULT != "barrier without a beginning":
            mbarrier.init(empty.index(i), count=2)
    rings = (x_ring, a_ring)
    bars = (x_ready, x_empty, ready, empty)
    gl.warp_specialize([
        (fold_ring, (0, out_ptr, count_ptr, n, items, rings, bars, SIZE, W, RING, FAULT)),
        (fold_ring, (1, out_ptr, count_ptr, n, items, rings, bars, SIZE, W, RING, FAULT)),
        (load_ring, (a_ptr, x_ptr, list_ptr, count_ptr, rows, items, lists, rings, bars, SIZE, W, RING, FAULT)),
    ], [4, 1], [232, 40])  # fmt: skip


@gluon.jit
def through_shared(x_ptr, out_ptr, n, SIZE: gl.constexpr, W: gl.constexpr, FAULT: gl.constexpr):
    """Twice x, by stores to shared memory and the copy engine's stores to memory; two boxes, one after another."""
    box_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIZE, W], gl.float16)
    place = gl.allocate_shared_memory(gl.float16, [SIZE, W], box_layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    x_boxes = tma.make_tensor_descriptor(x_ptr, [n, W], [W, 1], [SIZE, W], box_layout)
    boxes = tma.make_tensor_descriptor(out_ptr, [n, W], [W, 1], [SIZE, W], box_layout)
    for i in range(2):
        mbarrier.expect(ready, x_boxes.block_type.nbytes)
        tma.async_copy_global_to_shared(x_boxes, [i * SIZE, 0], ready, place)
        if FAULT != "read too early":
            mbarrier.wait(ready, i & 1)
        value = place.load(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
        place.store(value * 2.0)
        if FAULT != "no fence":
            fence_async_shared()
        tma.async_copy_shared_to_global(boxes, [i * SIZE, 0], place)
        if FAULT != "no wait for the store":
            tma.store_wait(0)


def run(seed: int, fault: str = "", ring_depth: int = 2, programs: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel made, and what it should have made; the last block of a and the last rows of out are short."""
    from tests.support.gluon import run_gluon

    numbers = torch.Generator().manual_seed(seed)
    items, blocks = 3, 6
    rows, n = blocks * SIZE - 5, items * 2 * SIZE - 7
    a = torch.randn(rows, W, generator=numbers).half() / 4
    x = torch.randn(items * 2 * SIZE, W, generator=numbers).half() / 4
    lists = torch.stack([torch.randperm(blocks, generator=numbers) for _ in range(items)]).int()
    counts = torch.randint(0, blocks + 1, (items,), generator=numbers).int()
    counts[seed % items] = blocks
    out = torch.full((n, W), torch.nan)
    run_gluon(ring, (programs,), a, x, out, lists, counts, rows, n, items, blocks, seed=seed, SIZE=SIZE, W=W, RING=ring_depth, FAULT=fault)
    whole = torch.cat([a, a.new_zeros(5, W)]).double()
    expected = torch.zeros(items * 2 * SIZE, W, dtype=torch.float64)
    for item in range(items):
        at = slice(item * 2 * SIZE, (item + 1) * 2 * SIZE)
        for block in lists[item, : counts[item]].tolist():
            part = whole[block * SIZE : (block + 1) * SIZE]
            expected[at] += x[at].double() @ part.T @ part
    return out, expected[:n]


@pytest.mark.parametrize("ring_depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_right_kernel_gives_right_numbers(seed, ring_depth):
    out, expected = run(seed, ring_depth=ring_depth, programs=1 + seed)
    assert (out - expected).abs().max() < 2e-3 * expected.abs().max()


def test_a_seed_is_one_order():
    first, again = (run(5, "", 2)[0] for _ in range(2))
    assert torch.equal(first, again)


FAULTS = {
    "wrong first phase": "nobody can go on.*partition 2 .load_ring. waits for phase 0",
    "too few bytes": "nobody can go on.*bytes are missing",
    "wrong stage": "shared1",
    "no wait for an empty place": "overwrites shared0",
    "no wait for x": "x|shared0",
    "no wait for a": "shared1",
    "phase never flips": "shared1",
    "phase from another counter": "nobody can go on",
    "product used unfinished": "unfinished product",
    "released before the first product": "overwrites|still reads|without having waited",
    "released before the last product": "overwrites|still reads|without having waited",
    "a wait that lets one slip": "before the wait that completes it",
    "a product for ever": "ends with .* products under way|still reads|overwrites",
    "two arrivals": "which has had the 2 arrivals|nobody can go on|without having waited|overwrites",
    "never released": "nobody can go on",
    "wrong count of arrivals": "arrivals of this phase|overwrites|without having waited",
    "barrier without a beginning": "before it is initialised",
    "no mask": "a write of out_ptr at .* outside",
    "a descriptor per item": "makes a descriptor anew",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_faults_are_caught(fault, seed):
    from tests.support.gluon import ProtocolError

    with pytest.raises(ProtocolError, match=FAULTS[fault]):
        run(seed, fault, programs=1)


@pytest.mark.parametrize("seed", range(3))
def test_copies_out_of_shared_memory(seed):
    from tests.support.gluon import run_gluon

    n = 2 * SIZE - 3
    x, out = torch.randn(n, W).half(), torch.full((n, W), torch.nan).half()
    run_gluon(through_shared, (1,), x, out, n, seed=seed, SIZE=SIZE, W=W, FAULT="")
    assert torch.equal(out, x * 2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("read too early", "while a copy into it"), ("no fence", "no fence after"), ("no wait for the store", "still reads it")],
)
def test_faults_of_copies_out_of_shared_memory(fault, words):
    from tests.support.gluon import ProtocolError, run_gluon

    x = torch.zeros(2 * SIZE, W).half()
    with pytest.raises(ProtocolError, match=words):
        run_gluon(through_shared, (1,), x, x.clone(), 2 * SIZE, SIZE=SIZE, W=W, FAULT=fault)


def test_addresses_that_the_copy_engine_refuses():
    from tests.support.gluon import ProtocolError, run_gluon

    odd = torch.zeros(2 * SIZE * W + 1).half()[1:].view(2 * SIZE, W)
    with pytest.raises(ProtocolError, match="not multiples of 16 bytes"):
        run_gluon(through_shared, (1,), odd, odd.clone(), 2 * SIZE, SIZE=SIZE, W=W, FAULT="")


def test_types_meet_as_in_triton():
    from triton.experimental.gluon import language as gl

    from tests.support.gluon.values import Value, value_of

    small, half = Value([1, -7], gl.int32), Value([1.0, 2.0], gl.float16)
    assert (small * 2).dtype == gl.int32 and (small * Value(1, gl.int64)).dtype == gl.int64
    assert (small * 0.5).dtype == gl.float32 and (half * 0.5).dtype == gl.float16
    assert (half + Value(1, gl.float32)).dtype == gl.float32 and (half + Value(1, gl.bfloat16)).array.tolist() == [2.0, 3.0]
    assert (small // 2).array.tolist() == [0, -3] and (small % 2).array.tolist() == [1, -1]
    assert (small < 0).dtype == gl.int1 and value_of(2**31).dtype == gl.int64
    assert Value([1.0], gl.float32).to(gl.bfloat16).dtype == gl.bfloat16
