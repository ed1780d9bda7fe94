"""What is particular to the C++ kernels: threads, processes, broken numbers, records."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from s2attn import Dense, Local, Stride, Window
from s2attn.backends import get_backend
from s2attn.backends.base import Reduction
from s2attn.backends.cpu import library
from s2attn.layout import build_layout
from s2attn.testing.problems import make_problem, random_problem, run

NAMES = ("out", "lse", "dq", "dk", "dv")
CPU = get_backend("cpu")


def in_new_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("heads", [(4, 2, 2), (1, 1, 1), (6, 1, 6)], ids=str)
def test_the_same_bits_for_any_number_of_threads(heads: tuple[int, int, int]) -> None:
    """Strips get shorter with more threads, and gradients are added by whoever computes them."""
    p = random_problem(*heads, 700, 700, 32, causal=True, width=24).to(torch.float32)
    q, k = torch.randn(2, 300, 4, 16), torch.randn(2, 300, 2, 16)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        mass = CPU.antidiagonal(q, k, Reduction(4, 32, True, 0.25))
        results.append([*(getattr(run(CPU, p), name) for name in NAMES), mass])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_columns_are_cut_into_segments() -> None:
    """Every row lists the first block: more entries than one segment takes."""
    layout = build_layout(Local(1, 16) | Stride(100, block=16), 2, 1, seqlen_q=1200, block=16)
    assert int(layout.columns.counts.max()) > 64
    p = make_problem(layout, layout.to_dense(), heads=2, kv_heads=1, width=16).to(torch.float32)
    torch.set_num_threads(3)
    got, expected = run(CPU, p), run(get_backend("reference"), p)
    for name in NAMES:
        pair = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(*pair, atol=2e-5, rtol=2e-5)


def test_calls_from_several_threads_at_once() -> None:
    code = """
import threading, torch
from s2attn.backends import get_backend
from s2attn.testing.problems import random_problem, run
torch.manual_seed(0)
torch.set_num_threads(3)
p = random_problem(4, 2, 2, 300, 300, 32, causal=True).to(torch.float32)
expected = run(get_backend("cpu"), p)
wrong = []
def call():
    for _ in range(20):
        got = run(get_backend("cpu"), p)
        pairs = [(getattr(got, n), getattr(expected, n)) for n in ("out", "dq", "dk")]
        wrong.extend(i for i, pair in enumerate(pairs) if not torch.equal(*pair))
