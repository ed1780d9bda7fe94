"""Pictures: what a pixel says, and that files are written without touching anybody's own plots."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from s2attn.analysis.plot import colours, plot, token_ticks
from s2attn.analysis.raster import last_blocks, raster_of
from s2attn.core import Unsupported
from s2attn.layout import build_layout
from s2attn.patterns import Dense, Local, PerHead, Recipe, Sink, Stride, Window, preset
from tests.support.strategies import CallShape, call_shapes, patterns

PNG = b"\x89PNG"


@settings(max_examples=25)
@given(patterns(), call_shapes(120))
def test_small_pictures_show_tokens(pattern, shape: CallShape):
    layout = build_layout(
        pattern, shape.num_heads, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k, block=shape.block, causal=shape.causal
    )
    raster = raster_of(layout, 0, 512)
    assert raster.unit == "token"
    assert np.array_equal(raster.full + raster.partial, layout.to_dense(0).numpy().astype(float))
    q_pos = np.arange(shape.seqlen_q)[:, None] + shape.seqlen_k - shape.seqlen_q
    assert np.array_equal(raster.future, (np.arange(shape.seqlen_k)[None, :] > q_pos) & shape.causal)
    for line in range(layout.rows.lines):
        full, partial = layout.rows.line(0, line)
        row = line * shape.block
        assert all(raster.full[row, block * shape.block] == 1 for block in full)
        assert all(raster.full[row, block * shape.block] == 0 for block, _ in partial)


@settings(max_examples=25)
@given(patterns(), call_shapes(300))
def test_pixels_are_shares_of_blocks(pattern, shape: CallShape):
    layout = build_layout(pattern, 1, 1, shape.seqlen_q, shape.seqlen_k, block=16, causal=shape.causal)
    raster = raster_of(layout, 0, 7)
    if max(shape.seqlen_q, shape.seqlen_k) <= 7:
        return
    rows, cols = len(layout.q_spans), len(layout.k_spans)
    full, partial = np.zeros((2, min(rows, 7), min(cols, 7)))
    area = np.zeros_like(full)
    for i in range(rows):
        area_row = i * len(full) // rows
        listed = layout.rows.line(0, i)
        for j in range(cols):
            pixel = area_row, j * full.shape[1] // cols
            area[pixel] += 1
            full[pixel] += j in listed[0]
            partial[pixel] += j in [block for block, _ in listed[1]]
    np.testing.assert_allclose(raster.full, full / area)
    np.testing.assert_allclose(raster.partial, partial / area)
    if shape.causal:
        assert not (raster.future & (raster.full + raster.partial > 0)).any()


def test_packed_sequences_are_drawn_one_after_another():
    cu = torch.tensor([0, 700, 730, 2000])
    raster = raster_of(build_layout(Dense(), 1, 1, cu_seqlens_q=cu, cu_seqlens_k=cu, block=16), 0, 512)
    share = raster.full + raster.partial
    assert share.shape == (125, 125) and (raster.query_tokens, raster.key_tokens) == (2000, 2000)
    assert np.diag(share).min() > 0
    assert share[50:, :43].max() == 0 and np.triu(share, 2).max() == 0


def test_the_closer_look_is_the_corner():
    layout = build_layout(Local(2) | Stride(8), 2, 2, 64 * 300)
    close = last_blocks(layout, 1, 20)
    for row in range(20):
        full, partial = layout.rows.line(1, 280 + row)
        assert np.flatnonzero(close.full[row]).tolist() == [block - 280 for block in full if block >= 280]
        assert np.flatnonzero(close.partial[row]).tolist() == [block - 280 for block, _ in partial]


def test_a_long_picture_is_as_small_as_a_short_one():
    raster = raster_of(build_layout(Window(2048) | Sink(64), 1, 1, 131072), 0, 512)
    assert raster.full.shape == (512, 512)
    picture = colours(raster)
    assert picture.shape == (512, 512, 3) and picture.min() >= 0 and picture.max() <= 1
    darker = picture.sum(axis=2)
    assert darker[400, 396] < darker[400, 100] and darker[400, 0] < darker[400, 100]


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        (Local(4) | Stride(8), {}),
        (Local(16) | Stride(8), {"num_heads": 32, "num_kv_heads": 8, "seqlen": 131072}),
        (preset("phi3_small"), {"num_heads": 32, "num_kv_heads": 8, "layer": 1, "seqlen": 3000}),
        (preset("phi3_small"), {"num_heads": 32, "num_kv_heads": 8, "seqlen": 3000, "panels": 3}),
        (PerHead({0: Dense()}, default=Sink(4) | Window(40)), {"seqlen": 300}),
        (Window(5), {"num_heads": 1, "seqlen": 1, "causal": False}),
        (build_layout(Local(2) | Stride(4), 2, 2, 100, 1000), {}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_pictures_are_written(pattern, settings, tmp_path):
    path = plot(pattern, path=tmp_path / "picture.png", dpi=40, **settings)
    assert path.read_bytes()[:4] == PNG and path.stat().st_size > 2000


def test_other_formats(tmp_path):
    assert "<svg" in plot(Dense(), 1, seqlen=64, path=str(tmp_path / "a.svg")).read_text()


def test_nobody_elses_plots_are_touched(tmp_path):
    code = (
        "import sys; from s2attn.analysis.plot import plot; from s2attn import Dense; assert 'matplotlib' not in sys.modules; "
        f"plot(Dense(), 1, seqlen=64, path={str(tmp_path / 'a.png')!r}, dpi=30); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Unsupported, match=r"plot cannot draw\n  matplotlib: not installed: pip install 's2attn\[cli\]'"):
        plot(Dense(), path=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "words"),
    [
        ((Dense(),), {"path": "a.bmp"}, ValueError, r"path must end in \.png, \.svg or \.pdf; got 'a\.bmp'"),
        ((Dense(),), {"path": "nowhere/a.png"}, ValueError, r"path must lie in a folder that exists; got 'nowhere/a\.png'"),
        ((Dense(),), {"path": 3}, TypeError, r"path must be a string or a path; got int"),
        (("dense",), {}, TypeError, r"pattern must be a Pattern, a Recipe or a Layout; got str"),
        ((Dense(), 4, 3), {}, ValueError, r"num_kv_heads must divide num_heads \(4\); got 3"),
        ((Dense(),), {"panels": 0}, ValueError, r"panels must be an integer >= 1; got 0"),
        ((build_layout(Dense(), 1, 1, 64),), {"seqlen": 64}, ValueError, r"seqlen and block must be left out when a Layout is given"),
        ((Recipe(Dense()),), {"layer": -1}, ValueError, r"layer must be an integer >= 0; got -1"),
    ],
)
def test_bad_arguments(arguments, settings, error, words, tmp_path):
    with pytest.raises(error, match=words):
        plot(*arguments, **{"path": tmp_path / "a.png", **settings})


def test_ticks_are_round():
    for length in (1, 3, 17, 100, 4096, 5000, 131072, 1 << 20):
        ticks = token_ticks(length)
        assert ticks[0] == 0 and 2 <= len(ticks) <= 5 and ticks[-1] <= length
