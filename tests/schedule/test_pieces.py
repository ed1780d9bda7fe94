"""Schedules: every entry in exactly one piece, the longest first, slots of their own, limits that do not depend on neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from s2attn.schedule import Schedule, piece_limits, plan_by_length, plan_by_range

counts = arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(0, 12)), elements=st.integers(0, 60))


def check(plan: Schedule, full: np.ndarray, rest: np.ndarray) -> None:
    """S1 and S2, entry by entry."""
    heads, lines = full.shape
    covered = [[np.zeros(part, int) for part in pair] for pair in zip(full.ravel(), rest.ravel(), strict=True)]
    slots: dict[int, list[tuple[int, int, int]]] = {}
    for item, full_from, full_to, rest_from, rest_to, slot in plan.pieces.tolist():
        assert 0 <= full_from <= full_to <= full.ravel()[item] and 0 <= rest_from <= rest_to <= rest.ravel()[item]
        covered[item][0][full_from:full_to] += 1
        covered[item][1][rest_from:rest_to] += 1
        slots.setdefault(item, []).append((slot, full_from, rest_from))
    assert sorted(slots) == list(range(heads * lines))
    assert all((part == 1).all() for pair in covered for part in pair)
    ranges = {item: range(first, last) for item, first, last in plan.splits.tolist()}
    assert sorted(number for taken in ranges.values() for number in taken) == list(range(plan.slots))
    for item, pieces in slots.items():
        if len(pieces) == 1:
            assert pieces[0][0] == -1 and item not in ranges
        else:
            assert [slot for slot, *_ in sorted(pieces)] == list(ranges[item])
            assert sorted(pieces) == sorted(pieces, key=lambda piece: piece[1:]), "slots follow the order of the entries"


@settings(max_examples=400)
@given(counts, st.integers(1, 40), st.sampled_from([1, 2, 4]), st.data())
def test_every_entry_once_longest_first_and_within_the_limit(length, limit, unit, data):
    full = np.array([data.draw(st.integers(0, int(n))) for n in length.ravel()], np.int64).reshape(length.shape)
    plan = plan_by_length(full, length - full, limit, unit)
    check(plan, full, length - full)
    sizes = plan.pieces[:, 2] - plan.pieces[:, 1] + plan.pieces[:, 4] - plan.pieces[:, 3]
    assert (np.diff(sizes) <= 0).all()
    assert (sizes <= limit + unit - 1).all()
    per_item = np.bincount(plan.pieces[:, 0], minlength=length.size)
    assert (per_item[length.ravel() <= limit] == 1).all(), "what is short is left whole"
    assert (per_item <= np.maximum(-(-length.ravel() // limit), 1)).all()


@settings(max_examples=200)
@given(
    arrays.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(0, 6), st.integers(1, 5)), elements=st.integers(0, 9)),
    st.integers(0, 2**31),
)
def test_ranges_of_keys_come_one_after_another(both, seed):
    of_full = np.random.default_rng(seed).integers(0, both + 1)
    of_rest = both - of_full
    plan = plan_by_range(of_full, of_rest)
    check(plan, of_full.sum(2), of_rest.sum(2))
    owner = [np.repeat(np.arange(both.shape[2]), part) for part in both.reshape(-1, both.shape[2])]
    full_owner = [np.repeat(np.arange(both.shape[2]), part) for part in of_full.reshape(-1, both.shape[2])]
    rest_owner = [np.repeat(np.arange(both.shape[2]), part) for part in of_rest.reshape(-1, both.shape[2])]
    seen = []
    for item, full_from, full_to, rest_from, rest_to, _ in plan.pieces.tolist():
        numbers = {*full_owner[item][full_from:full_to].tolist(), *rest_owner[item][rest_from:rest_to].tolist()}
        assert len(numbers) == (1 if len(owner[item]) else 0), "a piece stays inside one range"
        seen += [(numbers.pop(), -(full_to - full_from + rest_to - rest_from))] if numbers else []
    assert seen == sorted(seen)


def test_a_long_column_is_cut_and_a_ramp_is_not():
    sink = np.full((8, 512), 17)
    sink[:, 0] = 512
    limits = piece_limits(sink, np.zeros(512, int))
    assert limits[0] < 512 and (sink[:, 1:] <= limits[1:]).all()
    ramp = np.arange(1, 513)[None].repeat(4, 0)
    assert (ramp <= piece_limits(ramp, np.zeros(512, int))).all(), "causal dense rows are at most twice their mean"


def test_long_lines_among_very_many_are_left_whole():
    mixed = np.concatenate([np.full((16, 2048), 50), np.arange(1, 2049)[None].repeat(16, 0)])
    assert (mixed <= piece_limits(mixed, np.zeros(2048, int))).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_packed_sequence_is_judged_by_itself(lengths, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, 300, (2, n)) for n in lengths]
    seq = np.repeat(np.arange(len(parts)), lengths)
    together = piece_limits(np.concatenate(parts, axis=1), seq)
    alone = [piece_limits(part, np.zeros(part.shape[1], int)) for part in parts]
    assert together.tolist() == np.concatenate(alone).tolist()


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_of_a_line_are_neighbours_when_equal(heads):
    plan = plan_by_length(np.array([[2, 1]] * heads), np.zeros((heads, 2), int), limit=9)
    assert plan.pieces[:, 0].tolist() == [head * 2 for head in range(heads)] + [head * 2 + 1 for head in range(heads)]
