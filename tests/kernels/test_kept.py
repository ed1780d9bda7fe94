"""What the Triton backend makes of a layout is counted with it, dropped when it becomes too much, and freed with it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import s2attn
from s2attn import Local
from s2attn.backends.triton.walk import Walk
from s2attn.layout import build_layout


def trained(layout, batch: int = 1):
    q, k, v = (torch.randn(batch, 40, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    out = s2attn.attention(q, k, v, layout, backend="triton")
    return [out, *torch.autograd.grad(out.sum(), (q, k, v))]


@pytest.mark.usefixtures("triton_backend")
def test_walks_are_counted_and_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        layout = build_layout(Local(1, block=16), 2, 1, 40)
        before = layout.nbytes_held
        trained(layout)
        walks = [value for _, value in layout.derived.items() if isinstance(value, Walk)]
        assert len(walks) == 2 and layout.nbytes_held - before > sum(walk.groups.idx.nbytes for walk in walks)
        gone = [weakref.ref(layout), *(weakref.ref(walk) for walk in walks)]
        del layout, walks
        assert [one() for one in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.usefixtures("triton_backend")
def test_what_was_dropped_is_made_again():
    torch.manual_seed(0)
    layout = build_layout(Local(1, block=16), 2, 1, 40)
    expected = trained(layout)
    layout.derived.limit = 0
    layout.derive("more", lambda: torch.zeros(1))  # drops all others
    assert len(layout.derived) == 1
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(trained(layout), expected, strict=True))
