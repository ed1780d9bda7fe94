"""Long lists in several pieces, and lists cut by ranges of keys: right, and the same bits every time, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2attn import Global, Local, Sink, Stride, Window, build_layout
from s2attn.backends import Scoring
from s2attn.backends.triton import Triton
from s2attn.backends.triton.backend import find_tiles
from tests.support import dense_mask
from tests.support.problems import check_backend, make_problem


def slots(backend, layout):
    """Pieces of cut lists, of rows and of columns."""
    return {"columns" if way.op == "dkv" else "rows": way.slots for way in backend.ways(layout)}


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (20.0, True)], ids=["plain", "soft-cap and sinks"])
def test_sink_columns(softcap, sinks, dtype, device, sized, triton_backend, poisoned_empty, cut_lists):
    n, pattern = sized(8200, 150), Sink(sized(64, 8)) | Window(sized(256, 20))
    problem = make_problem(
        build_layout(pattern, 2, 1, n, block=sized(64, 16)), dense_mask(pattern, 2, 1, n, n), heads=2, kv_heads=1, width=sized(64, 16),
        softcap=softcap, sinks=torch.randn(2) if sinks else None,
    ).on(device)  # fmt: skip
    check_backend(triton_backend, problem, dtype)
    assert slots(triton_backend, problem.layout)["columns"] > 0


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (20.0, True)], ids=["plain", "soft-cap and sinks"])
def test_long_rows_and_columns(softcap, sinks, dtype, device, sized, triton_backend, poisoned_empty, cut_lists):
    n, pattern = sized(8200, 130), Global(sized(70, 8)) | Window(sized(256, 20))
    layout = build_layout(pattern, 2, 1, n, block=sized(64, 16), causal=False)
    problem = make_problem(
        layout, dense_mask(pattern, 2, 1, n, n, causal=False), heads=2, kv_heads=1, width=sized(128, 16), v_width=sized(80, 32),
        softcap=softcap, sinks=torch.randn(2) if sinks else None,
    ).on(device)  # fmt: skip
    check_backend(triton_backend, problem, dtype)
    found = slots(triton_backend, problem.layout)
    assert found["rows"] > 0 and found["columns"] > 0


@pytest.mark.parametrize("block", [16, 64, 128])
def test_ranges_of_keys(block, dtype, device, sized, poisoned_empty):
    backend, block = Triton(lambda *given: replace(find_tiles(*given), key_range=sized(1024, 64))), sized(block, 16)
    n, pattern = sized(3000, 150), Local(2, block) | Stride(3, block=block)
    mask = dense_mask(pattern, 2, 1, n, n)
    layout = build_layout(pattern, 2, 1, n, block=block)
    problem = make_problem(layout, mask, heads=2, kv_heads=1, width=sized(64, 16), sinks=torch.randn(2)).on(device)
    check_backend(backend, problem, dtype)
    assert slots(backend, problem.layout)["rows"] > 4


def everything(backend, x, dout, layout):
    out, lse = backend.forward(*x, layout, Scoring(0.1))
    return [out, lse, *backend.backward(dout, None, *x, out, lse, layout, Scoring(0.1))]


def made(device, dtype, batch, n, width):
    x = [torch.randn(batch, n, heads, width, device=device).to(dtype) for heads in (8, 2, 2)]
    return x, torch.randn_like(x[0])


def test_the_same_bits_every_time(usual, device, sized, triton_backend, cut_lists):
    n, pattern = sized(8192, 100), Sink(sized(64, 8)) | Window(sized(256, 20))
    x, dout = made(device, usual, 1, n, sized(128, 16))
    layout = build_layout(pattern, 8, 2, n, block=sized(64, 16), device=device)
    first = everything(triton_backend, x, dout, layout)
    assert slots(triton_backend, layout)["columns"] > 0
    for _ in range(sized(20, 1)):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(triton_backend, x, dout, layout), strict=True))


def test_the_same_bits_in_any_batch(usual, device, sized, triton_backend, cut_lists):
    n, pattern = sized(8192, 60), Sink(sized(64, 8)) | Window(sized(256, 20))
    x, dout = made(device, usual, 3, n, sized(64, 16))
    layout = build_layout(pattern, 8, 2, n, block=sized(64, 16), device=device)
    whole = everything(triton_backend, x, dout, layout)
    for entry in range(3):
        alone = everything(triton_backend, [t[entry : entry + 1] for t in x], dout[entry : entry + 1], layout)
        assert all(torch.equal(a[entry : entry + 1], b) for a, b in zip(whole, alone, strict=True))


def test_a_packed_sequence_has_the_bits_that_it_has_alone(usual, device, sized, triton_backend):
    pattern, lengths = Sink(sized(64, 8)) | Window(sized(256, 20)), sized([8192, 50, 3000], [70, 20, 40])
    n, block = sum(lengths), sized(64, 16)
    x, dout = made(device, usual, 1, n, sized(64, 16))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = everything(triton_backend, x, dout, build_layout(pattern, 8, 2, block=block, cu_seqlens_q=cu, cu_seqlens_k=cu, device=device))
    for lo, hi in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        layout = build_layout(pattern, 8, 2, hi - lo, block=block, device=device)
        alone = everything(triton_backend, [t[:, lo:hi] for t in x], dout[:, lo:hi], layout)
        for index, (whole, part) in enumerate(zip(packed, alone, strict=True)):
            assert torch.equal(whole[:, :, lo:hi] if index == 1 else whole[:, lo:hi], part)
