"""Reports: published figures, defects of earlier kernels that a report must name, and wording."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import s2attn
from s2attn.analysis.describe import describe
from s2attn.analysis.report import Report
from s2attn.layout import build_layout
from s2attn.patterns import Blocks, ByRange, Dense, Local, LongNet, PerHead, Power, Random, Recipe, Sink, Stride, Window, preset

POWER = preset("power_attention")
LAYOUT = build_layout(Dense(), 2, 2, 64)


def test_power_attention_density_of_both_bases():
    """arXiv:2503.03588 counts blocks over the square; the causal triangle has half of them."""
    at_32k = describe(POWER, 1, seqlen=32768, block=256)
    blocks = at_32k.listed.total
    assert round(100 * blocks / 128**2, 2) == 6.96
    assert round(100 * at_32k.block_density, 1) == 13.8
    at_128k = describe(POWER, 1, seqlen=131072, block=256)
    assert round(100 * at_128k.block_density, 2) == 4.28
    assert round(1 / at_128k.block_density, 1) == 23.4


def test_phi3_small_saves_half_of_what_kv_heads_could():
    """Stripes per query head: 0.13 of the pairs, but a group of four reads half of all blocks."""
    per_query = describe(preset("phi3_small"), 32, 8, 131072, layers=1)
    per_kv = describe(Local(16) | Stride(8, shift=1), 32, 8, 131072)
    assert round(per_query.density, 2) == 0.14 and round(per_query.group_density, 2) == 0.51
    assert 0.50 < per_query.cache_bytes / per_query.dense_cache_bytes < 0.51
    assert 0.13 < per_kv.cache_bytes / per_kv.dense_cache_bytes < 0.14
    assert any(str(line).startswith("The query heads of a group read different blocks") for line in per_query.advice)
    assert not any("query heads of a group" in str(line) for line in per_kv.advice)


def test_half_covered_context_is_warned_about():
    report = describe(Local(1) | Stride(16), 32, 8, 4096)
    assert (report.cover.covered, report.cover.earlier, report.complete, report.complete_after) == (31, 63, False, None)
    assert report.warnings == (
        "Incomplete: all 8 KV heads of layer 0 together read 31 of 63 earlier blocks for the last query block; "
        "never read: j % 16 in {1..8} among blocks 1..56.",
    )
    assert "31 of 63" in str(report)


def test_layers_continue_until_everything_is_covered():
    report = describe(Local(1) | Stride(8), 4, 4, 8192, layers=3)
    assert report.complete and report.complete_after == 2
    assert report.per_layer[0].cover.covered < report.per_layer[0].cover.earlier
    assert "yes, after 2 layers" in str(report)
    assert report.warnings == ()
    assert describe(Local(1) | Stride(8), 8, 8, 8192).complete_after == 1


def test_dense_layers_do_not_hide_what_the_others_miss():
    recipe = Recipe(Local(1) | Stride(16, offset=0), dense_layers=[0])
    report = describe(recipe, 8, 8, 8192, layers=4)
    assert report.complete and report.complete_after == 1
    assert len(report.warnings) == 1
    assert report.warnings[0].startswith(
        "Complete through its dense layers only: all 8 KV heads of the other layers together read 8 of 127"
    )


def test_layers_of_a_recipe_differ():
    report = describe(preset("phi3_small"), 32, 8, 8192, layers=4)
    assert [one.dense for one in report.per_layer] == [False, True, False, True]
    assert [one.layer for one in report.per_layer] == [0, 1, 2, 3]
    assert report.density == pytest.approx(sum(one.density for one in report.per_layer) / 4)
    later = describe(preset("phi3_small"), 32, 8, 8192, layer=1)
    assert later.density == 1.0 and later.advice == () and later.warnings == ()
    assert later.per_layer[0].layer == 1


def test_dense_attention_has_nothing_to_report():
    report = describe(Dense(), 8, 2, 1000, layers=2)
    assert report.density == 1.0 and report.ideal_speedup == 1.0 and report.kv_efficient
    assert report.density_square == pytest.approx(0.5005)
    assert report.flops_forward == report.dense_flops_forward == 2 * 8 * 4 * 128 * 1000 * 1001 // 2
    assert report.flops_backward == 2.5 * report.flops_forward
    assert report.cache_bytes == report.dense_cache_bytes == report.kv_bytes == 2 * 2 * 1000 * 128 * 2 * 2
    assert report.warnings == () and report.advice == ()


def test_first_counter_example():
    report = describe(PerHead({1: Local(2) | Power()}, default=Local(2) | Stride(4)), 4, 2, 2048, layer=3)
    example = report.counter_example
    assert not report.kv_efficient
    assert (example.layer, example.kv_head, example.key_block, example.skipped_at, example.read_again_at) == (3, 1, 0, 3, 4)
    assert str(example) == "layer 3, KV head 1: key block 0 is not read by query block 3 and is read again by query block 4"
    assert any("Not KV-efficient (layer 3, KV head 1" in str(line) for line in report.advice)


def test_query_heads_of_a_group_are_taken_together():
    """Two query heads that skip a block in turns: neither is KV-efficient, their KV head is."""
    first = [[j in (i, 0) and (j == i or i % 2 == 0) for j in range(8)] for i in range(8)]
    second = [[j in (i, 0) and (j == i or i % 2 == 1) for j in range(8)] for i in range(8)]
    assert describe(Blocks([first, second], heads="query"), 2, 1, 512).kv_efficient
    assert not describe(Blocks([first, second], heads="query"), 2, 2, 512).kv_efficient


def test_a_ring_of_distances_is_not_kv_efficient():
    assert not describe(ByRange([(256, 512, Dense())]), 1, seqlen=2048).kv_efficient
    assert describe(ByRange([(0, 512, Dense()), (512, 1024, Stride(4)), (1024, None, Stride(8))]), 8, seqlen=4096).kv_efficient
    assert not describe(ByRange([(0, 512, Dense()), (512, 1024, Stride(8)), (1024, None, Stride(4))]), 8, seqlen=4096).kv_efficient


def test_cache_after_eviction():
    streaming = describe(Sink(64) | Window(512), 4, 2, 65536)
    assert streaming.cache_bytes == (64 + 512) * 2 * 128 * 2 * 2
    assert describe(Sink(64) | Window(513), 4, 2, 65536).cache_bytes == (64 + 576) * 2 * 128 * 2 * 2  # whole blocks stay
    power = describe(Local(2) | Power(), 1, seqlen=8192)
    assert power.cache_bytes == power.dense_cache_bytes
    assert describe(Dense(), 1, seqlen=8192, causal=False).cache_bytes is None
    assert describe(build_layout(Dense(), 1, 1, 8192), 1).cache_bytes is None


def test_layout_bytes_are_those_of_the_layout():
    for pattern in (Local(4) | Stride(8), Window(100) | Stride(4, heads="query"), PerHead({0: Window(7)}, default=Random(2))):
        report, layout = describe(pattern, 8, 4, 3000, block=32), build_layout(pattern, 8, 4, 3000, block=32)
        assert report.layout_bytes == layout.nbytes
        assert report.tile_bytes == layout.tiles.numel()
        assert report.mask_bytes == 3000 * 3000


def test_a_layout_is_described_like_its_pattern():
    pattern = Local(2) | Stride(4, heads="query")
    layout = build_layout(pattern, 8, 4, 2000)
    one, two = describe(pattern, 8, 4, 2000).to_dict(), describe(layout, 8, 4).to_dict()
    different = {key for key in one if one[key] != two[key]} - {"pattern"}
    assert different == {"cache_bytes", "per_layer"}
    assert two["cache_bytes"] is None


def test_load_imbalance():
    report = describe(PerHead({0: Dense()}, default=Window(64)), 4, seqlen=8192)
    assert report.imbalance > 3
    assert any(str(line).startswith("Heads are uneven") for line in report.advice)
    assert describe(Window(64), 4, seqlen=8192).imbalance == 1.0


def test_advice_stands_only_where_it_is_true():
    kept = Recipe(Local(4) | Stride(8), dense_layers=[0])
    assert describe(kept, 8, 8, 8192, layers=4).advice == ()
    alike = describe(Local(4) | Stride(8, offset=0), 8, 8, 8192, layers=4).advice
    assert [str(line).split(":")[0].split(".")[0] for line in alike] == [
        "Heads do not differ",
        "Let the union of the heads cover the context",
        "No layer is dense",
    ]
    bare = describe(Recipe(Local(4) | Stride(8), layers={1: Stride(8)}, dense_layers=[0]), 8, 8, 8192, layers=4).advice
    assert len(bare) == 1 and str(bare[0]).startswith("No local window: in layer 1 some head")


def test_stalls_and_empty_rows_are_warned_about():
    stalled = describe(LongNet(), 1, seqlen=128 * 64, layers=6).warnings
    assert any(line.startswith("Reach stalls: the last block sees 80 of 128 blocks through 6 layers") for line in stalled)
    empty = describe(Stride(4, offset=1), 1, seqlen=1024).warnings
    assert any(line.startswith("Empty rows: in some head 3 of 16 query blocks") for line in empty)


def test_no_pair_at_all():
    report = describe(ByRange([(5000, None, Dense())]), 1, seqlen=1000)
    assert report.density == 0 and report.ideal_speedup == float("inf")
    assert report.to_dict()["ideal_speedup"] is None
    assert "no pair is allowed" in str(report)


def test_not_causal():
    report = describe(Window(100), 2, seqlen=1000, causal=False)
    assert report.kv_efficient is None and report.counter_example is None
    assert report.density == report.density_square
    assert "triangle" not in str(report) and "not causal" in str(report)


@pytest.mark.parametrize("pattern", [Local(16) | Stride(8), preset("phi3_small"), POWER, Dense()], ids=repr)
def test_text_and_json(pattern):
    report = describe(pattern, 8, 4, 16384, layers=4)
    text = str(report)
    for word in ("of the causal triangle", "of the full square", "ideal speed-up", "KV-efficient", "complete", "reach"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 118
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert isinstance(report, Report)


def test_a_large_model_holds_nothing_of_the_size_of_its_mask():
    report = describe(Recipe(Local(16) | Stride(16), dense_layers=[0, 15]), 32, 8, 131072, layers=32)
    assert report.layers == len(report.per_layer) == 32
    assert report.layout_bytes < report.mask_bytes / 256
    assert report.reach.layers_to_all == 1


def test_one_block():
    report = describe(Local(1), 1, seqlen=1)
    assert report.complete and report.density == 1.0 and report.reach.blocks == (1,)
    assert "reach" in str(report)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "words"),
    [
        (("local", 1), {"seqlen": 5}, TypeError, r"pattern must be a Pattern, a Recipe or a Layout; got str"),
        ((Dense(), 0), {"seqlen": 5}, ValueError, r"num_heads must be an integer >= 1; got 0"),
        ((Dense(), 4, 3), {"seqlen": 5}, ValueError, r"num_kv_heads must divide num_heads \(4\); got 3"),
        ((Dense(), 1), {}, TypeError, r"seqlen must be an integer >= 1; got NoneType"),
        ((Dense(), 1), {"seqlen": 64, "block": 48}, ValueError, r"block must be one of 16, 32, 64, 128, 256; got 48"),
        ((Dense(), 1), {"seqlen": 64, "head_dim": 0}, ValueError, r"head_dim must be an integer >= 1; got 0"),
        ((Dense(), 1), {"seqlen": 64, "layer": -1}, ValueError, r"layer must be an integer >= 0; got -1"),
        (
            (build_layout(Dense(), 2, 2, 64), 2),
            {"seqlen": 65},
            ValueError,
            r"seqlen must be left out or be that of the layout \(64\); got 65",
        ),
        (
            (build_layout(Dense(), 2, 2, 64), 2),
            {"block": 32},
            ValueError,
            r"block must be left out or be that of the layout \(64\); got 32",
        ),
        ((LAYOUT, 3), {}, ValueError, r"num_heads and num_kv_heads must be .* \(2\).*; got \(3, 3\)"),
    ],
)
def test_bad_arguments(arguments, settings, error, words):
    with pytest.raises(error, match=words):
        describe(*arguments, **settings)


def test_packed_layouts_are_refused():
    cu = torch.tensor([0, 64, 128])
    with pytest.raises(ValueError, match=r"layout must be of one sequence with as many queries as keys; got packed sequences"):
        describe(build_layout(Dense(), 1, 1, cu_seqlens_q=cu, cu_seqlens_k=cu), 1)


def test_the_package_loads_the_lab_when_it_is_asked_for():
    code = (
        "import sys, s2attn; names = dir(s2attn); before = 'experiments' in sys.modules; "
        "report = s2attn.describe(s2attn.Dense(), 1, seqlen=64); "
        "print(before, {'describe', 'plot', 'Report'} <= set(names), isinstance(report, s2attn.Report), 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "True", "True", "False"]


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match=r"module 's2attn' has no attribute 'descibe'"):
        s2attn.descibe  # noqa: B018
