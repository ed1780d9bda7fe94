"""Calls that a CUDA graph holds, as far as a machine without a GPU can tell."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import s2attn
from s2attn import Local
from s2attn.layout import Layout
from s2attn.ops import looks, paged, source
from s2attn.ops.source import forget_layouts


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("captured", [True, False])
def test_what_a_graph_points_to_is_kept(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layouts other calls have made since: a graph that is replayed reads the lists of its own."""
    made: list[weakref.ref[Layout]] = []
    build = paged.layout_by_position

    def watched(*asked: object) -> Layout:
        layout = build(*asked)
        made.append(weakref.ref(layout))
        return layout

    monkeypatch.setattr(paged, "layout_by_position", watched)
    monkeypatch.setattr(source, "_captured", set())
    for module in (looks, source):
        monkeypatch.setattr(module, "is_captured", lambda *tensors: captured)
    q, pages = torch.randn(1, 1, 2, 16), torch.randn(4, 16, 1, 16)
    where = {"block_table": torch.arange(4)[None], "seq_lens": torch.tensor([50])}
    s2attn.decode(q, pages, pages, Local(1, block=16), **where, backend="triton", validate=False)
    forget_layouts()
    gc.collect()
    assert [layout() is not None for layout in made] == [captured]
    if captured:  # nothing that kernels read of it is dropped either, whatever else is derived
        (layout,) = source._captured
        held = len(layout.derived)
        layout.derived.limit = 0
        layout.derive("more", lambda: torch.zeros(9))
        assert len(layout.derived) == held + 1
