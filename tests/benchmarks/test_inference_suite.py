"""The suite `inference`: its cases, its two ways to keep keys and values, the largest batch, and a tiny run on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks import inference
from benchmarks.compared import compare_text
from benchmarks.inference import InferenceCase, Serving, inference_suite
from benchmarks.record_tables import record_text
from benchmarks.report import report_page
from benchmarks.runner import run_suite
from benchmarks.stacks import OURS, SDPA, DenseStack
from s2attn import Dense
from s2attn.cache import CacheFull
from s2attn.patterns import Recipe
from s2attn.tuning.clock import Meter
from s2attn.tuning.journal import Journal
from s2attn.tuning.rows import Effort

FAST = Effort(rounds=1, min_rounds=1, budget_s=0.1)
TINY = inference_suite(size="tiny")[0]


def serving(case: InferenceCase) -> Serving:
    return Serving(case, Meter(), Journal(), 0, None)


def test_full_cases_are_those_that_were_promised() -> None:
    cases = inference_suite()
    first = cases[0]
    assert (first.layers, first.heads, first.head_dim, first.hidden, first.seqlen) == (32, 32, 128, 11008, 131072)
    assert first.layers == first.model_layers and {case.seqlen for case in cases} == {32768, 131072}
    for case in [*cases, TINY]:
        assert json.loads(json.dumps(case.facts())) == case.facts() and case.facts()["new_tokens"] == case.new_tokens
    with pytest.raises(ValueError, match="new_tokens must be an integer >= 1; got 0"):
        replace(TINY, new_tokens=0)


def test_both_ways_to_keep_keys_give_the_same_outputs_where_the_recipe_is_dense() -> None:
    case = replace(TINY, recipe=Recipe(Dense()))
    run, outs = serving(case), []
    for name in (OURS, SDPA):
        kept = run.open(name)
        last = run.stack.prefill(run.x[:, : case.seqlen], kept.step)
        outs.append(torch.cat([last, run.stack.advance(run.x[:, case.seqlen : case.seqlen + 1], case.seqlen, kept.step)], dim=1))
        assert kept.most_bytes() <= kept.pool_bytes()
    torch.testing.assert_close(*outs, rtol=2e-4, atol=2e-5)


def test_the_tiny_suite_runs_on_a_cpu_and_can_be_read() -> None:
    record = run_suite("inference", [TINY], effort=FAST)
    ours, dense = record["rows"]
    assert (ours["peer"], dense["peer"]) == (OURS, SDPA) and ours["status"] == dense["status"] == "ok"
    for row in (ours, dense):
        assert row["error"] <= row["error_bound"] and row["prefill_s"] > 0 and row["decode_s"] > 0
        assert row["median_s"] >= row["prefill_s"] + row["decode_s"] - 1e-3
        assert row["batch_largest"] <= row["batch_computed"] <= row["free_bytes"] // row["cache_bytes"]
    assert dense["cache_bytes"] == dense["cache_dense_bytes"] == ours["cache_dense_bytes"] > ours["cache_bytes"]
    assert ours["batch_largest"] > dense["batch_largest"] >= 1
    text = record_text(record)
    assert "largest batch" in text and text.count("tiny inference") == 2
    assert "### Prefill and decoding of a layer stack" in report_page({"tiny": record}) and "tiny inference" in compare_text(
        {"tiny": record}
    )


def test_a_batch_that_does_not_fit_is_tried_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    run, tried = serving(TINY), []
    facts = {"cache_bytes": 1 << 12, "pool_bytes": 1 << 12, "peak_bytes": None}

    def full(name: str, batch: int, size: int, note: Callable[[], object]) -> float:
        tried.append(batch)
        if batch > 62:
            raise CacheFull("no page is free")
        return 5.0

    monkeypatch.setattr(run, "_try", full)
    found = run.largest_batch(SDPA, facts, float("inf"))
    assert tried == [64, 63, 62] and (found["batch_computed"], found["batch_largest"]) == (64, 62)
    assert "63 did not fit: CacheFull: no page is free" in found["batch_why"]
    late = run.largest_batch(SDPA, facts, 0.0)
    assert "batch_largest" not in late and late["batch_why"] == "the time for all timings was over"


def test_a_full_cache_holds_what_a_prefilled_one_does() -> None:
    """Filling, without any query, leaves as much as a prefill does, and in no more room than was worked out."""
    run = serving(TINY)
    one = run.open(OURS)
    run.stack.prefill(run.x[:, : TINY.seqlen], one.step)
    k = torch.randn(1, TINY.chunk, TINY.kv_heads, TINY.head_dim)
    page = 2 * TINY.block * TINY.head_dim * 4
    three = run.open(OURS, 3, (3 * one.most_bytes() + run._spare_bytes(OURS)) // page)
    noted: list[int] = []
    three.fill(k, k, TINY.seqlen, lambda: noted.append(1))
    assert len(noted) == 3 * len(TINY.chunks)
    assert three.cache.bytes_used == 3 * one.cache.bytes_used
    run.decode(three, 3, TINY.new_tokens, TINY.seqlen)


def test_a_wrong_way_to_serve_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DenseStack.attend
    monkeypatch.setattr(DenseStack, "attend", lambda self, layer, q, k, v: 1.01 * right(self, layer, q, k, v))
    rows = {row["peer"]: row for row in inference.run_inference_case(TINY, FAST)}
    assert rows[OURS]["status"] == "ok" and rows[SDPA]["why"].startswith("ArithmeticError: wrong result")
