"""`select` against a plain loop over rows, and the properties that a rule promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.selectors import select

SHAPES = st.tuples(st.integers(1, 2), st.sampled_from([2, 4]), st.integers(1, 4), st.integers(1, 9))


def masses(shape, levels):
    """Random mass; few levels make many equal blocks, and 0 is one of them."""
    return torch.randint(0, levels, shape).float() / 4


def by_hand(mass, forced, rule, value):
    """One row after another, in numpy's float32, with the forced blocks first and the earlier of equal blocks first."""
    kept = np.zeros(mass.shape, dtype=bool)
    for place in np.ndindex(mass.shape[:-1]):
        row, must = mass[place].numpy(), forced[place].numpy()
        order = sorted(range(len(row)), key=lambda j, row=row, must=must: (not must[j], -row[j], j))
        total, before = np.float32(0), np.float32(0)
        for j in order:
            total = np.float32(total + row[j])
        for count, j in enumerate(order):
            asked = {"threshold": before < np.float32(value) * total, "top_k": count < value, "min_share": row[j] >= value * row.sum()}
            kept[(*place, j)] = must[j] or (asked[rule] and row[j] > 0)
            before = np.float32(before + row[j])
    return torch.from_numpy(kept)


@settings(max_examples=80)
@given(SHAPES, st.sampled_from([2, 3, 1000]), st.floats(0, 0.6), st.sampled_from(["threshold", "top_k", "min_share"]), st.data())
def test_equals_a_plain_loop(shape, levels, forced_share, rule, data):
    value = data.draw(st.integers(1, 10) if rule == "top_k" else st.sampled_from([0.05, 0.25, 0.5, 0.9, 1.0]))
    mass, forced = masses(shape, levels), torch.rand(shape) < forced_share
    assert torch.equal(select(mass, **{rule: value}, forced=forced), by_hand(mass, forced, rule, value))


