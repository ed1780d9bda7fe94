"""What is derived from layouts is counted, bounded, and freed with them, without the cycle collector."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import s2attn
from s2attn import Local, Stride, Window
from s2attn.layout import Layout, build_layout, from_blocks
from s2attn.layout.derived import Derived, storages_of
from s2attn.ops import forget_layouts, layout_bytes, source

S2 = Local(1, block=16) | Stride(4, block=16)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Only reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def built() -> Layout:
    return build_layout(S2, num_heads=4, num_kv_heads=2, seqlen_q=300, block=16)


def test_a_value_is_derived_once_and_counted():
    layout = built()
    before, asked = layout.nbytes_held, []

    def make():
        asked.append(1)
        return {"a": [torch.zeros(100), np.zeros(3)], "b": layout.rows.idx[1:]}

    value = layout.derive(("mine", 1), make)
    assert layout.derive(("mine", 1), make) is value and len(asked) == 1
    assert layout.nbytes_held - before == 424  # rows.idx is the layout's own
    assert layout.derive(("mine", 2), make) is not value and layout.nbytes_held - before == 848


def test_everything_that_a_layout_holds_is_counted():
    layout = built()
    own = [*layout.rows.tensors(), layout.tiles, *layout.q_spans.tensors(), *layout.k_spans.tensors()]
    assert layout.nbytes_held == sum(t.nbytes for t in own)
    columns, pairs = layout.columns, layout.pairs
    assert layout.nbytes_held == sum(t.nbytes for t in [*own, *columns.tensors(), pairs])


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (torch.zeros(8)[2:4], 32),
        (np.zeros(8)[2:4], 64),
        ([x := torch.zeros(4), x[1:], {"again": x}], 16),
        (bytearray(9), 9),
        (None, 0),
        (torch.zeros(8, device="meta"), 0),
    ],
)
def test_memory_is_counted_once(value, nbytes):
    assert sum(storages_of(value).values()) == nbytes


def test_the_least_recently_used_values_are_dropped():
    kept = Derived([], 0)
    kept.limit = 1000
    for key in range(3):
        kept.get(key, lambda: torch.zeros(100))
    assert [key for key in range(3) if key in kept] == [1, 2] and kept.nbytes == 800
    kept.get(1, lambda: None)
    kept.get(3, lambda: torch.zeros(100))
    assert [key for key in range(4) if key in kept] == [1, 3]
    kept.get(4, lambda: torch.zeros(1000))  # larger than the limit: kept alone
    assert len(kept) == 1 and kept.nbytes == 4000


def test_shared_memory_is_charged_until_its_last_value_is_dropped():
    kept, shared = Derived([], 0), torch.zeros(100)
    kept.get("a", lambda: [shared])
    kept.get("b", lambda: [shared, torch.zeros(10)])
    assert kept.nbytes == 440
    kept.limit = 500
    kept.get("c", lambda: torch.zeros(50))  # dropping "a" frees nothing
    assert "a" not in kept and "b" not in kept and kept.nbytes == 200


def test_pinned_values_stay():
    kept = Derived([], 0)
    kept.limit = 100
    kept.get("first", lambda: torch.zeros(100))
    kept.pin()
    kept.get("second", lambda: torch.zeros(100))
    assert "first" in kept and kept.nbytes == 800


def test_layouts_are_freed_by_reference_count(without_collector):
    mask = torch.rand(2, 4, 4) > 0.5
    made = {
        "pattern": built(),
        "moved": built().to("cpu"),
        "dense": Layout.from_dense(torch.ones(40, 40, dtype=torch.bool).tril()).validate(),
        "blocks": from_blocks([mask], [(64, 64)], block=16),
        "tensors": Layout.from_tensors([t.clone() for t in built().tensors()], causal=True, packed=False).checked,
    }
    q, k, v = (torch.randn(1, 300, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    s2attn.attention(q, k, v, made["pattern"]).sum().backward()
    for layout in made.values():
        assert layout.columns is layout.columns and layout.checked is layout
    gone = {name: weakref.ref(layout) for name, layout in made.items()}
    del layout
    made.clear()
    assert [name for name, one in gone.items() if one() is not None] == []


def test_the_cache_frees_what_it_drops(without_collector, monkeypatch):
    forget_layouts()
    monkeypatch.setattr(source, "_KEEP_LAYOUTS", 4)
    alive = weakref.WeakSet()
    for seqlen in range(100, 120):
        q, k, v = (torch.randn(1, seqlen, 1, 16, requires_grad=True) for _ in range(3))
        s2attn.attention(q, k, v, Window(9)).sum().backward()
        alive.update(source._layouts.values())
    assert len(source._layouts) == 4 and len(alive) == 4


def test_the_cache_counts_what_backends_derive(monkeypatch):
    """13 packed batches once held 55.9 MiB where 1.58 were counted."""
    forget_layouts()
    assert layout_bytes() == 0
    cu = torch.tensor([0, 100, 300])
    q, k, v = (torch.randn(300, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    s2attn.attention(q, k, v, S2, cu_seqlens_q=cu, cu_seqlens_k=cu).sum().backward()
    (layout,) = source._layouts.values()
    layout.derive(("a backend", "plan"), lambda: torch.zeros(10_000))
    held = {key: sum(memory.values()) for key, (_, memory) in layout.derived._values.items()}
    assert layout_bytes() == layout.nbytes_held >= layout.nbytes + 40_000
    assert sum(held.values()) >= layout.nbytes_held - layout.nbytes  # memory that two values share counts once
    monkeypatch.setattr(source, "_KEEP_BYTES", layout_bytes())
    s2attn.attention(q, k, v, Window(7), cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert layout not in source._layouts.values()


def test_growth_alone_drops_old_layouts(monkeypatch):
    """What is derived after a layout was cached counts too."""
    forget_layouts()
    sizes = source.CallSizes(64, 1, 64, 1, torch.device("cpu"))
    _old, new = (source.layout_of(source.pattern_text(Window(n), None, True, 0, None), sizes) for n in (3, 5))
    monkeypatch.setattr(source, "_KEEP_BYTES", layout_bytes() + 100)
    new.derive("large", lambda: torch.zeros(1000))
    assert list(source._layouts.values()) == [new]


def test_plans_of_many_batch_sizes_are_bounded(monkeypatch):
    """401 MiB were once held for a layout of 0.11 MiB over batches 1 to 32."""
    layout = built()
    layout.derived.limit = 500_000
    for batch in range(1, 33):
        plan = layout.derive(("a backend", batch), lambda batch=batch: torch.zeros(batch, 2_000))
        assert plan.shape[0] == batch and 0 < layout.derived.nbytes <= 500_000
    assert ("a backend", 32) in layout.derived and ("a backend", 1) not in layout.derived


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_derive_anew(copied):
    layout = built()
    assert layout.columns is not None
    other = copied(layout)
    assert "columns" not in other.derived and torch.equal(other.columns.idx, layout.columns.idx)
    assert torch.equal(other.to_dense(), layout.to_dense())
