"""The order of programs: everything once, the longest lists first."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from s2attn.schedule import longest_first


@given(st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**31))
def test_every_item_once_and_longest_first(heads, lines, seed):
    counts = torch.randint(0, 6, (heads, lines), generator=torch.Generator().manual_seed(seed))
    order = longest_first(counts).long()
    assert sorted(order.tolist()) == list(range(heads * lines))
    lengths = counts.flatten()[order]
    assert bool((lengths[1:] <= lengths[:-1]).all())


def test_heads_of_a_line_are_neighbours_when_equal():
    assert longest_first(torch.tensor([[2, 1], [2, 1]])).tolist() == [0, 2, 1, 3]
