"""The benchmark: correctness before numbers, a reason where there is none, and records of a known shape."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.flex import Flex, mask_function
from benchmarks.peer import Peer, Prepared
from benchmarks.peers import S2Attn, Sdpa
from benchmarks.runner import Effort, run_case, run_layout_case, run_suite, write_record
from s2attn import Dense, Local, LongNet, Pattern, Power, Sink, Stride, Window
from s2attn.patterns import Head, Shape
from s2attn.tuning.cases import AttentionCase, LayoutCase, cpu_suite, length_cases, quick_suite
from s2attn.tuning.clock import Timing, peak_bytes, time_in_turn
from s2attn.tuning.compare import Inputs, Oracle, sample_rows
from s2attn.tuning.host import host_facts
from s2attn.tuning.rows import Skip

PATTERN = Local(2, block=16) | Stride(4, block=16)
FAST = Effort(rounds=2, min_rounds=1, budget_s=0.2)


def case_of(op: str = "forward", pattern: Pattern = PATTERN, **shape: int) -> AttentionCase:
    return AttentionCase("case", op, pattern, **{"seqlen": 150, "heads": 4, "kv_heads": 2, "head_dim": 16, "block": 16, **shape})


class Wrong(Peer):
    """Dense attention that claims to be something else, or breaks."""

    name = "wrong"

    def __init__(self, breaks: bool = False):
        self.breaks = breaks

    def prepare(self, case: AttentionCase) -> Prepared:
        if self.breaks:
            raise RuntimeError("no compiler\nwith details on a second line")
        good = Sdpa().prepare(case)
        return Prepared(good.attend, True, 0.0, 0, case.pattern, 1)


@pytest.mark.parametrize("op", ["forward", "forward_backward"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_s2attn_and_sdpa_pass_the_check(op: str, kv_heads: int) -> None:
    ours, dense = run_case(case_of(op, kv_heads=kv_heads), [S2Attn(), Sdpa()], FAST)
    for row in (ours, dense):
        assert row["status"] == "ok" and row["error"] <= row["error_bound"] < 1e-4
        assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
    assert 0 < ours["density"] < 1 and dense["density"] == 1.0
    assert ours["efficiency"] == pytest.approx(dense["median_s"] / ours["median_s"] * ours["density"])
    assert dense["speedup"]["s2attn"] == pytest.approx(1 / ours["speedup"]["sdpa"])


@pytest.mark.parametrize("op", ["forward", "forward_backward"])
def test_a_wrong_result_gets_no_number(op: str) -> None:
    ours, wrong = run_case(case_of(op), [S2Attn(), Wrong()], FAST)
    assert ours["status"] == "ok"
    assert wrong["status"] == "failed" and "median_s" not in wrong
    assert wrong["why"].startswith("ArithmeticError: wrong result: error ")


def test_a_peer_that_breaks_says_why_and_spares_the_others() -> None:
    broken, dense = run_case(case_of(), [Wrong(breaks=True), Sdpa()], FAST)
    assert (broken["status"], broken["why"]) == ("failed", "RuntimeError: no compiler")
    assert dense["status"] == "ok"


def test_flex_says_why_it_has_no_backward() -> None:
    (row,) = run_case(case_of("forward_backward"), [Flex()], FAST)
    assert (row["status"], row["why"]) == ("skipped", "FlexAttention has no backward on CPUs")


@pytest.mark.parametrize(
    "pattern",
    [
        PATTERN,
        Sink(5) | Window(33),
        Dense(),
        Power(block=16) | Sink(3),
        Stride(3, offset=1, shift=1, block=32),
        Stride(4, block=16, heads="query"),
        Window(60) & Stride(2, block=16),
    ],
    ids=repr,
)
def test_flex_masks_mean_what_the_patterns_mean(pattern: Pattern) -> None:
    case = case_of(pattern=pattern)
    mask = mask_function(pattern, case)
    positions = torch.arange(case.seqlen)
    for h in range(case.heads):
        theirs = mask(0, torch.tensor(h), positions[:, None], positions[None])
        ours = pattern.allowed(positions[:, None].numpy(), positions[None].numpy(), Shape(case.seqlen), Head(h, case.heads, case.kv_heads))
        assert torch.equal(theirs.expand(case.seqlen, case.seqlen), torch.from_numpy(ours))


def test_a_pattern_without_a_flex_mask_is_skipped() -> None:
    with pytest.raises(Skip, match="no FlexAttention mask is written for LongNet"):
        mask_function(LongNet(), case_of())


def test_the_oracle_is_plain_attention() -> None:
    case = case_of()
    inputs = Inputs.of(case)
    oracle = Oracle(case, inputs, torch.arange(case.seqlen))
    group = case.heads // case.kv_heads
    q, k, v = (x.double().transpose(1, 2) for x in (inputs.q, inputs.k.repeat_interleave(group, 2), inputs.v.repeat_interleave(group, 2)))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    assert oracle.check(Dense(), [dense]).error < 1e-12


def test_the_oracle_checks_every_gradient() -> None:
    case = case_of("forward_backward")
    inputs = Inputs.of(case)
    oracle = Oracle(case, inputs)
    prepared = S2Attn().prepare(case)
    q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = prepared.attend(q, k, v)
    results: list[Tensor] = [out.detach(), *torch.autograd.grad(out, (q, k, v), oracle.dout())]
    assert oracle.check(PATTERN, results).within
    for i in range(4):
        spoiled = [x.clone() for x in results]
        spoiled[i][0, int(oracle.rows[3])] += 0.01 * spoiled[i].abs().max()
        assert not oracle.check(PATTERN, spoiled).within
    results[0][0, int(oracle.rows[0]), 0, 0] = torch.nan
    assert not oracle.check(PATTERN, results).within


def test_sampled_rows_hold_both_ends() -> None:
    rows = sample_rows(1000).tolist()
    assert rows[0] == 0 and rows[-1] == 999 and rows == sorted(set(rows)) and len(rows) > 30
    assert sample_rows(3).tolist() == [0, 1, 2]


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    timings = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 3
    assert timings["a"].runs == 3
    slow = time_in_turn({"a": lambda: time.sleep(0.02)}, rounds=50, min_rounds=2, budget_s=0.01)["a"]
    assert slow.runs == 2 and slow.median_s >= 0.02


def test_percentiles_are_those_of_the_values() -> None:
    assert Timing.of([float(i) for i in range(11)]) == Timing(5.0, 2.0, 8.0, 11)


def test_peak_memory_sees_what_a_call_takes_and_gives_back() -> None:
    peak = peak_bytes(lambda: torch.ones(16 << 20).sum())
    assert peak is None or 60e6 < peak < 90e6


def test_a_layout_case_reports_seconds_and_bytes() -> None:
    row = run_layout_case(LayoutCase("layout", Window(64) | Stride(8), 4096, heads=4), rounds=1)
    assert row["status"] == "ok" and row["median_s"] > 0
    assert row["bytes"] == pytest.approx(row["bytes_per_entry"] * row["entries"])


def test_the_record_has_its_schema(tmp_path: Path) -> None:
    named: list[str] = []
    record = run_suite("quick", quick_suite([128]), peers=["s2attn", "sdpa"], effort=FAST, note=named.append)
    assert named == ["128 fwd", "128 fwd+bwd", "layout"]
    read = json.loads(write_record(record, tmp_path / "records" / "quick.json").read_text())
    assert read == json.loads(json.dumps(record))
    assert set(read) == {"schema", "suite", "host", "device", "seed", "complete", "seconds", "rows"}
    assert read["schema"] == 2 and read["complete"]
    assert {"processor", "cores", "threads", "torch", "s2attn", "commit", "made"} <= set(read["host"])
    needed = {"case", "op", "pattern", "dtype", "seqlen", "heads", "kv_heads", "head_dim", "batch", "block", "peer", "status"}
    timed = {
        "density",
        "metadata_s",
        "compile_s",
        "median_s",
        "p20_s",
        "p80_s",
        "runs",
        "error",
        "error_bound",
        "effective_gflops",
        "speedup",
    }
    for row in read["rows"][:4]:
        assert needed | timed <= set(row)
        assert row["status"] == "ok"
    assert read["rows"][4]["op"] == "layout"


def test_cases_after_the_time_limit_say_so() -> None:
    record = run_suite("quick", quick_suite([128]), peers=["s2attn", "sdpa"], effort=FAST, limit_s=-1.0)
    assert len(record["rows"]) == 5
    assert {(row["status"], row["why"]) for row in record["rows"]} == {("skipped", "the -1 seconds for all timings were over")}


def test_committed_records_can_be_read() -> None:
    import benchmarks

    for path in (Path(benchmarks.__file__).parent / "records").glob("*.json"):
        record = json.loads(path.read_text())
        assert record["schema"] in (1, 2) and record["rows"], path.name
        assert all(row["status"] == "ok" or row["why"] for row in record["rows"]), path.name


def test_suites_hold_what_they_promise() -> None:
    suite = cpu_suite([4096, 8192, 16384])
    assert {case.op for case in suite if isinstance(case, AttentionCase)} == {"forward", "forward_backward"}
    assert any(isinstance(case, AttentionCase) and case.heads != case.kv_heads for case in suite)
    assert [case.seqlen for case in suite if isinstance(case, LayoutCase)] == [1 << 20]
    assert [case.seqlen for case in length_cases([64, 128], backward=False)] == [64, 128]
    assert len({case.name for case in suite}) == len(suite)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "sideways"}, "op must be one of forward, forward_backward, backward; got 'sideways'"),
        ({"kv_heads": 3}, r"heads must be a multiple of kv_heads \(3\); got 4"),
        ({"seqlen": 0}, "seqlen must be an integer >= 1; got 0"),
        ({"block": 48}, "block must be one of 16, 32, 64, 128, 256; got 48"),
    ],
)
def test_cases_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case_of(**{"op": "forward", **change})


def test_flops_count_listed_pairs() -> None:
    assert case_of().flops(1000) == 4 * 16 * 1000
    assert case_of("forward_backward").flops(1000) == round(3.5 * 4 * 16 * 1000)


def test_host_facts_are_plain_values() -> None:
    assert json.loads(json.dumps(host_facts()))["threads"] == torch.get_num_threads()
