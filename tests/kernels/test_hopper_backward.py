"""dq and dkv of the Hopper kernels, launched as on a GPU and run by `tests.support.gluon`, against the float64 oracle."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsource

import pytest
import torch

from s2attn import Dense, Local, Pattern, Random, Sink, Stride, Window, build_layout
from tests.support import assert_close, dense_mask, eager, oracle
from tests.support.problems import Problem, by_autograd, make_problem, random_problem

# pattern, T, S, H, G, D, DV, block, causal
CASES: dict[str, tuple[Pattern, int, int, int, int, int, int, int, bool]] = {
    "two heads stacked": (Local(2) | Stride(3), 300, 300, 4, 2, 64, 64, 64, True),
    "two rows paired": (Local(2) | Stride(3), 330, 330, 1, 1, 64, 64, 64, True),
    "rows that list different blocks": (Local(1) | Stride(3), 128, 832, 1, 1, 64, 64, 64, True),
    "blocks of 128": (Window(150) | Sink(5), 280, 280, 2, 1, 64, 128, 128, True),
    "blocks of 256": (Window(90), 270, 270, 1, 1, 64, 64, 256, True),
    "lists per query head": (Local(1) | Random(1, heads="query"), 200, 260, 2, 1, 64, 64, 64, True),
    "rows that see nothing": (Stride(4, offset=1), 200, 330, 4, 1, 64, 64, 64, True),
    "more queries than keys": (Dense(), 150, 70, 2, 1, 128, 128, 64, True),
    "not causal, full only": (Dense(), 128, 192, 2, 1, 128, 64, 64, False),
    "not causal": (Window(30) | Random(1), 130, 190, 2, 2, 64, 64, 64, False),
}


Left = tuple[torch.Tensor, torch.Tensor]


def after_forward(p: Problem) -> Left:
    """out and lse of an exact forward pass, as the dtypes hold them."""
    out, lse = oracle(p.q, p.k, p.v, p.mask, p.scoring.scale, softcap=p.softcap)
    return out.to(p.q.dtype), lse.float()


@pytest.fixture
def launch() -> Callable[..., dict[str, torch.Tensor]]:
    """dq, dk and dv by the Hopper kernels, from what a forward pass has left; ``of_dq`` and ``of_dkv`` change their forms."""
    pytest.importorskip("triton", reason="triton is not installed")
    from s2attn.backends.triton.hopper import HopperWay
    from s2attn.backends.triton.hopper_backward import HopperColumns
    from tests.support.gluon.launches import hopper_on_cpu

    def run(p: Problem, seed: int = 0, *, left: Left | None = None, plain: str = "", **options) -> dict[str, torch.Tensor]:
        with hopper_on_cpu(seed=seed, **options) as backend:
            made = backend.backward(p.dout, p.dlse, p.q, p.k, p.v, *(left or after_forward(p)), p.layout, p.scoring)
        kinds = {way.op: type(way.special) for way in backend.ways(p.layout)}
        assert kinds == {"dq": HopperWay, "dkv": type(None) if plain else HopperColumns}
        return dict(zip(("dq", "dk", "dv"), made, strict=True))

    return run


def check(p: Problem, got: dict[str, torch.Tensor]) -> None:
    """Gradients err at most twice what eager code in this dtype errs against float64."""
    exact, plain = by_autograd(oracle, p.to(torch.float64)), by_autograd(eager, p)
    for name, value in got.items():
        right = getattr(exact, name)
        assert value.dtype == p.q.dtype and value.shape == right.shape
        assert_close(name, value, getattr(plain, name), right, terms=4 * max(1.0, right.abs().max().item()))


def problem(name: str, dtype: torch.dtype = torch.float16, **more) -> Problem:
    pattern, n, m, heads, kv_heads, dim, dim_v, block, causal = CASES[name]
    torch.manual_seed(0)
    layout = build_layout(pattern, heads, kv_heads, n, m, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, m, causal=causal)
    return make_problem(layout, mask, heads=heads, kv_heads=kv_heads, width=dim, v_width=dim_v, **more).to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name, launch, poisoned_empty):
    p = problem(name, batch=2)
    check(p, launch(p, len(name), plain="dkv" if "per query head" in name else ""))


@pytest.mark.parametrize("name", ["two heads stacked", "two rows paired", "blocks of 128"])
def test_soft_cap(name, launch, poisoned_empty):
    p = problem(name, torch.bfloat16, softcap=1.5)
    check(p, launch(p))


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts_rings_and_orders(seed, launch, poisoned_empty):
    torch.manual_seed(seed)
    turn = random.Random(seed)
    block = (64, 128)[seed % 2]
    kv_heads, group = turn.choice([1, 2]), turn.choice([1, 2, 4])
    heads, layout_heads = kv_heads * group, turn.choice([1, kv_heads])
    n, m = (turn.randrange(block // 2, 3 * block) for _ in range(2))
    shape = {"width": 64, "v_width": turn.choice([64, 64, 128]), "batch": turn.choice([1, 2])}
    p = random_problem(heads, kv_heads, layout_heads, n, m, block, causal=turn.random() < 0.5, **shape).to(torch.float16)
    of_dq = {"ring": turn.choice([2, 3, 5]), "line_ring": turn.choice([1, 2])}
    keys = 64 if block == 64 else turn.choice([64, 128])
    of_dkv = {"keys": keys, "listed_tokens": turn.choice([32, 64]), "ring": turn.choice([4, 6] if keys == 64 else [2, 3, 6])}
    check(p, launch(p, seed, programs=1 + seed % 4, of_dq=of_dq, of_dkv=of_dkv | {"line_ring": turn.choice([1, 2])}))


@pytest.mark.parametrize("name", ["two heads stacked", "two rows paired", "blocks of 128"])
def test_long_columns_are_cut(name, launch, poisoned_empty, monkeypatch):
    from s2attn.backends.triton import walk

    monkeypatch.setattr(walk, "LEAST_TOKENS", 64)
    monkeypatch.setattr(walk, "piece_limits", lambda counts, seq, copies, least: torch.full((len(seq),), least).numpy())
    p = problem(name)
    assert walk.walk_columns(p.layout, 1, 1, p.q.shape[2], p.k.shape[2]).slots > 0
    check(p, launch(p, 2, programs=3))


def packed_problem(heads: int) -> tuple[Problem, int]:
    """Sequences of several lengths, none among them; and where the first one ends."""
    pattern, lengths = Local(2) | Stride(2), [0, 100, 0, 75, 64, 190]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    layout = build_layout(pattern, heads, 1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    mask = torch.zeros(heads, total, total, dtype=torch.bool)
    for lo, n in zip(cu.tolist(), lengths, strict=False):
        mask[:, lo : lo + n, lo : lo + n] = dense_mask(pattern, heads, 1, n, n) if n else False
    return make_problem(layout, mask, heads=heads, kv_heads=1, width=64).to(torch.float16), 100


def check_packed(launch, heads: int, seed: int, **forms) -> None:
    """Right numbers; and even numbers that are none, which a weight of 0 would not hide, stay in their own sequence."""
    p, end = packed_problem(heads)
    left = after_forward(p)
    once = launch(p, seed, left=left, **forms)
    check(p, once)
    spoilt = replace(p, **{name: getattr(p, name).clone() for name in ("q", "k", "v", "dout")})
    for x in (spoilt.q, spoilt.k, spoilt.v, spoilt.dout):
        x[:, end:] = float("nan")
    left[0][:, end:] = left[1][..., end:] = float("nan")
    for name, value in launch(spoilt, seed, left=left, **forms).items():
        assert torch.equal(value[:, :end], once[name][:, :end]), name


@pytest.mark.parametrize("heads", [1, 2])
def test_a_packed_sequence_reads_nothing_of_the_next(heads, launch, poisoned_empty):
    check_packed(launch, heads, heads)


def test_any_strides(launch, poisoned_empty):
    p = problem("two heads stacked")
    turned = {name: getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "v")}
    wide = torch.zeros(*p.k.shape[:-1], 72, dtype=p.k.dtype)
    wide[..., :64] = p.k
    expected = launch(p)
    for name, value in launch(replace(p, **turned, k=wide[..., :64]), 1).items():
        assert torch.equal(value, expected[name]), name


def test_a_gradient_that_is_one_number_for_all(launch):
    p = problem("not causal, full only")
    check(replace(p, dout=(ones := torch.ones(1, 1, 1, 1).half().expand_as(p.dout))), launch(replace(p, dout=ones)))


def test_the_same_bits_in_any_order(launch):
    p = problem("two rows paired")
    results = [launch(p, seed, programs=1 + seed) for seed in (4, 2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# kernel, what stands there, what is planted, the problem, and the error's words; a wrong number is the oracle's to find
FAULTS: dict[str, tuple[str, str, str, str, str]] = {
    "dq: wrong first phase": ("dq", "turn_phase = 0, 1, 0, 1", "turn_phase = 0, 0, 0, 1", "two rows paired", "nobody can go on"),
    "dq: one arrival lets go": ("dq", "barriers(RING, 2)", "barriers(RING, 1)", "two rows paired", "overwrites|arrivals"),
    "dq: let go before dS k": (
        "dq", "s, dq = warpgroup_mma_wait(0, deps=[following, folded])\n        mbarrier.arrive(empty.index(stage), count=1)",
        "mbarrier.arrive(empty.index(stage), count=1)\n        s, dq = warpgroup_mma_wait(0, deps=[following, folded])",
        "not causal, full only", "overwrites",
    ),
    "dq: the last tile let go before dS k": (
        "dq", "    dq = warpgroup_mma_wait(0, deps=[fold_scores(dq, ds, keys[0], stage, OPERAND)])\n"
        "    mbarrier.arrive(keys[4].index(stage), count=1)",
        "    mbarrier.arrive(keys[4].index(stage), count=1)\n"
        "    dq = warpgroup_mma_wait(0, deps=[fold_scores(dq, ds, keys[0], stage, OPERAND)])", "two rows paired",
        "overwrites|without having",
    ),
    "dq: a wait that lets dP slip": (
        "dq", "dp = warpgroup_mma_wait(1, deps=[dp])", "dp = warpgroup_mma_wait(2, deps=[dp])", "two rows paired",
        "before the wait that completes it",
    ),
    "dq: a wait that lets dS k slip": (
        "dq", "warpgroup_mma_wait(0, deps=[following, folded])", "warpgroup_mma_wait(1, deps=[following, folded])", "two rows paired",
        "before the wait that completes it",
    ),
    "dq: tiles never let go": (
        "dq", "deps=[following, folded])\n        mbarrier.arrive(empty.index(stage), count=1)", "deps=[following, folded])",
        "not causal, full only", "nobody can go on",
    ),
    "dq: tiles let go at the next stage": (
        "dq", "        mbarrier.arrive(empty.index(stage), count=1)\n        stage = next_stage",
        "        mbarrier.arrive(empty.index(next_stage), count=1)\n        stage = next_stage", "not causal, full only",
        "overwrites|arrivals|nobody|without having",
    ),
    "dq: absent tiles let go unseen": (
        "dq", "            mbarrier.wait(k_ready.index(stage), phase)\n            mbarrier.wait(v_ready.index(stage), phase)\n", "",
        "rows that list different blocks", "overwrites|arrivals|nobody can go on",
    ),
    "dq: absent tiles kept": (
        "dq", "            mbarrier.arrive(empty.index(stage), count=1)\n        else:", "        else:", "two rows paired",
        "nobody can go on",
    ),
    "dq: rows not waited for": (
        "dq", "        mbarrier.wait(rows_ready.index(own), turn_phase)\n", "", "two rows paired",
        "under way|having waited|nothing was written",
    ),
    "dq: rows never let go": (
        "dq", "        mbarrier.arrive(rows_empty.index(own), count=1)\n", "", "two heads stacked", "nobody can go on",
    ),
    "dq: rows let go before they were used": (
        "dq", "        mbarrier.wait(rows_ready.index(own), turn_phase)\n",
        "        mbarrier.wait(rows_ready.index(own), turn_phase)\n        mbarrier.arrive(rows_empty.index(own), count=1)\n",
        "two heads stacked", "overwrites|arrivals|without having",
    ),
    "dq: the rows of another item": ("dq", "own = turn * 2 + which", "own = which", "two heads stacked", "."),
    "dq: the codes of the other row": ("dq", " + which * (CODES - 1)", "", "two rows paired", "dq: error"),
    "dq: the mask of the other half": ("dq", "below * (2 - CODES)", "below * 0", "blocks of 128", "dq: error"),
    "dq: the other head": ("dq", "+ head * lse_head + row", "+ row", "two heads stacked", "dq: "),
    "dq: no mask": (
        "dq", "allowed = allowed_keys(bits_ptr, code, code * RB + place, RB // 64, words, ROWS, OF_PAIRS)", "allowed = True",
        "two rows paired", "dq: error",
    ),
    "dq: wrong sign": ("dq", "p * (dp - delta[:, None])", "p * (dp + delta[:, None])", "two rows paired", "dq: error"),
    "dq: the same keys again": ("dq", "key = following", "key = key", "two rows paired", "dq: error"),
    "dq: keys of the next sequence": ("dq", "key_end = gl.load(at + 7).to(gl.int32)", "key_end = key_tokens", "packed", "."),
    "dq: a descriptor made too early": ("dq", "            landed(k_ready, stage, phase, RING)\n", "", "packed", "makes a descriptor anew"),
    "dkv: wrong first phase": ("dkv", "turn_phase = 0, 1, 0, 1", "turn_phase = 0, 0, 0, 1", "two rows paired", "nobody can go on"),
    "dkv: one arrival lets go of what both read": (
        "dkv", "barriers(RING, KEYS // ROWS)", "barriers(RING, 1)", "blocks of 128", "overwrites|arrivals",
    ),
    "dkv: two arrivals where one consumer reads": (
        "dkv", "barriers(RING, KEYS // ROWS)", "barriers(RING, 2)", "not causal, full only", "nobody can go on",
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
        "deps=[following, dv_sum, dk_sum])", "not causal, full only", "nobody can go on",
    ),
    "dkv: next tile not waited for": (
        "dkv", "        mbarrier.wait(ready.index(after), phase)\n", "", "not causal, full only",
        "under way|having waited|nothing was written",
    ),
    "dkv: keys let go before they were used": (
        "dkv", "        mbarrier.wait(keys_ready.index(turn), turn_phase)\n",
        "        mbarrier.wait(keys_ready.index(turn), turn_phase)\n        mbarrier.arrive(keys_empty.index(turn), count=1)\n",
        "two heads stacked", "overwrites|arrivals|without having",
    ),
    "dkv: one consumer lets go of the keys": (
        "dkv", "barriers(K_RING, 2)", "barriers(K_RING, 1)", "two heads stacked", "overwrites|arrivals|without having",
    ),
    "dkv: sums not waited for": (
        "dkv", "        mbarrier.wait(given, turn & 1)\n", "", "two rows paired", "without having waited|nothing was written",
    ),
    "dkv: sums never given": ("dkv", "        mbarrier.arrive(given, count=1)\n", "", "two rows paired", "nobody can go on"),
    "dkv: sums overwritten": (
        "dkv", "        mbarrier.wait(taken, turn & 1 ^ 1)\n", "", "two heads stacked", "without having waited|arrivals",
    ),
    "dkv: the other consumer's dv forgotten": ("dkv", "dv + dv_left.load(OF_DV)", "dv", "two rows paired", "dv: error"),
    "dkv: both take the same turns": (
        "dkv", "FIRST: gl.constexpr = which * (STRIDE - 1)", "FIRST: gl.constexpr = 0", "two rows paired",
        "error|arrivals|nobody|overwrites|having waited",
    ),
    "dkv: turns counted from every item": ("dkv", "begun += walk[0] + walk[1]", "begun += 0", "two rows paired", "."),
    "dkv: the other half's keys": ("dkv", "turn * (KEYS // ROWS) + HALF", "turn * (KEYS // ROWS)", "blocks of 128", "dk: error|dv: error"),
    "dkv: the mask of the other half": (
        "dkv", "tile * KEYS + HALF * ROWS, stage", "tile * KEYS, stage", "blocks of 128", "dk: error|dv: error",
    ),
    "dkv: delta for lse": (
        "dkv", "by_query(number_ring, stage, 0, OF_PAIRS)", "by_query(number_ring, stage, 1, OF_PAIRS)", "two rows paired", ".",
    ),
    "dkv: wrong sign": ("dkv", "dpt - by_query", "dpt + by_query", "two rows paired", "dk: error"),
    "dkv: the first head for all": (
        "dkv", "copy_in(q_rows, [batch, head + member,", "copy_in(q_rows, [batch, head,", "two heads stacked", "dk: error",
    ),
    "dkv: the numbers of the first head": (
        "dkv", "first_place + member * places + place", "first_place + place", "two heads stacked", "dk: ",
    ),
    "dkv: queries of the next sequence": ("dkv", "end = gl.load(at + 10).to(gl.int32)", "end = tokens", "packed", "."),
    "dkv: a descriptor made too early": ("dkv", "            landed(ready, stage, phase, RING)\n", "", "packed", "makes a descriptor anew"),
    "dkv: a slot for the result": ("dkv", "if slot >= 0:", "if slot >= -1:", "two rows paired", "."),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, launch, monkeypatch, tmp_path):
    room, right, wrong, where, words = FAULTS[name]
    module = import_module(f"s2attn.kernels.hopper.{room}")
    text = getsource(module)
    assert right in text, "the kernel has changed, and the fault with it"
    path = tmp_path / f"planted_{room}.py"
    path.write_text(text.replace(right, wrong))
    spec = spec_from_file_location(path.stem, path)
    changed = module_from_spec(spec)
    spec.loader.exec_module(changed)
    monkeypatch.setitem(sys.modules, module.__name__, changed)
    forms = {"of_dq": {"ring": 2}, "of_dkv": {"ring": 2 if where == "blocks of 128" else 4}}
    with pytest.raises(AssertionError, match=words):
        for seed in range(3):
            if where == "packed":
                check_packed(launch, 2, seed, **forms)
            else:
                p = problem(where)
                check(p, launch(p, seed, **forms))


def test_an_odd_number_of_stages_in_turns_is_refused(launch):
    with pytest.raises(AssertionError, match="each stage belongs to one consumer"):
        launch(problem("two rows paired"), of_dkv={"ring": 3})
