"""What is promised of the portable backend alone: memory, plans, and the parts that a CPU does not reach by itself."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import s2attn
from s2attn import Local, Random, Sink, Stride, Window
from s2attn.backends import Scoring, get_backend
from s2attn.backends.portable import Portable, loops
from s2attn.backends.portable import run as walk
from s2attn.backends.portable.cache import cached_plan
from s2attn.backends.portable.cuts import MOST_ROWS, cheapest_groups
from s2attn.backends.portable.plan import make_plan
from s2attn.backends.portable.rows import Rows, add_in_rounds
from s2attn.backends.portable.tile import Keys, LoopTile, Places, StackTile
from s2attn.layout import Layout, build_layout
from tests.support.problems import check_backend, random_problem, run

S2 = Local(4) | Stride(8)


class LargestResult(TorchDispatchMode):
    """Remembers the most numbers that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in tree_iter(result):
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("tile", [None, StackTile()], ids=["default", "stack"])
@pytest.mark.parametrize("scoring", [Scoring(0.25), Scoring(0.25, 5.0, torch.zeros(8))], ids=["plain", "softcap and sinks"])
def test_memory_is_linear_in_the_length(tile, scoring) -> None:
    """At 16k tokens and 8 heads nothing is larger than a small multiple of q, let alone S x S, which is 256 times q per head."""
    length, heads, width = 16384, 8, 16
    backend, layout = Portable(tile), build_layout(Window(200) | Stride(64), heads, seqlen_q=length)
    q, k, v = (torch.randn(1, length, heads, width) for _ in range(3))
    with LargestResult() as largest:
        out, lse = backend.forward(q, k, v, layout, scoring)
        backend.backward(out, None, q, k, v, out, lse, layout, scoring)
    assert largest.numel <= 4 * q.numel() < length * length / 25


def test_keys_are_not_repeated_for_query_heads() -> None:
    layout = build_layout(Window(100), 16, 1, seqlen_q=1, seqlen_k=4096)
    q, k = torch.randn(1, 1, 16, 64), torch.randn(1, 4096, 1, 64)
    with LargestResult() as largest:
        get_backend("portable").forward(q, k, k, layout, Scoring(0.125))
    assert largest.numel <= k.numel()


def test_work_is_proportional_to_listed_blocks() -> None:
    layout = build_layout(S2, 8, seqlen_q=8192)
    plan = make_plan(layout, 1, 8, 8)
    done = sum((r.high - r.low) * r.blocks * r.rows for r in plan.runs) / layout.block
    assert done <= 1.4 * layout.rows.entries


def test_a_random_layout_is_not_merged_into_a_dense_one() -> None:
    layout = build_layout(Random(3) | Window(1), 4, seqlen_q=8192)
    plan = make_plan(layout, 1, 4, 4)
    assert sum((r.high - r.low) * r.blocks * r.rows for r in plan.runs) / layout.block <= 1.1 * layout.rows.entries


def test_every_row_that_sees_a_key_is_in_one_item() -> None:
    p = random_problem(4, 2, 2, 150, 90, 32, causal=True, batch=2)
    plan = make_plan(p.layout, 2, 4, 2)
    seeing = p.mask.any(-1).t().expand(2, -1, -1).flatten().nonzero()[:, 0]
    assert plan.place.unique().numel() == plan.place.numel()
    assert torch.isin(seeing, plan.place).all()


def test_groups_hold_at_most_most_rows() -> None:
    for per_unit in (1, 4, 64):
        groups = cheapest_groups(build_layout(Local(32), 1, seqlen_q=4096), per_unit)
        assert (groups.tokens * per_unit).max() == max(MOST_ROWS, 64 * per_unit)


@pytest.mark.parametrize("chunk_bytes", [1, 100_000, 1 << 30])
@pytest.mark.parametrize("scoring", [{}, {"softcap": 1.5, "sinks": torch.arange(4.0)}], ids=["plain", "softcap and sinks"])
def test_results_do_not_depend_on_how_items_are_cut_into_chunks(monkeypatch, chunk_bytes: int, scoring: dict) -> None:
    p = random_problem(4, 2, 4, 150, 150, 16, causal=True, batch=2, **scoring).to(torch.float32)
    expected = run(get_backend("portable"), p)
    monkeypatch.setattr(walk, "CHUNK_BYTES", chunk_bytes)
    got = run(get_backend("portable"), p)
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in ("out", "lse", "dq", "dk", "dv"))


