"""Layouts that calls build are found again, also by other layers whose heads have the same patterns."""

from __future__ import annotations

import gc

import pytest
import torch

from s2attn import HeadRange, Local, Stride
from s2attn.ops import source
from s2attn.ops.source import CallSizes, find_layout, layout_of, pattern_text, with_named_heads

S2 = Local(2, 16) | Stride(4, block=16)
SIZES = CallSizes(96, 4, 96, 2, torch.device("cpu"))


def layout(layer: int, *, block: int | None = None, causal: bool = True, sizes: CallSizes = SIZES, heads: HeadRange | None = None):
    return layout_of(pattern_text(S2, block, causal, layer, heads), sizes)


def test_layers_with_equal_heads_share_a_layout() -> None:
    """Two KV heads and a stride of 4: every second layer has the same stripes."""
    first, second, third = (layout(layer) for layer in range(3))
    assert third is first and second is not first
    assert not torch.equal(second.to_dense(), first.to_dense())
    assert layout(0, block=16) is first  # what the default is anyway
    rank = HeadRange(4, 8, num_heads=8, num_kv_heads=4)
    assert layout(0, heads=rank) is layout(1)  # the upper half of eight heads begins where layer 1 of four heads does


def test_heads_that_a_tensor_names_are_those_of_a_range() -> None:
    """What travels with DTensors: the numbers of the heads of a call, of which a process keeps its own."""
    q, k = torch.zeros(1, 96, 4, 8), torch.zeros(1, 96, 2, 8)
    text, numbers = with_named_heads(pattern_text(S2, None, True, 0, None), 8, 4), torch.arange(8)
    mine = find_layout(text, [numbers[4:]], q, k)
    assert mine is layout(0, heads=HeadRange(4, 8, num_heads=8, num_kv_heads=4))
    for wrong in (numbers[:3], numbers[::2], numbers[:0], numbers[:4].flip(0)):
        with pytest.raises(ValueError, match="heads must be 4 consecutive numbers"):
            find_layout(text, [wrong], q, k)
    with pytest.raises(ValueError, match="heads must satisfy"):
        find_layout(text, [numbers[4:] + 1], q, k)


def test_whatever_else_differs_makes_another_layout() -> None:
    first = layout(0)
    other = CallSizes(96, 4, 112, 2, torch.device("cpu"))
    assert len({id(x) for x in (first, layout(0, block=32), layout(0, causal=False), layout(0, sizes=other))}) == 4


def test_forgotten_layouts_are_really_gone() -> None:
    layout(0)
    source.forget_layouts()
    gc.collect()
    assert not source._layouts and not source._shared
