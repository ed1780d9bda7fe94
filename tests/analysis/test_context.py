"""What context parallelism would move, as figures, as text and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2attn import Dense, Local, Recipe, Stride, Window, build_layout, context_traffic, describe, describe_context, plot_context

S2 = Local(4) | Stride(8)


def test_figures_are_those_of_the_plan() -> None:
    report = describe_context(S2, 8, 8, 16384, ranks=4, head_dim=64)
    traffic = context_traffic(S2, 8, 8, 16384, shards=("zigzag", 4))
    way, pair = report.sharding("zigzag").way("exchange"), 2 * 64 * 2
    assert way.forward == int(traffic.received.max()) * pair
    assert way.forward_mean == pytest.approx(float(max(traffic.received.mean(), traffic.sent.mean())) * pair, rel=0.2)
    assert report.sharding("zigzag").imbalance == traffic.imbalance < 1.01 < report.sharding("contiguous").imbalance
    gathered = report.sharding("contiguous").way("all-gather")
    assert (gathered.forward, gathered.backward, gathered.held) == (3 * 4096 * 8 * pair, 3 * 4096 * 8 * 2 * pair, 16384 * 8 * pair)


def test_layers_add_up() -> None:
    recipe = Recipe(Window(256), dense_layers=[1])
    both = describe_context(recipe, 2, 2, 8192, ranks=4, layers=2).sharding("contiguous").way("exchange")
    each = [describe_context(recipe.pattern(n), 2, 2, 8192, ranks=4).sharding("contiguous").way("exchange") for n in (0, 1)]
    assert both.forward_mean == sum(one.forward_mean for one in each)
    assert both.held == max(one.held for one in each)


def test_shardings_that_a_length_does_not_allow_are_left_out() -> None:
    assert [one.sharding for one in describe_context(S2, 2, 2, 4 * 99, ranks=4).shardings] == ["contiguous"]
    assert [one.sharding for one in describe_context(S2, 2, 2, 8 * 33, ranks=4).shardings] == ["contiguous", "zigzag"]
    with pytest.raises(ValueError, match="seqlen must be a multiple of 4"):
        describe_context(S2, 2, 2, 4097, ranks=4)


def test_describe_tells_it_too() -> None:
    report = describe(S2, 8, 8, 8192, layers=2, ranks=8)
    assert report.context is not None and report.context.ranks == 8 and report.context.layers == 2
    assert "context parallelism: 8,192 tokens on 8 ranks, 2 layers together" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["context"]["ranks"] == 8
    assert describe(S2, 8, 8, 8192).context is None
    with pytest.raises(ValueError, match="ranks must be left out when a Layout is given"):
        describe(build_layout(Dense(), 2, 2, 64), 2, 2, ranks=2)


def test_a_picture_of_it(tmp_path: Path) -> None:
    path = plot_context(S2, 4, 4, 16384, tmp_path / "context.svg", ranks=(2, 4, 8))
    text = path.read_text()
    assert "<svg" in text and path.stat().st_size > 5000
    with pytest.raises(ValueError, match="ranks must be ascending"):
        plot_context(S2, 4, 4, 16384, path, ranks=(4, 2))
    with pytest.raises(ValueError, match="path must end in"):
        plot_context(S2, 4, 4, 16384, tmp_path / "context.txt")
