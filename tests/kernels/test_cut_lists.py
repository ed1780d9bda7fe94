"""Lists in several pieces: the same results as in one, the same bits every time, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2attn import Local, Sink, Stride, Window, build_layout
from s2attn.backends.base import Scoring
from s2attn.backends.triton import Triton, walk
from s2attn.backends.triton.backend import find_tiles
from tests.support import dense_mask
from tests.support.problems import check_backend, make_problem

PATTERNS = {
    "a sink that all read": (Sink(8) | Window(20), 16),
    "per query head": (Local(1, 16) | Stride(2, block=16, heads="query"), 32),
    "one list for all heads": (Window(90) | Sink(20), 64),
}


def tensors(n, batch):
    torch.manual_seed(0)
    return [torch.randn(batch, n, heads, 16) for heads in (2, 1, 1)]


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of 32 tokens, so that small problems have many."""
    monkeypatch.setattr(walk, "LEAST_TOKENS", 32)
    monkeypatch.setattr(walk, "piece_limits", lambda counts, seq, copies, least: torch.full((len(seq),), max(least, 1)).numpy())


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, True)])
def test_pieces_are_joined(name, softcap, sinks, triton_backend, poisoned_empty, short_pieces):
    pattern, block = PATTERNS[name]
    layout = build_layout(pattern, 4, 2, 150, block=block)
    shape = {"heads": 4, "kv_heads": 2, "batch": 2, "width": 16, "v_width": 32}
    scoring = {"softcap": softcap, "sinks": torch.randn(4) if sinks else None}
    check_backend(triton_backend, make_problem(layout, dense_mask(pattern, 4, 2, 150, 150), **shape, **scoring))
    assert all(way.slots > 0 for way in triton_backend.ways(layout))


def test_ranges_of_keys(triton_backend, poisoned_empty):
    backend = Triton(lambda *given: replace(find_tiles(*given), key_range=64))
    pattern = Local(2, 16) | Stride(3, block=16)
    layout = build_layout(pattern, 2, 1, 150, block=16)
    mask = dense_mask(pattern, 2, 1, 150, 150)
    check_backend(backend, make_problem(layout, mask, heads=2, kv_heads=1, width=16, sinks=torch.randn(2)))
    assert any(way.slots > 4 for way in backend.ways(layout))


def test_the_same_bits_every_time_and_in_any_batch(triton_backend, short_pieces):
    pattern = Sink(8) | Window(20)
    q, k, v = tensors(100, 2)
    dout = torch.randn_like(q)

    def results(entries, layout):
        x = [t[entries] for t in (q, k, v)]
        out, lse = triton_backend.forward(*x, layout, Scoring(0.25))
        return [out, lse, *triton_backend.backward(dout[entries], None, *x, out, lse, layout, Scoring(0.25))]

    layout = build_layout(pattern, 2, 1, 100, block=16)
    both, again = results(slice(0, 2), layout), results(slice(0, 2), layout)
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    second = results(slice(1, 2), layout)
    assert all(torch.equal(a[1:], b) for a, b in zip(both, second, strict=True))


def test_a_packed_sequence_has_the_bits_that_it_has_alone(triton_backend):
    """A long sink column beside a short sequence: what is cut depends on each sequence alone."""
    pattern = Sink(8) | Window(20)
    q, k, v = tensors(180, 1)
    dout, scoring = torch.randn_like(q), Scoring(0.25)

    def results(x, d, **sizes):
        layout = build_layout(pattern, 2, 1, block=16, **sizes)
        out, lse = triton_backend.forward(*x, layout, scoring)
        return [out, lse, *triton_backend.backward(d, None, *x, out, lse, layout, scoring)]

    cu = torch.tensor([0, 130, 180])
    packed = results((q, k, v), dout, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for lo, hi in ((0, 130), (130, 180)):
        alone = results([t[:, lo:hi] for t in (q, k, v)], dout[:, lo:hi], seqlen_q=hi - lo)
        for index, (whole, part) in enumerate(zip(packed, alone, strict=True)):
            assert torch.equal(whole[:, :, lo:hi] if index == 1 else whole[:, lo:hi], part)
