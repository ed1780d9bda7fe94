"""Progressions behave like sets of integers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.patterns import Runs

ROWS, LIMIT = 3, 40
progressions = st.lists(
    st.tuples(st.integers(0, ROWS - 1), st.integers(-10, 45), st.integers(1, 7), st.integers(0, 12)), min_size=0, max_size=8
)


def made(parts) -> tuple[Runs, list[set[int]]]:
    sets: list[set[int]] = [set() for _ in range(ROWS)]
    for row, start, step, count in parts:
        sets[row] |= {m for m in range(start, start + step * count, step) if 0 <= m < LIMIT}
    row, start, step, count = (np.array([part[i] for part in parts], dtype=np.int64) for i in range(4))
    return Runs.of(row, start, step, count, LIMIT), sets


def as_sets(runs: Runs) -> list[set[int]]:
    row, member = runs.expand()
    pairs = list(zip(row.tolist(), member.tolist(), strict=True))
    assert pairs == sorted(set(pairs)), "members must ascend without repetition"
    return [{m for r, m in pairs if r == row} for row in range(ROWS)]


@settings(max_examples=300)
@given(progressions, progressions)
def test_runs_are_sets(one, two):
    (a, sets_a), (b, sets_b) = made(one), made(two)
    assert as_sets(a) == sets_a
    assert as_sets(a | b) == [x | y for x, y in zip(sets_a, sets_b, strict=True)]
    assert as_sets(a & b) == [x & y for x, y in zip(sets_a, sets_b, strict=True)]
    assert as_sets(a - b) == [x - y for x, y in zip(sets_a, sets_b, strict=True)]
    assert a.counts(ROWS).tolist() == [len(x) for x in sets_a]


@settings(max_examples=100)
@given(progressions, st.lists(st.integers(-3, 45), min_size=ROWS, max_size=ROWS))
def test_cutting(parts, ends):
    runs, sets = made(parts)
    assert as_sets(runs.below(np.array(ends))) == [{m for m in s if m <= e} for s, e in zip(sets, ends, strict=True)]
    assert as_sets(runs.above(np.array(ends))) == [{m for m in s if m > e} for s, e in zip(sets, ends, strict=True)]
