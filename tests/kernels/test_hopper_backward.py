"""dq and dkv of the Hopper kernels, run on a CPU by the rules of barriers, copies and products, against the float64 oracle."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from s2attn import Dense, Local, Pattern, Random, Sink, Stride, Window, build_layout
from s2attn.backends.triton import hopper_backward
from s2attn.backends.triton.hopper_backward import HopperForm, choose_hopper_form, hopper_dkv, hopper_dq, hopper_way
from s2attn.backends.triton.walk import walk_columns, walk_rows
from s2attn.testing import dense_mask
from s2attn.testing.gluon import run_gluon
from s2attn.testing.oracle import assert_close, eager, oracle
from s2attn.testing.problems import Problem, by_autograd, make_problem, random_problem

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture
def on_cpu(monkeypatch) -> Callable[[int], None]:
    """Starts of kernels go to the runner, in the order of the seed that this is called with."""

    def seeded(seed: int) -> None:
        def start(kernel, pointers, starts, key, describe):
            call = describe()
            constants = {name: value for name, value in call.constants.items() if name != "num_warps"}
            run_gluon(kernel, call.grid, *pointers, *call.rest, seed=seed, **constants)

        monkeypatch.setattr(hopper_backward, "start", start)

    return seeded


def forms(p: Problem) -> tuple[HopperForm, HopperForm]:
    """Those that a launch would choose."""
    heads, kv_heads = p.q.shape[2], p.k.shape[2]
    shape = p.q.shape[-1], p.v.shape[-1], p.layout.block, heads // max(p.layout.heads, kv_heads), p.softcap is not None
    return choose_hopper_form("dq", *shape), choose_hopper_form("dkv", *shape)


def after_forward(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """lse and delta of an exact forward pass."""
    out, lse = oracle(p.q, p.k, p.v, p.mask, p.scoring.scale, softcap=p.softcap)
    delta = (out * p.dout.double()).sum(-1).transpose(1, 2) - (0 if p.dlse is None else p.dlse.double())
    return lse.float(), torch.where(torch.isfinite(lse), delta, torch.zeros_like(delta)).float()


def gradients(p: Problem, of_dq: HopperForm, of_dkv: HopperForm, given: tuple[torch.Tensor, torch.Tensor], key_range: int = 0):
    """dq, dk and dv of the Hopper kernels; dq alone where the query heads of a group differ in their lists."""
    heads, kv_heads, block = p.q.shape[2], p.k.shape[2], p.layout.block
    rows = walk_rows(p.layout, of_dq.factor(block), 1, heads // p.layout.heads, key_range, cut=key_range > 0)
    dq = hopper_dq(p.q, p.k, p.v, p.dout, *given, hopper_way("dq", of_dq, p.layout, rows), p.scoring)
    if kv_heads % p.layout.heads:
        return (dq,)
    columns = walk_columns(p.layout, of_dkv.factor(block), 1, heads, kv_heads)
    return dq, *hopper_dkv(p.q, p.k, p.v, p.dout, *given, hopper_way("dkv", of_dkv, p.layout, columns), p.scoring)


def check(p: Problem, of_dq: HopperForm, of_dkv: HopperForm, key_range: int = 0) -> None:
    """Gradients err at most twice what eager code in this dtype errs against float64."""
    exact, plain = by_autograd(oracle, p.to(torch.float64)), by_autograd(eager, p)
    for name, got in zip(("dq", "dk", "dv"), gradients(p, of_dq, of_dkv, after_forward(p), key_range), strict=False):
        value = getattr(exact, name)
        assert got.dtype == p.q.dtype
        assert_close(name, got, getattr(plain, name), value, terms=4 * max(1.0, value.abs().max().item()))


# pattern, T, S, H, G, D, DV, block, causal
CASES: dict[str, tuple[Pattern, int, int, int, int, int, int, int, bool]] = {
    "two heads stacked": (Local(2) | Stride(3), 300, 300, 4, 2, 64, 64, 64, True),
    "two rows merged": (Local(2) | Stride(3), 330, 330, 1, 1, 64, 64, 64, True),
    "rows that list different blocks": (Local(1) | Stride(3), 128, 832, 1, 1, 64, 64, 64, True),
    "blocks of 128": (Window(150) | Sink(5), 280, 280, 2, 1, 64, 128, 128, True),
    "blocks of 256": (Window(90), 270, 270, 1, 1, 64, 64, 256, True),
    "lists per query head": (Local(1) | Random(1, heads="query"), 200, 260, 2, 1, 64, 64, 64, True),
    "rows that see nothing": (Stride(4, offset=1), 200, 330, 4, 1, 64, 64, 64, True),
    "more queries than keys": (Dense(), 150, 70, 2, 1, 128, 128, 64, True),
    "not causal, full only": (Dense(), 128, 192, 2, 1, 128, 64, 64, False),
    "not causal": (Window(30) | Random(1), 130, 190, 2, 2, 64, 64, 64, False),
}


def problem(name: str, dtype: torch.dtype = torch.float16, **more) -> Problem:
    pattern, n, m, heads, kv_heads, dim, dim_v, block, causal = CASES[name]
    torch.manual_seed(0)
    layout = build_layout(pattern, heads, kv_heads, n, m, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, m, causal=causal)
    return make_problem(layout, mask, heads=heads, kv_heads=kv_heads, width=dim, v_width=dim_v, **more).to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name, on_cpu, poisoned_empty):
    on_cpu(len(name))
    p = problem(name)
    check(p, *forms(p))


@pytest.mark.parametrize("name", ["two heads stacked", "two rows merged", "blocks of 128"])
def test_soft_cap(name, on_cpu, poisoned_empty):
    on_cpu(1)
    p = problem(name, torch.bfloat16, softcap=1.5)
    check(p, *forms(p))


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts_ring_depths_and_orders(seed, on_cpu, poisoned_empty):
    on_cpu(seed)
    torch.manual_seed(seed)
    turn = random.Random(seed)
    block = (64, 128)[seed % 2]
    kv_heads, group = turn.choice([1, 2]), turn.choice([1, 2, 4])
    heads, layout_heads = kv_heads * group, turn.choice([1, kv_heads])
    n, m = (turn.randrange(block // 2, 4 * block) for _ in range(2))
    shape = {"width": 64, "v_width": turn.choice([64, 128]), "batch": turn.choice([1, 2])}
    p = random_problem(heads, kv_heads, layout_heads, n, m, block, causal=turn.random() < 0.5, **shape)
    stack = 2 if block == 64 and group % 2 == 0 and turn.random() < 0.7 else 1
    of_dq = HopperForm(128 // stack, stack, turn.choice([32, 64]), turn.choice([2, 3, 5]))
    keys = 64 if block == 64 else turn.choice([64, 128])
    of_dkv = HopperForm(keys, 1, turn.choice([32, 64]), turn.choice([4, 6] if keys == 64 else [2, 3, 6]))
    check(p.to(torch.float16), of_dq, of_dkv)


def cut_everything(monkeypatch) -> None:
    from s2attn.backends.triton import walk

    monkeypatch.setattr(walk, "LEAST_TOKENS", 64)
    monkeypatch.setattr(walk, "piece_limits", lambda counts, seq, copies, least: torch.full((len(seq),), least).numpy())


@pytest.mark.parametrize("name", ["two heads stacked", "two rows merged", "blocks of 128"])
def test_cut_rows_and_columns(name, on_cpu, poisoned_empty, monkeypatch):
    cut_everything(monkeypatch)
    on_cpu(2)
    p = problem(name)
    of_dq, of_dkv = forms(p)
    heads, kv_heads, block = p.q.shape[2], p.k.shape[2], p.layout.block
    assert walk_columns(p.layout, 1, 1, heads, kv_heads).slots and walk_rows(p.layout, of_dq.factor(block), 1, 1, 2 * block).slots
    check(p, of_dq, of_dkv, key_range=2 * block)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_packed_sequence_reads_nothing_of_the_next(heads, on_cpu, poisoned_empty):
    pattern = Local(2) | Stride(2)
    lengths = [0, 100, 0, 75, 64, 190]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    layout = build_layout(pattern, heads, 1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    mask = torch.zeros(heads, total, total, dtype=torch.bool)
    for lo, n in zip(cu.tolist(), lengths, strict=False):
        mask[:, lo : lo + n, lo : lo + n] = dense_mask(pattern, heads, 1, n, n) if n else False
    p = make_problem(layout, mask, heads=heads, kv_heads=1, width=64).to(torch.float16)
    on_cpu(heads)
    check(p, *forms(p))
    # Even a value that is no number, which a weight of 0 would not hide, stays in its own sequence.
    spoilt, given = replace(p, **{name: getattr(p, name).clone() for name in ("q", "k", "v", "dout")}), after_forward(p)
    once = gradients(p, *forms(p), given)
    for x in (spoilt.q, spoilt.k, spoilt.v, spoilt.dout):
        x[:, 100:] = float("nan")
    for x in given:
        x[..., 100:] = float("nan")
    for name, got, expected in zip(("dq", "dk", "dv"), gradients(spoilt, *forms(p), given), once, strict=True):
        assert torch.equal(got[:, :100], expected[:, :100]), name


def test_heads_may_lie_in_any_order_of_memory(on_cpu, poisoned_empty):
    on_cpu(3)
    p = problem("two heads stacked")
    apart = {name: getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "v")}
    wide = torch.zeros(*p.k.shape[:-1], 72, dtype=p.k.dtype)
    wide[..., :64] = p.k
    check(replace(p, **apart, k=wide[..., :64]), *forms(p))


def test_the_same_bits_in_any_order(on_cpu):
    p, results = problem("two rows merged"), []
    for seed in (4, 5):
        on_cpu(seed)
        results.append(gradients(p, *forms(p), after_forward(p)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# kernel, what stands there, what is planted, the problem, and the error's words; a number that is wrong is an error of the oracle's.
FAULTS: dict[str, tuple[str, str, str, str, str]] = {
    "dq: wrong first phase": (
        "dq", "mbarrier.wait(empty.index(stage), phase ^ 1)", "mbarrier.wait(empty.index(stage), phase)", "two rows merged",
        "nobody can go on",
    ),
    "dq: one arrival lets go": (
        "dq", "barriers(STAGES, 2)", "barriers(STAGES, 1)", "two rows merged",
        "overwrites|arrivals",
    ),
    "dq: tiles let go before dS k": (
        "dq", "dq = warpgroup_mma_wait(0, deps=[total])\n        mbarrier.arrive(ring[4].index(step % STAGES), count=1)",
        "mbarrier.arrive(ring[4].index(step % STAGES), count=1)\n        dq = warpgroup_mma_wait(0, deps=[total])", "not causal, full only",
        "overwrites",
    ),
    "dq: a wait that lets dP slip": (
        "dq", "dp = warpgroup_mma_wait(1, deps=[dp])", "dp = warpgroup_mma_wait(2, deps=[dp])", "two rows merged",
        "before the wait that completes it",
    ),
    "dq: a wait that lets dS k slip": (
        "dq", "dq = warpgroup_mma_wait(0, deps=[total])\n        ", "dq = warpgroup_mma_wait(1, deps=[total])\n        ", "two rows merged",
        "before the wait that completes it",
    ),
    "dq: tiles never let go": (
        "dq", "dq = warpgroup_mma_wait(0, deps=[total])\n        mbarrier.arrive(ring[4].index(step % STAGES), count=1)",
        "dq = warpgroup_mma_wait(0, deps=[total])", "not causal, full only", "nobody can go on",
    ),
    "dq: absent tiles let go unseen": (
        "dq", "            mbarrier.wait(ring[2].index(stage), phase)\n            mbarrier.wait(ring[3].index(stage), phase)\n", "",
        "rows that list different blocks", "overwrites|arrivals|nobody can go on",
    ),
    "dq: absent tiles kept": (
        "dq", "            mbarrier.arrive(ring[4].index(stage), count=1)\n", "", "two rows merged", "nobody can go on",
    ),
    "dq: rows not waited for": ("dq", "    mbarrier.wait(rows_ready, 0)\n", "", "two rows merged", "under way|without having waited"),
    "dq: the codes of the other row": ("dq", "codes_ptr + place // RB", "codes_ptr", "two rows merged", "dq: error"),
    "dq: the mask of the other half": ("dq", "(place % RB + lane - below)", "(lane - below)", "blocks of 128", "dq: error"),
    "dq: the other head": ("dq", "lse_ptr + head * lse_head", "lse_ptr", "two heads stacked", "dq: error"),
    "dq: no mask": ("dq", "allowed, CAPPED, True", "allowed, CAPPED, False", "two rows merged", "dq: error"),
    "dq: wrong sign": ("dq", "p * (dp - delta[:, None])", "p * (dp + delta[:, None])", "two rows merged", "dq: error"),
    "dq: the same keys again": ("dq", "key = following", "key = key", "two rows merged", "dq: error"),
    "dkv: wrong first phase": (
        "dkv", "mbarrier.wait(empty.index(stage), phase ^ 1)", "mbarrier.wait(empty.index(stage), phase)", "two rows merged",
        "nobody can go on",
    ),
    "dkv: one arrival lets go of what both read": (
        "dkv", "STAGES, KEYS // ROWS, BLOCK_M", "STAGES, 1, BLOCK_M", "blocks of 128", "overwrites|arrivals",
    ),
    "dkv: two arrivals where one consumer reads": (
        "dkv", "STAGES, KEYS // ROWS, BLOCK_M", "STAGES, 2, BLOCK_M", "not causal, full only", "nobody can go on",
    ),
    "dkv: a wait that lets dP slip": (
        "dkv", "dpt = warpgroup_mma_wait(2, deps=[dpt])", "dpt = warpgroup_mma_wait(3, deps=[dpt])", "not causal, full only",
        "before the wait that completes it",
    ),
    "dkv: a wait that lets dk slip": (
        "dkv", "st, dv, dk = warpgroup_mma_wait(0,", "st, dv, dk = warpgroup_mma_wait(1,", "not causal, full only",
        "before the wait that completes it",
    ),
    "dkv: let go before dk": (
        "dkv", "st, dv, dk = warpgroup_mma_wait(0, deps=[following, dv_sum, dk_sum])\n        mbarrier.arrive(empty.index(stage), count=1)",
        "mbarrier.arrive(empty.index(stage), count=1)\n        st, dv, dk = warpgroup_mma_wait(0, deps=[following, dv_sum, dk_sum])",
        "not causal, full only", "overwrites",
    ),
    "dkv: never let go": (
        "dkv", "deps=[following, dv_sum, dk_sum])\n        mbarrier.arrive(empty.index(stage), count=1)",
        "deps=[following, dv_sum, dk_sum])",
        "not causal, full only", "nobody can go on",
    ),
    "dkv: next tile not waited for": (
        "dkv", "        mbarrier.wait(ready.index(after % STAGES), after // STAGES & 1)\n", "", "not causal, full only",
        "under way|without having waited|nothing was written",
    ),
    "dkv: sums not waited for": (
        "dkv", "        mbarrier.wait(given, 0)\n", "", "two rows merged", "without having waited|nothing was written",
    ),
    "dkv: sums never given": ("dkv", "        mbarrier.arrive(given, count=1)\n", "", "two rows merged", "nobody can go on"),
    "dkv: the other consumer's dv forgotten": ("dkv", "dv + dv_left.load(dv_layout)", "dv", "two rows merged", "dv: error"),
    "dkv: both take the same turns": ("dkv", "which * (STRIDE - 1)", "0", "two rows merged", "d[kv]: error|arrivals|nobody|overwrites"),
    "dkv: the other half's keys": ("dkv", "k_tiles.index(half)", "k_tiles.index(0)", "blocks of 128", "dk: error|dv: error"),
    "dkv: the mask of the other half": ("dkv", "(place + half * ROWS)", "place", "blocks of 128", "dk: error|dv: error"),
    "dkv: delta for lse": ("dkv", "by_query(ring, stage, 0, across)", "by_query(ring, stage, 1, across)", "two rows merged", "dk: "),
    "dkv: wrong sign": ("dkv", "dpt - by_query", "dpt + by_query", "two rows merged", "dk: error"),
    "dkv: the first head for all": ("dkv", "(member * q_head)", "(member * 0 * q_head)", "two heads stacked", "dk: error"),
    "dkv: the numbers of the first head": ("dkv", "member * places + place", "place", "two heads stacked", "dk: "),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, on_cpu, monkeypatch, tmp_path):
    kernel, text, planted, name, words = FAULTS[fault]
    module = importlib.import_module(f"s2attn.kernels.hopper.{kernel}")
    source = Path(module.__file__).read_text()
    assert text in source, "the kernel has changed, and the fault with it"
    path = tmp_path / f"{kernel}.py"
    path.write_text(source.replace(text, planted))
    spec = importlib.util.spec_from_file_location(f"planted_{kernel}", path)
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    monkeypatch.setitem(sys.modules, module.__name__, changed)
    p = problem(name)
    of_dq, of_dkv = forms(p)
    seed = sum(map(ord, fault))
    on_cpu(seed)
    with pytest.raises(AssertionError, match=words):
        for more in range(3):
            on_cpu(seed + more)
            check(p, replace(of_dq, stages=2), replace(of_dkv, stages=4 if of_dkv.line_tokens == 64 else 2))


def test_an_odd_number_of_stages_in_turns_is_refused(on_cpu):
    on_cpu(0)
    p = problem("two rows merged")
    of_dq, of_dkv = forms(p)
    with pytest.raises(AssertionError, match="each stage belongs to one consumer"):
        check(p, of_dq, replace(of_dkv, stages=3))


def test_words_of_masks():
    tiles = torch.rand(3, 64, 64) < 0.5
    words = hopper_backward.mask_words(tiles)
    assert words.shape == (3, 64, 2) and words.dtype == torch.int32
    back = (words[..., None] >> torch.arange(32)) & 1
    assert torch.equal(back.flatten(-2).bool(), tiles)
    assert hopper_backward.mask_words(tiles[:0]).shape == (0, 64, 2)
