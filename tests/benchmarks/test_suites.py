"""The suites for graphics cards: their cases, and a tiny run of each of them on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.flex import choices, mask_from, mask_function
from benchmarks.original import block_table, load_original
from benchmarks.peer import case_layout, listed_pairs
from benchmarks.peers import CUDA_PEERS, Sdpa, make_peers
from benchmarks.runner import run_case, run_suite
from benchmarks.stack import Stack, StackCase
from benchmarks.stacks import DenseStack, Measuring, Ours, PagedStack, stack_peers, stack_suite
from benchmarks.suites import attention_suite
from s2attn import Dense, Local, PerHead, Power, Random, Sink, Stride, Window
from s2attn.layout import from_block_mask
from s2attn.ops import attention
from s2attn.patterns import Head, Recipe, Shape
from s2attn.tuning.cases import AttentionCase
from s2attn.tuning.clock import Meter
from s2attn.tuning.compare import Inputs, Oracle
from s2attn.tuning.rows import Effort, Skip, compared

FAST = Effort(rounds=1, min_rounds=1, budget_s=0.1)


def case_of(pattern=Local(2, 16) | Stride(4, block=16), op: str = "forward", **shape) -> AttentionCase:  # noqa: B008
    return AttentionCase("case", op, pattern, **{"seqlen": 150, "heads": 4, "kv_heads": 2, "head_dim": 16, "block": 16, **shape})


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_attention_cases_are_those_that_were_promised(op: str) -> None:
    cases = attention_suite(op)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.op for case in cases} == {op} and {case.dtype for case in cases} == {"bfloat16"}
    assert {(case.heads, case.kv_heads) for case in cases} >= {(32, 32), (32, 8), (16, 16), (64, 8)}
    assert {case.head_dim for case in cases} == {64, 128} and {case.block for case in cases} == {32, 64, 128}
    assert {case.seqlen for case in cases} >= {4096, 8192, 16384, 32768, 65536, 131072}
    assert any(case.all_peers for case in cases)


def test_the_milestone_and_the_headline_come_first() -> None:
    cases = attention_suite("forward")
    assert (cases[0].seqlen, cases[0].head_dim, cases[0].block) == (32768, 128, 64) and cases[0].all_peers
    assert [case.seqlen for case in cases[2:7]] == [131072] * 5
    assert {(case.heads, case.kv_heads) for case in cases[2:7]} == {(32, 32), (16, 16), (64, 8)}


def test_the_sweep_goes_from_dense_to_two_percent() -> None:
    """Densities of the cases at 32k, from layouts, without any attention."""
    shape = (32768, 32, 8, 128, 64)
    cases = [c for c in attention_suite("forward") if (c.seqlen, c.heads, c.kv_heads, c.head_dim, c.block) == shape]
    found = [float(case_layout(c, "cpu").pairs.double().mean()) / (c.seqlen * (c.seqlen + 1) // 2) for c in cases]
    assert max(found) == 1.0 and min(found) < 0.025
    assert all(a / b < 2.3 for a, b in zip(sorted(found, reverse=True), sorted(found, reverse=True)[1:], strict=False))


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_mixed_heads_and_their_halves_are_cases_with_equal_work(size: str) -> None:
    cases = {case.name: case for case in attention_suite("forward", size)}
    both = next(case for case in cases.values() if case.halves)
    dense, sparse = (cases[name] for name in both.halves)
    assert dense.heads == sparse.heads == both.heads // 2 and both.facts()["halves"] == [dense.name, sparse.name]
    pairs = [int(case_layout(case, "cpu").pairs.sum()) * case.heads // case.kv_heads for case in (both, dense, sparse)]
    assert pairs[0] == pytest.approx(pairs[1] + pairs[2], rel=0.02 if size == "full" else 0.1)


@pytest.mark.parametrize("op", ["train", "prefill"])
def test_stack_cases_say_what_they_are(op: str) -> None:
    cases = stack_suite(op)
    assert len({case.name for case in cases}) == len(cases) and {case.op for case in cases} == {op}
    for case in cases:
        dense = sum(case.recipe.pattern(layer) == Dense() for layer in range(case.model_layers))
        here = sum(case.recipe.pattern(layer) == Dense() for layer in range(case.layers))
        assert here / case.layers == dense / case.model_layers
        assert f"{case.layers} layers of a model of {case.model_layers}" in case.facts()["measured"]
        assert json.loads(json.dumps(case.facts())) == case.facts()


@pytest.mark.parametrize("suite", ["forward", "backward", "train", "prefill"])
def test_tiny_suites_run_on_a_cpu(suite: str) -> None:
    cases = attention_suite(suite, "tiny") if suite in ("forward", "backward") else stack_suite(suite, "tiny")
    record = run_suite(suite, cases, peers=["s2attn", "sdpa", "flash"], effort=FAST)
    assert record["complete"] and {row["case"] for row in record["rows"]} == {case.name for case in cases}
    for row in record["rows"]:
        if row["peer"] == "flash":
            assert (row["status"], row["why"]) == ("skipped", "needs a CUDA device")
        else:
            assert row["status"] == "ok", row
            assert row["error"] <= row["error_bound"] and row["median_s"] > 0
            assert 0 < row["density"] <= 1
    assert all("tokens_per_s" in row for row in record["rows"]) == (suite in ("train", "prefill"))


def test_every_peer_has_a_row_wherever_it_runs() -> None:
    rows = run_case(case_of(), make_peers([*(name for name in CUDA_PEERS if name != "flex"), "sdpa"]), FAST)
    found = {row["peer"]: (row["status"], row.get("why")) for row in rows}
    assert found == {
        "s2attn": ("ok", None),
        "sdpa": ("ok", None),
        "cudnn": ("skipped", "needs a CUDA device"),
        "flash": ("skipped", "needs a CUDA device"),
        "flex-tuned": ("skipped", "needs a CUDA device"),
        "s2-original": ("skipped", "no checkout given"),
    }


def test_slow_peers_wait_for_cases_that_want_all() -> None:
    class Slow(Sdpa):
        name, slow = "slow", True

    assert [row["status"] for case in (case_of(), case_of(all_peers=True)) for row in run_case(case, [Slow()], FAST)] == ["skipped", "ok"]


def test_a_peer_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from benchmarks.peers import Sdpa\nprepare = lambda case, device: Sdpa(device).prepare(case)\n")
    mine, absent = run_case(case_of(), make_peers(["mine", "absent"], paths={"mine": path, "absent": tmp_path / "no.py"}), FAST)
    assert (mine["peer"], mine["status"], mine["density"]) == ("mine", "ok", 1.0)
    assert (absent["status"], absent["why"]) == ("skipped", f"no file {tmp_path / 'no.py'}")
    with pytest.raises(ValueError, match=r"peers must be some of s2attn, .* or have a path; got 'nobody'"):
        make_peers(["nobody"])


def test_efficiency_is_told_against_the_fastest_dense_peer() -> None:
    rows = [
        {"peer": "a", "status": "ok", "dense": True, "pairs": 1, "density": 1.0, "median_s": 4.0},
        {"peer": "b", "status": "ok", "dense": True, "pairs": 1, "density": 1.0, "median_s": 2.0},
        {"peer": "s2attn", "status": "ok", "dense": False, "pairs": 1, "density": 0.25, "median_s": 0.8},
        {"peer": "late", "status": "skipped", "why": "no time"},
    ]
    a, b, ours, late = compared(rows)
    assert ours["speedup"] == {"a": 5.0, "b": 2.5} and ours["dense_peer"] == "b"
    assert ours["efficiency"] == pytest.approx(2.5 * 0.25)
    assert a["efficiency"] == 0.5 and "efficiency" not in b and "speedup" not in late


def test_a_backward_case_counts_its_own_work_only() -> None:
    assert case_of(op="backward").flops(1000) == 2.5 * case_of().flops(1000)
    (row,) = run_case(case_of(op="backward"), [Sdpa()], FAST)
    assert row["effective_gflops"] == pytest.approx(2.5 * 4 * 16 * row["pairs"] / row["median_s"] / 1e9, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_missing_block_is_seen_in_every_type(dtype: str) -> None:
    """One of many listed blocks left out, in late rows whose results are small: a bound relative to the largest value would hide it."""
    pattern, fewer = Window(4096) & Local(60, 16), Window(4096) & Local(59, 16)
    case = case_of(pattern, seqlen=2048, dtype=dtype)
    inputs = Inputs.of(case)
    oracle = Oracle(case, inputs, torch.arange(2000, 2048))
    right, wrong = (attention(inputs.q, inputs.k, inputs.v, one, block=16) for one in (pattern, fewer))
    assert oracle.check(pattern, [right]).within
    assert not oracle.check(pattern, [wrong]).within


@pytest.mark.parametrize(
    "pattern",
    [
        Random(2, block=16) | Local(1, 16),
        PerHead({0: Dense()}, default=Local(2, 16) | Stride(4, block=16)),
        PerHead({3: Sink(4)}, default=Window(20), heads="query"),
    ],
    ids=repr,
)
def test_flex_masks_by_table_mean_what_the_patterns_mean(pattern) -> None:
    case = case_of(pattern)
    mask, positions = mask_function(pattern, case), torch.arange(case.seqlen)
    for h in range(case.heads):
        theirs = mask(0, torch.tensor(h), positions[:, None], positions[None])
        ours = pattern.allowed(positions[:, None].numpy(), positions[None].numpy(), Shape(case.seqlen), Head(h, case.heads, case.kv_heads))
        assert torch.equal(theirs, torch.from_numpy(ours))


@pytest.mark.parametrize("block", [16, 64])
def test_flex_lists_made_from_ours_give_the_same_mask(block: int) -> None:
    """The block mask for graphics cards, looked at on the CPU: the pairs that it lists, and among them those of its token mask."""
    case = case_of()
    layout = case_layout(case, "cpu", block)
    made = mask_from(case, layout)
    assert (block, block) == made.BLOCK_SIZE and made.seq_lengths == (case.seqlen, case.seqlen)
    assert torch.equal(from_block_mask(made).to_dense(), layout.to_dense().repeat_interleave(2, dim=0))
    assert listed_pairs(case, layout)[0] == listed_pairs(case, case_layout(case, "cpu", 16))[0]
    assert listed_pairs(case, case_layout(case, "cpu", 64))[1] > listed_pairs(case, case_layout(case, "cpu", 16))[1]


def test_flex_choices_fit_their_blocks() -> None:
    for case in (case_of(op=op, block=block) for op in ("forward", "backward") for block in (32, 64, 128)):
        for block, options in choices(case):
            assert all(block % size == 0 for name, size in options.items() if "BLOCK" in name)


def test_the_original_gets_whole_blocks_only() -> None:
    table = block_table(case_of(seqlen=160), case_layout(case_of(seqlen=160), "cpu"))
    assert table.shape == (4, 10, 10) and table.dtype == torch.uint8
    assert torch.equal(table[0], table[1]) and not torch.equal(table[0], table[2])
    assert bool(table[0].diagonal().all()) and int(table[0].triu(1).sum()) == 0
    window = case_of(Window(20), seqlen=160)
    with pytest.raises(Skip, match="whole blocks and causality only"):
        block_table(window, case_layout(window, "cpu"))


@pytest.mark.parametrize("package", ["s2attn", "dkernel"])
def test_the_original_may_have_our_name(tmp_path: Path, package: str) -> None:
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('asks for an installed version')\n")
    (folder / "numbers_.py").write_text("ANSWER = 42\n")
    (folder / "interface.py").write_text(f"from {package}.numbers_ import ANSWER\n")
    before = sys.modules["s2attn"]
    assert load_original(tmp_path).ANSWER == 42
    assert sys.modules["s2attn"] is before and f"{package}.numbers_" not in sys.modules
    with pytest.raises(Skip, match="holds no package s2attn or dkernel"):
        load_original(folder)


def test_all_ways_to_attend_share_a_stack() -> None:
    """With a dense recipe, training gradients and prefill in chunks come out as torch's dense attention gives them."""
    shape = {"layers": 2, "model_layers": 2, "width": 32, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "block": 16, "chunk": 70}
    for op in ("train", "prefill"):
        case = StackCase("dense", op, Recipe(Dense()), 150, **shape, dtype="float32")
        run = Measuring(case, Meter(), 0, None)
        results = [run.call(run.peer(name))() for name in stack_peers(case, "cpu")]
        *ours, theirs = (result if isinstance(result, list) else [result] for result in results)
        assert len(ours) == (2 if op == "prefill" else 1)
        for mine in ours:
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_prefill_in_chunks_is_prefill_at_once() -> None:
    case = stack_suite("prefill", "tiny")[0]
    whole = StackCase(**{**vars(case), "chunk": case.seqlen})
    stack = Stack(case, "cpu")
    x, cache = torch.randn(1, case.seqlen, case.width), torch.empty(case.layers, 2, 1, case.seqlen, case.kv_heads, case.head_dim)
    chunked = [stack.prefill(x, peer.open(cache)) for peer in (Ours(case, "cpu", None), PagedStack(case, "cpu", None))]
    stack.case = whole
    once = stack.prefill(x, Ours(whole, "cpu", None).open(cache))
    for out in chunked:
        torch.testing.assert_close(out, once[:, -out.shape[1] :], rtol=1e-4, atol=1e-5)


def test_a_wrong_stack_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DenseStack.attend
    monkeypatch.setattr(DenseStack, "attend", lambda self, layer, q, k, v: 1.01 * right(self, layer, q, k, v))
    rows = {row["peer"]: row for row in run_suite("train", stack_suite("train", "tiny"), effort=FAST)["rows"]}
    assert rows["s2attn"]["status"] == "ok"
    assert rows["sdpa"]["status"] == "failed" and rows["sdpa"]["why"].startswith("ArithmeticError: wrong result")


def test_power_and_dense_are_in_every_attention_suite() -> None:
    for size in ("full", "tiny"):
        kinds = [repr(case.pattern) for case in attention_suite("backward", size)]
        assert any(repr(Dense()) == kind for kind in kinds) and any(Power.__name__ in kind for kind in kinds)
