"""The last reader of every block against the mask that the pattern spells out token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn import Dense, Local, Stride, Window
from s2attn.layout import last_readers, readers
from s2attn.patterns import Head, Pattern, Shape
from tests.support.strategies import patterns


def from_mask(pattern: Pattern, seqlen: int, block: int) -> list[int]:
    token = np.arange(seqlen)
    mask = pattern.allowed(token[:, None], token[None, :], Shape(seqlen))
    blocks = (mask[:, at : at + block].any(1) for at in range(0, seqlen, block))
    return [int(np.flatnonzero(seen)[-1]) if seen.any() else -1 for seen in blocks]


@settings(max_examples=150)
@given(patterns(), st.integers(0, 300), st.sampled_from([16, 32, 64, 128]), st.sampled_from([1, 2, 64]))
def test_last_readers_are_exact(pattern: Pattern, seqlen: int, block: int, at_once: int) -> None:
    one = pattern.at(Head(query=1, num_heads=2, num_kv_heads=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_ROWS", at_once)
        assert last_readers(one, seqlen, block).tolist() == from_mask(one, seqlen, block)


def test_long_sequences_are_cheap() -> None:
    """128k tokens: a dense mask would have 16 billion pairs."""
    seqlen = 131072
    assert (last_readers(Dense(), seqlen, 64) == seqlen - 1).all()
    block = np.arange(seqlen // 64)
    assert (last_readers(Window(64), seqlen, 64) == np.minimum(block * 64 + 126, seqlen - 1)).all()
    stripes = last_readers((Local(4) | Stride(8)).at(Head()), seqlen, 64)
    assert (stripes[block % 8 == 0] == seqlen - 1).all()
    assert (stripes[block % 8 != 0] == np.minimum(block * 64 + 255, seqlen - 1)[block % 8 != 0]).all()
