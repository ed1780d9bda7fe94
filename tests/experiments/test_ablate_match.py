"""Equal work: every design lists the pairs it was to list, counted again from masks, and says so where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.ablate_match import Matched, Shape, designs, match
from s2attn import Dense, LongNet, Power, Recipe, Stride, Window
from s2attn.analysis.describe import describe
from tests.support import dense_mask

SHAPE = Shape(layers=4, heads=4, kv_heads=2, seqlen=256, block=16)


def counted(recipe: Recipe, shape: Shape) -> int:
    """The pairs of a recipe, from masks that know nothing of layouts."""
    masks = [
        dense_mask(recipe.pattern(layer), shape.heads, shape.kv_heads, shape.seqlen, shape.seqlen, layer=layer)
        for layer in range(shape.layers)
    ]
    return sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("name", list(designs(4)))
def test_every_design_lists_the_same_pairs(name: str) -> None:
    found = match(name, SHAPE, 0.6, tolerance=0.02)
    assert found.pairs == counted(found.recipe, SHAPE)
    assert found.dense_pairs == counted(Recipe(Dense()), SHAPE)
    if name == "dense":
        assert found.wanted is None and found.density == 1 and found.within(0)
    else:
        assert found.wanted == round(0.6 * found.dense_pairs)
        assert abs(found.pairs / found.wanted - 1) <= 0.02 and found.within(0.02)


@given(name=st.sampled_from(sorted(set(designs(3)) - {"dense"})), budget=st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_what_was_reached_is_told_whatever_the_budget(name: str, budget: float) -> None:
    shape = Shape(layers=3, heads=2, kv_heads=1, seqlen=256, block=16)
    found = match(name, shape, budget)
    assert found.pairs == counted(found.recipe, shape)
    assert found.wanted is not None and found.error == pytest.approx(found.pairs / found.wanted - 1)
    assert found.density == pytest.approx(found.pairs / found.dense_pairs)


def test_pairs_agree_with_describe() -> None:
    recipe = match("s2+1", SHAPE, 0.5).recipe
    report = describe(recipe, SHAPE.heads, SHAPE.kv_heads, SHAPE.seqlen, layers=SHAPE.layers)
    assert SHAPE.pairs(recipe) / SHAPE.dense_pairs == pytest.approx(report.density)


@pytest.mark.parametrize(("layers", "numbers"), [(1, []), (2, [1]), (4, [1, 2]), (8, [1, 2]), (12, [1, 2, 3]), (32, [1, 2, 8])])
def test_hybrids_have_one_two_and_a_quarter_of_the_layers_dense(layers: int, numbers: list[int]) -> None:
    assert [name for name in designs(layers) if name.startswith("s2+")] == [f"s2+{number}" for number in numbers]


def test_a_hybrid_pays_for_its_dense_layers_with_sparser_others() -> None:
    plain, hybrid = match("s2", SHAPE, 0.5), match("s2+1", SHAPE, 0.5)
    assert hybrid.recipe.dense_layers == (0,) and plain.recipe.dense_layers == ()
    assert match("s2+2", SHAPE, 0.6).recipe.dense_layers == (0, 2)

    def of_sparse_layer(found: Matched) -> int:
        return int(dense_mask(found.recipe.default, 4, 2, 256, 256, layer=1).sum())

    assert of_sparse_layer(hybrid) < 0.8 * of_sparse_layer(plain)


def test_heads_read_the_same_stripes_or_different_ones() -> None:
    same = dense_mask(match("homogeneous", SHAPE, 0.4).recipe.default, 4, 2, 256, 256, layer=1)
    differ = dense_mask(match("s2", SHAPE, 0.4).recipe.default, 4, 2, 256, 256, layer=1)
    assert bool((same[0] == same[3]).all()) and not bool((differ[0] == differ[3]).all())


def test_stripes_leave_a_narrower_window_than_s2() -> None:
    many, half = (match(name, SHAPE, 0.4) for name in ("stripes", "s2"))
    widths = [part.n for one in (many, half) for part in one.recipe.default.parts if isinstance(part, Window)]
    strides = [part.stride for one in (many, half) for part in one.recipe.default.parts if isinstance(part, Stride)]
    assert SHAPE.block <= widths[0] < widths[1] and strides[0] < strides[1] and many.within(0.02)


def test_the_window_is_as_near_as_a_window_can_be() -> None:
    found = match("window", SHAPE, 0.37)
    (width,) = [found.recipe.default.n] if isinstance(found.recipe.default, Window) else []
    assert found.wanted is not None
    away = [abs(SHAPE.pairs(Recipe(Window(n))) - found.wanted) for n in (width - 1, width, width + 1)]
    assert away[1] == min(away)


def test_a_budget_below_the_dense_layers_is_reported_not_hidden() -> None:
    found = match("s2+2", SHAPE, 0.3)
    assert not found.within(0.02) and found.error > 0.5
    assert found.recipe.dense_layers == (0, 2)


def test_designs_with_fixed_distances_change_them_for_a_small_budget() -> None:
    shape = Shape(layers=2, heads=2, kv_heads=2, seqlen=1024, block=16)
    found = {name: match(name, shape, 0.2) for name in ("power", "longnet", "dilated")}
    less = {name: match(name, shape, 0.15) for name in found}
    assert all(one.within(0.02) for one in [*found.values(), *less.values()])
    bases = [part.base for one in (found, less) for part in one["power"].recipe.default.parts if isinstance(part, Power)]
    segments = [part.segment for one in (found, less) for part in one["longnet"].recipe.default.parts if isinstance(part, LongNet)]
    assert bases == [2, 4] and segments == [4, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: match("chess", SHAPE, 0.5), r"recipe must be one of dense, window, .*; got 'chess'"),
        (lambda: match("s2", SHAPE, 0.0), r"budget must be above 0 and below 1; got 0.0"),
        (lambda: match("s2", SHAPE, 1.0), r"budget must be above 0 and below 1; got 1.0"),
        (lambda: match("s2", SHAPE, 0.5, tolerance=-1), r"tolerance must be from 0 to below 1; got -1"),
        (lambda: Shape(2, 2, 2, 100, 64), r"Shape seqlen must be an integer >= 128; got 100"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