@pytest.mark.parametrize("most", [0, 1000])
def test_masks_by_table_or_by_item(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(walk, "MOST_KINDS", most)
    check_backend(get_backend("portable"), random_problem(4, 2, 4, 200, 150, 16, causal=True, batch=2))


@pytest.mark.parametrize("hidden", [0, 40, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bent", [False, True], ids=["plain", "softcap and sinks"])
def test_both_tiles_agree(hidden: int, dtype: torch.dtype, bent: bool) -> None:
    q, dout, k, v = (torch.randn(3, *shape, dtype=dtype) for shape in ((50, 24), (50, 8), (96, 24), (96, 8)))
    keys = Keys(Places.whole(k), Places.whole(v))
    if hidden:
        mask = torch.zeros(2, 50, hidden, dtype=dtype).masked_fill_(torch.rand(2, 50, hidden) < 0.5, -torch.inf)
        keys = replace(keys, mask=mask, kind=torch.tensor([1, 0, 1]))
    if bent:
        keys = replace(keys, sinks=torch.randn(3, 50, dtype=dtype))
    results, scoring = [], Scoring(0.3, 1.2 if bent else None)
    for tile in (LoopTile(), StackTile()):
        out, lse = tile.attend(q, keys, scoring)
        results.append((out, lse, *tile.attend_backward(dout, lse.sin(), q, keys, out, lse, scoring)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_sums_in_rounds() -> None:
    index, source = torch.randint(0, 7, (50,)), torch.randn(50, 3, dtype=torch.float64)
    total = torch.randn(7, 3, dtype=torch.float64)
    expected = total.index_add(0, index, source)
    add_in_rounds(total, index, source)
    assert torch.equal(total, expected)
    add_in_rounds(total, index[:0], source[:0])
    assert torch.equal(total, expected)


def test_other_devices_sum_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "add_blocks", add_in_rounds)
    check_backend(Portable(StackTile()), random_problem(4, 2, 2, 100, 100, 16, causal=True))


def test_rows_are_views_where_strides_allow() -> None:
    fused = torch.randn(2, 10, 3, 4, 8)
    for x, copied in ((fused[:, :, 1], False), (fused[:, 2:7, 2], False), (fused[:, :, 1, :, :6], True), (fused[:, :, 0].mT, True)):
        rows = Rows.of(x)
        assert (rows.table.untyped_storage().data_ptr() != fused.untyped_storage().data_ptr()) == copied
        batch, token, head = torch.meshgrid(*(torch.arange(n) for n in x.shape[:3]), indexing="ij")
        assert torch.equal(rows.table[rows.at(batch, token, head)], x)


def test_a_plan_is_made_once_and_dies_with_its_layout() -> None:
    layout = build_layout(S2, 4, 2, seqlen_q=256)
    plan = cached_plan(layout, 1, 4, 2)
    again = Layout.from_tensors(layout.tensors(), causal=True, packed=False)
    assert cached_plan(again, 1, 4, 2) is plan
    assert cached_plan(layout, 2, 4, 2) is not plan and cached_plan(layout, 1, 8, 2) is not plan
    other = Layout.from_tensors([*layout.tensors()[:5], ~layout.tiles, *layout.tensors()[6:]], causal=True, packed=False)
    assert cached_plan(other, 1, 4, 2) is not plan
    gone = weakref.ref(plan)
    del plan, layout, again, other
    gc.collect()
    assert gone() is None


def test_forward_and_backward_of_the_op_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("s2attn.backends.portable.cache.make_plan", lambda *args: made.append(args) or make_plan(*args))
    layout = build_layout(Window(20) | Sink(7), 2, seqlen_q=130)
    q, k, v = (torch.randn(1, 130, 2, 16, requires_grad=True) for _ in range(3))
    for source in (layout, Window(21) | Sink(7)):
        for _ in range(2):
            s2attn.attention(q, k, v, source, backend="portable").sum().backward()
    assert len(made) == 2


def test_a_large_sink_does_not_hide_nan() -> None:
    """Which queries see a broken key is found by attention of its own, which no sink may outweigh."""
    p = random_problem(2, 2, 2, 100, 100, 32, causal=True, sinks=torch.tensor([300.0, 0.0])).to(torch.float32)
    k = p.k.clone()
    k[:, 60] = torch.nan
    out, _ = get_backend("portable").forward(p.q, k, p.v, p.layout, p.scoring)
    seen = p.mask[:, :, 60].t()[None]
    assert out[seen].isnan().all() and out[~seen].isfinite().all()


def test_low_precision_is_rounded_once() -> None:
    """float32 inside: the result is the float32 result of the same inputs, rounded."""
    p = random_problem(4, 2, 2, 130, 130, 32, causal=True).to(torch.bfloat16)
    out, lse = get_backend("portable").forward(*p.arguments)
    wide, wide_lse = get_backend("portable").forward(p.q.float(), p.k.float(), p.v.float(), p.layout, p.scoring)
    assert torch.equal(out, wide.bfloat16()) and torch.equal(lse, wide_lse)


def test_a_query_that_sees_nan_adds_nothing_to_keys() -> None:
    p = random_problem(2, 2, 2, 100, 100, 32, causal=True).to(torch.float32)
    k = p.k.clone()
    k[:, 60] = torch.nan
    out, lse = get_backend("portable").forward(p.q, k, p.v, p.layout, p.scoring)
    dq, dk, dv = get_backend("portable").backward(p.dout, p.dlse, p.q, k, p.v, out, lse, p.layout, p.scoring)
    seen = p.mask[:, :, 60].t()[None]
    assert out[seen].isnan().all() and dq[seen].isnan().all() and not out[~seen].isnan().any()
    assert dk.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("scoring", [{}, {"softcap": 1.5, "sinks": torch.arange(4.0)}], ids=["plain", "softcap and sinks"])
def test_loops_have_the_same_bits_in_either_interpreter(monkeypatch: pytest.MonkeyPatch, scoring: dict) -> None:
    """torch's own takes them as they are, and Python runs them where it does not."""
    assert all(isinstance(loops.without_lock(loop), torch.jit.ScriptFunction) for loop in (loops.attend_items, loops.differentiate_items))
    monkeypatch.setattr(loops, "STEP_SCORES", 64 * 64)
    p = random_problem(4, 2, 4, 300, 300, 32, causal=True, batch=2, **scoring).to(torch.float32)
    expected = run(get_backend("portable"), p)
    monkeypatch.setattr("s2attn.backends.portable.tile.without_lock", lambda loop: loop)
    got = run(get_backend("portable"), p)
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in ("out", "lse", "dq", "dk", "dv"))


def test_a_loop_that_torch_refuses_runs_as_it_is() -> None:
    def refused(x: str) -> str:
        return x.format(*[1])

    assert loops.without_lock(refused) is refused
