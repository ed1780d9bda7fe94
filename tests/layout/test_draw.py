"""Text drawings of layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.layout import build_layout
from s2attn.layout.draw import EMPTY, FULL, MOST, PARTIAL, SOME, draw
from s2attn.patterns import Dense, Local, Stride, Window
from tests.support.strategies import CallShape, call_shapes, patterns


def cells(text: str) -> list[str]:
    """The drawing without its caption, one character per cell."""
    return [line[::2] for line in text.splitlines()[:-1]]


def test_small_layouts_show_every_block():
    text = draw(build_layout(Local(2) | Stride(4, offset=0), 1, 1, 320))
    assert cells(text) == ["▒····", "█▒···", "██▒··", "█·█▒·", "█··█▒"]
    assert text.splitlines()[-1] == "█ full, ▒ partial, · not read; a cell is a block of 64 x 64 tokens"


@settings(max_examples=40)
@given(patterns(), call_shapes(200))
def test_cells_are_the_lists(pattern, shape: CallShape):
    layout = build_layout(pattern, shape.num_heads, shape.num_kv_heads, shape.seqlen_q, shape.seqlen_k, block=32, causal=shape.causal)
    for head in range(layout.heads):
        drawn = cells(layout.draw(head))
        for line, text in enumerate(drawn):
            full, partial = layout.rows.line(head, line)
            assert [i for i, cell in enumerate(text) if cell == FULL] == full
            assert [i for i, cell in enumerate(text) if cell == PARTIAL] == [block for block, _ in partial]
            assert len(text) == len(layout.k_spans)
        assert len(drawn) == len(layout.q_spans)


@settings(max_examples=20)
@given(patterns(), st.integers(2, 40), st.integers(1, 800))
def test_shrunk_drawings_show_every_read_block(pattern, width, seqlen):
    layout = build_layout(pattern, 1, 1, seqlen, block=16)
    rows = min(len(layout.q_spans), width // 2)
    drawn = cells(draw(layout, 0, width))
    assert len(drawn) == rows and all(len(line) == rows for line in drawn)
    for line in range(len(layout.q_spans)):
        full, partial = layout.rows.line(0, line)
        for block in [*full, *(block for block, _ in partial)]:
            assert drawn[line * rows // len(layout.q_spans)][block * rows // len(layout.k_spans)] != EMPTY


def test_long_sequences_are_shrunk():
    text = draw(build_layout(Window(1024), 1, 1, 65536), width=40)
    lines = text.splitlines()
    assert len(lines) == 21 and {len(line) for line in lines[:-1]} == {40}
    assert lines[-1] == "█ all, ▓ half or more, ░ fewer, · none; a cell is up to 52 x 52 blocks of 64 x 64 tokens"
    dense = cells(draw(build_layout(Dense(), 1, 1, 65536), width=40))
    assert dense[5] == FULL * 5 + MOST + EMPTY * 14
    assert cells(text)[5] == EMPTY * 4 + SOME * 2 + EMPTY * 14


def test_packed_and_empty_layouts():
    cu = torch.tensor([0, 100, 164])
    assert cells(build_layout(Dense(), 1, 1, cu_seqlens_q=cu, cu_seqlens_k=cu).draw()) == ["▒··", "█▒·", "··▒"]
    assert draw(build_layout(Dense(), 1, 1, 0)) == "(no blocks)"


def test_bad_arguments():
    layout = build_layout(Dense(), 2, 2, 64)
    with pytest.raises(ValueError, match=r"head must be in 0 \.\. 1; got 2"):
        draw(layout, 2)
    with pytest.raises(ValueError, match=r"width must be an integer >= 2; got 1"):
        draw(layout, 0, 1)
    with pytest.raises(TypeError, match=r"head must be an integer >= 0; got str"):
        draw(layout, "0")
