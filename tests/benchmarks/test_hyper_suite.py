"""The suite `hyper`: its cases, what it checks before it times, its stages, and a tiny run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import estimating
from benchmarks.compared import compare_text
from benchmarks.estimating import Estimating, HyperCase, Stopwatch, hyper_suite, run_hyper_case
from benchmarks.record_tables import record_text
from benchmarks.report import report_page, targets_table
from benchmarks.runner import run_suite
from s2attn.ops import attention
from s2attn.selectors import hyper, hyper_attention
from s2attn.selectors.stages import HYPER_STAGES, heard_by, stage
from s2attn.tuning.clock import Meter
from s2attn.tuning.rows import Effort

FAST = Effort(rounds=1, min_rounds=1, budget_s=0.1)
TINY = hyper_suite(size="tiny")


def test_cases_are_those_that_were_promised() -> None:
    cases, small = hyper_suite(), hyper_suite(size="small")
    assert len({case.name for case in cases}) == len(cases) == 12 and {case.seqlen for case in small} == {32768}
    assert {case.seqlen for case in cases} == {32768, 65536, 131072}
    for some in (cases, small, TINY):
        assert {(case.causal, case.backward) for case in some} == {(a, b) for a in (True, False) for b in (True, False)}
        assert all(json.loads(json.dumps(case.facts())) == case.facts() for case in some)
    for wrong, message in ({"seqlen": 384}, "seqlen must be a power of two"), ({"seqlen": 128}, "seqlen must be at least 8 blocks of 32"):
        with pytest.raises(ValueError, match=message):
            replace(TINY[0], **wrong)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [{}, {"samples": 300}, {"min_seqlen": 1024}, {"min_seqlen": 0}], ids=str)
def test_pairs_are_those_that_attention_is_asked_for(causal: bool, shape: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    case, counted = replace(TINY[0], causal=causal, backward=False, **shape), list[int]()

    def counting(q, k, v, layout, **settings):
        if isinstance(layout, hyper.Dense):
            counted.append(q.shape[2] * (q.shape[1] * (q.shape[1] + 1) // 2 if settings["causal"] else q.shape[1] * k.shape[1]))
        else:
            counted.append(q.shape[1] // layout.heads * int(layout.pairs.sum()))
        return attention(q, k, v, layout, **settings)

    monkeypatch.setattr(hyper, "attention", counting)
    run = Estimating(case, Meter(), 0, None)
    run.whole(run.tokens)
    assert sum(counted) == case.pairs


def test_the_tiny_suite_runs_on_a_cpu_and_can_be_read() -> None:
    record = run_suite("hyper", TINY, effort=FAST)
    assert all(row["status"] == "ok" for row in record["rows"]), record["rows"]
    for ours, dense in zip(record["rows"][::2], record["rows"][1::2], strict=True):
        assert (ours["peer"], dense["peer"], dense["density"]) == ("s2attn", "sdpa", 1.0) and ours["density"] < 0.5
        assert 0 < ours["from_dense"] < 0.7 and dense["from_dense"] < 1e-5 and ours["error"] < ours["error_bound"] < 1e-3
        assert all(ours[f"{name}_s"] > 0 for name in HYPER_STAGES if name != "exact" or ours["causal"])
        assert ours["other_s"] > 0 and ("backward_s" in ours) == ours["backward"]
    assert "from dense" in record_text(record) and "tiny 512 causal fwd+bwd" in compare_text({"tiny": record})
    assert "### Attention estimated from buckets and samples" in report_page({"tiny": record})
    assert "forward and backward, over dense | >= 1x | not measured" in targets_table({"tiny": record})
    longer = [{**row, "seqlen": 32768} for row in record["rows"]]
    assert "forward and backward, over dense | >= 1x | not measured" not in targets_table({"tiny": {**record, "rows": longer}})


@pytest.mark.parametrize("spoil", ["samples", "merge", "seed"])
def test_what_is_wrong_gets_no_number(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if spoil == "samples":  # 1 % too much weight, in 32 bits alone
        right = hyper._Run._sampled

        def heavier(self, q, *args):
            out, lse = right(self, q, *args)
            return out, lse + (0.01 if q.dtype == torch.float32 else 0.0)

        monkeypatch.setattr(hyper._Run, "_sampled", heavier)
    elif spoil == "merge":  # wrong everywhere alike, so that float64 alone knows
        monkeypatch.setattr(hyper, "_joined", lambda first, second: first)
    else:
        monkeypatch.setattr(estimating, "hyper_attention", lambda *args, **more: torch.zeros_like(args[0]) * args[0])
    ours = run_hyper_case(replace(TINY[1], backward=False), FAST)[0]
    words = {"samples": "wrong estimate", "merge": "wrong result", "seed": "wrong"}
    assert ours["status"] == "failed" and ours["why"].startswith(f"ArithmeticError: {words[spoil]}"), ours["why"]


def test_results_in_16_bits_pass_the_check() -> None:
    for case in TINY[:2]:
        error = Estimating(replace(case, dtype="bfloat16", head_dim=64), Meter(), 0, None).check()
        assert error.within and error.bound < 0.2


def test_an_estimate_that_is_worse_than_nothing_is_refused() -> None:
    run = Estimating(TINY[1], Meter(), 0, None)
    with pytest.raises(ArithmeticError, match="from dense attention, where zeros would be 1 from it"):
        run.distance(-run.tokens.q)


def test_stages_inside_of_one_another_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(estimating.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(lambda: None)
    with heard_by(watch), stage("outer"), stage("inner"):
        pass
    assert dict(watch.seconds) == {"outer": 5.0, "inner": 2.0}
    with stage("unheard"):
        pass
    assert "unheard" not in watch.seconds


def test_listening_changes_no_bit() -> None:
    q, k, v = (torch.randn(1, 512, heads, 16) for heads in (2, 1, 1))
    settings = {"block": 32, "samples": 16, "min_seqlen": 64}
    watch = Stopwatch(lambda: None)
    with heard_by(watch):
        heard = hyper_attention(q, k, v, **settings)
    assert torch.equal(heard, hyper_attention(q, k, v, **settings)) and set(watch.seconds) == set(HYPER_STAGES)


def test_a_case_names_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16; got 'int8'"):
        HyperCase("x", 4096, True, False, dtype="int8")