@settings(max_examples=40)
@given(SHAPES, st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_threshold_is_reached_and_no_smaller_set_reaches_it(shape, threshold):
    mass = torch.rand(shape) + 0.01
    kept = select(mass, threshold=threshold)
    total, held = mass.double().sum(-1), (mass.double() * kept).sum(-1)
    assert bool((held >= threshold * total * (1 - 1e-6)).all())
    best = mass.double().sort(dim=-1, descending=True).values.cumsum(-1)
    one_fewer = best.gather(-1, (kept.sum(-1, keepdim=True) - 2).clamp(min=0)).squeeze(-1)
    assert bool(((one_fewer < threshold * total) | (kept.sum(-1) == 1)).all())


@settings(max_examples=40)
@given(SHAPES, st.floats(0.01, 1), st.floats(0.01, 1), st.sampled_from(["none", "union", "mean", "majority"]))
def test_more_threshold_keeps_all_that_less_keeps(shape, one, other, share):
    low, high = sorted((one, other))
    mass, forced = torch.rand(shape), torch.rand(shape) < 0.2
    less, more = (select(mass, threshold=c, forced=forced, share=share, kv_heads=shape[1] // 2) for c in (low, high))
    assert not bool((less & ~more).any())


def test_the_block_that_crosses_is_kept():
    mass = torch.tensor([[[[0.5, 0.25, 0.125, 0.125]]]])
    assert select(mass, threshold=0.75).tolist() == [[[[True, True, False, False]]]]
    assert select(mass, threshold=0.7501).tolist() == [[[[True, True, True, False]]]]


def test_equal_blocks_are_taken_in_their_order():
    assert select(torch.ones(1, 1, 1, 300), top_k=7)[0, 0, 0].nonzero().flatten().tolist() == list(range(7))


def test_forced_mass_counts_toward_the_threshold():
    mass = torch.tensor([[[[1.0, 4.0, 2.0, 3.0]]]])
    forced = torch.tensor([False, True, True, False])
    assert select(mass, threshold=0.6, forced=forced).tolist() == [[[[False, True, True, False]]]]
    assert select(mass, threshold=0.61, forced=forced).tolist() == [[[[False, True, True, True]]]]


def test_rows_without_mass_keep_what_is_forced_alone():
    mass, forced = torch.zeros(1, 1, 2, 3), torch.tensor([[True, False, False], [False, False, False]])
    for rule in ({"threshold": 1.0}, {"top_k": 2}, {"min_share": 0.1}):
        assert select(mass, **rule, forced=forced)[0, 0].tolist() == forced.tolist()


@pytest.mark.parametrize("rule", [{"threshold": 0.1}, {"top_k": 1}, {"min_share": 0.9}])
@pytest.mark.parametrize("share", ["none", "union", "mean", "majority"])
def test_rows_that_are_not_finite_keep_everything(rule, share):
    mass = torch.ones(1, 2, 2, 4)
    mass[0, :, 1, 2] = torch.nan
    kept = select(mass, **rule, share=share, kv_heads=1)
    assert bool(kept[:, :, 1].all()) and not bool(kept[:, :, 0].all())


def test_threshold_of_every_head():
    mass = torch.tensor([4.0, 3.0, 2.0, 1.0]).expand(1, 3, 2, 4)
    assert select(mass, threshold=(0.4, 0.7, 1.0)).sum(-1).tolist() == [[[1, 1], [2, 2], [4, 4]]]


def test_sharing_in_a_group():
    """Four heads of one KV head: the first three like block 0, 0, 1 best, the last one block 3."""
    mass = torch.tensor([[8.0, 1, 1, 0], [8, 2, 0, 0], [1, 8, 1, 0], [0, 1, 1, 8]]).view(1, 4, 1, 4)
    pick = {share: select(mass, top_k=1, share=share, kv_heads=1)[0, 0, 0].tolist() for share in ("union", "mean", "majority")}
    assert pick == {"union": [True, True, False, True], "mean": [True, False, False, False], "majority": [True, False, False, False]}
    assert select(mass, top_k=2, share="majority", kv_heads=1)[0, 0, 0].tolist() == [True, True, False, False]
    assert select(mass, top_k=1, share="union", kv_heads=2).shape == (1, 2, 1, 4)


def test_heads_of_unequal_mass_count_alike_in_the_mean():
    mass = torch.tensor([[100.0, 0.0], [0.1, 0.9], [0.1, 0.9]]).view(1, 3, 1, 2)
    assert select(mass, top_k=1, share="mean", kv_heads=1)[0, 0, 0].tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_arithmetic_is_float32(dtype):
    """In 16 bits, adding many small blocks would stop growing and keep them all."""
    mass = torch.full((1, 1, 1, 4096), 0.125, dtype=dtype)
    assert int(select(mass, threshold=0.5).sum()) == 2048


@settings(max_examples=20)
@given(SHAPES)
def test_does_not_depend_on_how_many_rows_go_together(shape):
    mass = torch.rand(shape)
    whole = select(mass, threshold=0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(select.__globals__, "_AT_ONCE", 1)
        assert torch.equal(select(mass, threshold=0.7), whole)


MASS = torch.ones(1, 4, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"threshold": 0}, ValueError, r"threshold must be in \(0, 1\]; got 0"),
        ({"threshold": 1.01}, ValueError, r"threshold must be in \(0, 1\]; got 1.01"),
        ({"threshold": float("nan")}, ValueError, r"threshold must be in \(0, 1\]; got nan"),
        ({"threshold": "all"}, ValueError, "one for each of the 4 heads; got 3 numbers"),
        ({"threshold": (0.5, 0.5)}, ValueError, "one for each of the 4 heads; got 2 numbers"),
        ({"top_k": 0}, ValueError, "top_k must be an integer >= 1; got 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer >= 1; got float"),
        ({"min_share": -1}, ValueError, r"min_share must be in \(0, 1\]; got -1"),
        ({}, ValueError, "must be given one at a time; got none of them"),
        ({"top_k": 1, "threshold": 0.5}, ValueError, "must be given one at a time; got top_k, threshold"),
        ({"top_k": 1, "share": "all"}, ValueError, "share must be one of none, union, mean, majority; got 'all'"),
        ({"top_k": 1, "share": "mean"}, TypeError, "kv_heads must be an integer"),
        ({"top_k": 1, "share": "mean", "kv_heads": 3}, ValueError, "kv_heads must divide the 4 heads of mass; got 3"),
        ({"top_k": 1, "forced": torch.ones(2, 2)}, TypeError, "forced must be a bool tensor or None; got Tensor"),
        ({"top_k": 1, "forced": torch.ones(3, 2).bool()}, ValueError, r"forced must broadcast to \(1, 4, 2, 2\); got \(3, 2\)"),
        ({"top_k": 1, "mass": MASS[0]}, ValueError, "mass must be floating point of shape"),
        ({"top_k": 1, "mass": 3}, TypeError, "mass must be a tensor; got int"),
    ],
)
def test_bad_arguments(arguments, error, words):
    arguments = {"mass": MASS, **arguments}
    with pytest.raises(error, match=words):
        select(arguments.pop("mass"), **arguments)
