"""The benchmark of adapters runs, and an adapter alone stays far below what it serves."""

from __future__ import annotations

from benchmarks.overhead import measure


def test_the_adapter_costs_less_than_the_op() -> None:
    found = measure(1, 64, rounds=200, budget_s=5.0)
    assert 0 < found.alone.median_s < found.bare.median_s
    assert found.line().count("|") == 7
