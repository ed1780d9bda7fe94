"""Reach: PowerAttention's tables exactly, and boolean matrix products on small patterns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.analysis.reach import reach
from s2attn.layout import build_layout
from s2attn.patterns import Dense, Dilated, Local, LongNet, Power, Recipe, Sink, Stride, Window, preset
from tests.support import dense_mask
from tests.support.strategies import CallShape, call_shapes, patterns

POWER = preset("power_attention")
WINDOW = Sink(256) | Local(9, block=256)


def through(pattern, layers, blocks=128):
    return reach(pattern, seqlen=blocks * 256, layers=layers, block=256)


def test_power_attention_sees_all_of_128_blocks_in_6_layers():
    assert through(POWER, 6).blocks == (10, 35, 75, 110, 126, 128)
    assert through(POWER, 6).layers_to_all == 6


@pytest.mark.parametrize(("blocks", "layers"), [(128, 6), (256, 7), (512, 8), (4096, 11)])
def test_power_attention_needs_a_layer_more_for_twice_the_length(blocks, layers):
    assert through(POWER, layers + 3, blocks).layers_to_all == layers


def test_sliding_window_needs_16_layers():
    found = through(WINDOW, 20)
    assert found.layers_to_all == 16
    assert found.blocks[:3] == (10, 18, 26)


def test_dilated_stalls_at_64():
    found = through(Dilated(2, 20, block=256), 12)
    assert found.blocks[-1] == 64
    assert found.blocks == (10, 19, 28, 37, 46, 55, 64, 64, 64, 64, 64, 64)
    assert found.stalled
    assert found.layers_to_all is None


def test_longnet_stalls_at_80():
    found = through(LongNet(block=256), 8)
    assert max(found.blocks) == 80
    assert found.stalled


@pytest.mark.parametrize("layers", range(1, 9))
def test_powers_of_two_reach_every_distance_below_a_power(layers):
    assert through(Power(block=256), layers, 1024).distance[-1] == 2 ** (layers + 1) - 2


def test_a_recipe_is_followed_layer_by_layer():
    recipe = Recipe(Local(2, block=64), layers={2: Stride(4, 0, block=64) | Local(1, block=64)}, dense_layers=[4])
    found = reach(recipe, seqlen=64 * 40, layers=5)
    assert found.blocks == (2, 3, 31, 31, 40)  # a dense layer on top sees all


def test_heads_see_for_each_other():
    pattern = Local(1) | Stride(4)
    alone, together = (reach(pattern, heads, seqlen=4096) for heads in (1, 4))
    assert alone.blocks == (17,)
    assert together.blocks == (64,)
    assert reach(build_layout(pattern, 4, 4, 4096), 4) == together


def test_a_layer_continues_where_the_last_one_stopped():
    assert reach(Stride(8, block=64), 4, seqlen=4096, layers=2).blocks[-1] == 64


@settings(max_examples=40)
@given(patterns(), call_shapes(200), st.integers(1, 4))
def test_reach_is_a_product_of_boolean_matrices(pattern, shape: CallShape, layers):
    recipe = Recipe(pattern, layers={1: Window(20) | Sink(3)})
    n, block = shape.seqlen_q, min(shape.block, 64)
    rows = -(-n // block)
    seen = np.eye(rows, dtype=bool)
    expected = []
    for layer in range(layers):
        mask = dense_mask(recipe.pattern(layer), shape.num_heads, shape.num_kv_heads, n, n, causal=shape.causal, layer=layer).any(0).numpy()
        blocks = np.add.reduceat(np.add.reduceat(mask, np.arange(0, n, block), 0), np.arange(0, n, block), 1) > 0
        seen = seen | (blocks.astype(int) @ seen.astype(int) > 0)
        expected.append(int(seen[-1].sum()))
    got = reach(recipe, shape.num_heads, shape.num_kv_heads, n, layers=layers, block=block, causal=shape.causal)
    assert list(got.blocks) == expected
    assert got.total == rows


def test_long_sequences():
    assert reach(Local(1) | Stride(32), 8, seqlen=1 << 18, layers=6).layers_to_all == 4  # 8 of 32 residues a layer


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"seqlen must be an integer >= 1; got 0"):
        reach(Dense(), seqlen=0)
    with pytest.raises(TypeError, match=r"pattern must be a Pattern, a Recipe or a Layout; got str"):
        reach("local:3", seqlen=64)
    with pytest.raises(ValueError, match=r"num_kv_heads must divide num_heads \(3\); got 2"):
        reach(Dense(), 3, 2, seqlen=64)
    with pytest.raises(ValueError, match=r"layers must be an integer >= 1; got 0"):
        reach(Dense(), seqlen=64, layers=0)
    with pytest.raises(ValueError, match=r"layout must be of one sequence with as many queries as keys; got 1 queries and 64 keys"):
        reach(build_layout(Dense(), 1, 1, 1, 64), 1)