threads = [threading.Thread(target=call) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
print(wrong)
"""
    assert in_new_process(code) == "[]"


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    """Of torch's own operations it may use none that wake OpenMP's threads."""
    code = """
import os, torch
from s2attn.backends import get_backend
from s2attn.testing.problems import random_problem, run
torch.set_num_threads(3)
p = random_problem(4, 2, 2, 300, 300, 32, causal=True).to(torch.float32)
expected = get_backend("cpu").forward(*p.arguments)[0].numpy().tobytes()
child = os.fork()
if child == 0:
    again = get_backend("cpu").forward(*p.arguments)
    os._exit(0 if again[0].numpy().tobytes() == expected else 1)
print(os.waitpid(child, 0)[1])
"""
    assert in_new_process(code) == "0"


def test_nothing_of_the_caller_changes() -> None:
    code = """
import os, signal, torch
from s2attn.backends import get_backend
from s2attn.testing.problems import random_problem, run
torch.set_num_threads(2)
p = random_problem(4, 2, 2, 100, 100, 32).to(torch.float32)
def state():
    return (
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        dict(os.environ),
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
        torch.get_default_dtype(),
        torch.random.get_rng_state().tolist(),
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
    )
before = state()
run(get_backend("cpu"), p)
print(state() == before)
"""
    assert in_new_process(code) == "True"


def test_a_query_that_sees_nan_adds_nothing_to_keys() -> None:
    p = random_problem(2, 2, 2, 100, 100, 32, causal=True).to(torch.float32)
    k = p.k.clone()
    k[:, 60] = torch.nan
    out, lse = CPU.forward(p.q, k, p.v, p.layout, p.scoring)
    dq, dk, dv = CPU.backward(p.dout, p.dlse, p.q, k, p.v, out, lse, p.layout, p.scoring)
    seen = p.mask[:, :, 60].t()[None]
    assert out[seen].isnan().all() and dq[seen].isnan().all()
    assert out[~seen].isfinite().all() and dq[~seen].isfinite().all()
    assert dk.isfinite().all() and dv.isfinite().all()


def test_a_gradient_of_nan_reaches_the_keys_that_its_query_sees() -> None:
    p = random_problem(2, 2, 2, 100, 100, 32, causal=True).to(torch.float32)
    dout = p.dout.clone()
    dout[:, 70] = torch.nan
    out, lse = CPU.forward(*p.arguments)
    dq, dk, dv = CPU.backward(dout, None, p.q, p.k, p.v, out, lse, p.layout, p.scoring)
    seen = p.mask[:, 70].t()[None]
    assert dk[seen].isnan().all() and dv[seen].isnan().all()
    assert dk[~seen].isfinite().all() and dv[~seen].isfinite().all()
    others = torch.arange(100) != 70
    assert dq[:, others].isfinite().all()


def test_a_large_sink_does_not_hide_nan() -> None:
    sinks = torch.tensor([300.0, 0.0])
    p = random_problem(2, 2, 2, 100, 100, 32, causal=True, sinks=sinks).to(torch.float32)
    k = p.k.clone()
    k[:, 60] = torch.nan
    out, _ = CPU.forward(p.q, k, p.v, p.layout, p.scoring)
    seen = p.mask[:, :, 60].t()[None]
    assert out[seen].isnan().all() and out[~seen].isfinite().all()


def test_numbers_near_the_largest_one_stay_masked() -> None:
    """Products with them overflow: a query that does not see them is not touched."""
    layout = build_layout(Window(20), 2, seqlen_q=100, block=32)
    p = make_problem(layout, layout.to_dense(), heads=2, kv_heads=2).to(torch.float32)
    clean, k, v = run(CPU, p), p.k.clone(), p.v.clone()
    k[:, 50], v[:, 50] = 3e38, 3e38
    dirty = run(CPU, replace(p, k=k, v=v))
    unseen = ~p.mask[:, :, 50].t()[None]
    assert torch.equal(dirty.out[unseen], clean.out[unseen])
    assert torch.equal(dirty.dq[unseen], clean.dq[unseen])


@pytest.mark.parametrize("size", [1e18, 3e18])
def test_logits_far_below_zero(size: float) -> None:
    """All logits of a row lie below -1e30: no finite number stands for minus infinity."""
    layout = build_layout(Dense(), 1, seqlen_q=70, block=32)
    p = make_problem(layout, layout.to_dense(), heads=1, kv_heads=1, width=16).to(torch.float32)
    q = torch.full_like(p.q, size)
    k = torch.full_like(p.k, -size)
    out, lse = CPU.forward(q, k, p.v, p.layout, p.scoring)
    expected = p.v[0, :, 0].cumsum(0) / torch.arange(1, 71)[:, None]
    torch.testing.assert_close(out[0, :, 0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, torch.full_like(lse, -4 * size * size))


def test_low_precision_is_rounded_once() -> None:
    """float32 inside: the result is the float32 result of the same inputs, rounded."""
    p = random_problem(4, 2, 2, 130, 130, 32, causal=True).to(torch.float16)
    out, lse = CPU.forward(*p.arguments)
    wide, wide_lse = CPU.forward(p.q.float(), p.k.float(), p.v.float(), p.layout, p.scoring)
    assert torch.equal(out, wide.half()) and torch.equal(lse, wide_lse)


def test_an_index_is_made_once_and_dies_with_its_layout() -> None:
    p = random_problem(2, 1, 1, 100, 100, 32).to(torch.float32)
    run(CPU, p)
    index = library.layout_index(p.layout)
    assert library.layout_index(p.layout) is index
    alive = weakref.ref(index)
    del p, index
    gc.collect()
    assert alive() is None


def test_records_have_the_sizes_of_the_library() -> None:
    """ctypes does not compare them: a field that is missing on one side shifts all others."""
    sizes = library.record_sizes()
    assert sizes and all(ours == theirs for ours, theirs in sizes.values()), sizes
