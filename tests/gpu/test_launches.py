"""Launches on a real device: streams, devices, graphs, compilations, and what a call costs the host."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch

import s2attn
from s2attn import Global, Local, Stride, Window, build_layout
from s2attn.backends import Scoring
from s2attn.backends.triton import Triton

PATTERN = Local(2) | Stride(3)
SCORING = Scoring(0.1)
HOST_MICROSECONDS = 20
"""What a warm forward call may take of the host."""


def made(device, dtype, n, batch=1, width=64):
    """q, k, v and dout."""
    return [torch.randn(batch, n, heads, width, device=device).to(dtype) for heads in (8, 2, 2, 8)]


def results(backend, x, layout):
    out, lse = backend.forward(*x[:3], layout, SCORING)
    return [out, lse, *backend.backward(x[3], None, *x[:3], out, lse, layout, SCORING)]


def same(a, b):
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def side_stream(device) -> tuple[AbstractContextManager, torch.cuda.Stream | None]:
    if device.type != "cuda":
        return nullcontext(), None
    stream = torch.cuda.Stream(device)
    return torch.cuda.stream(stream), stream


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def test_a_call_follows_its_stream(usual, device, sized, triton_backend):
    """The inputs arrive late on a side stream: a kernel on any other stream would read the old ones."""
    n = sized(2048, 70)
    layout = build_layout(PATTERN, 8, 2, n, device=device)
    x, later = made(device, usual, n), made(device, usual, n)
    expected = results(triton_backend, later, layout)
    assert not same(results(triton_backend, x, layout), expected)
    wait(device)
    within, stream = side_stream(device)
    with within:
        if stream is not None:
            torch.cuda._sleep(200_000_000)
        for old, new in zip(x, later, strict=True):
            old.copy_(new)
        got = results(triton_backend, x, layout)
    wait(device)
    assert same(got, expected)


def test_streams_side_by_side(usual, device, sized, triton_backend):
    n = sized(2048, 40)
    layout = build_layout(PATTERN, 8, 2, n, device=device)
    inputs = [made(device, usual, n) for _ in range(sized(6, 2))]
    expected = [results(triton_backend, x, layout) for x in inputs]
    wait(device)
    found = []
    for x in inputs:
        with side_stream(device)[0]:
            found.append(results(triton_backend, x, layout))
    wait(device)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_autograd_on_a_side_stream(usual, device, sized):
    q, k, v = (t.requires_grad_() for t in made(device, usual, sized(1024, 40))[:3])
    expected = torch.autograd.grad(s2attn.attention(q, k, v, PATTERN, backend="triton").sum(), (q, k, v))
    wait(device)
    with side_stream(device)[0]:
        got = torch.autograd.grad(s2attn.attention(q, k, v, PATTERN, backend="triton").sum(), (q, k, v))
    wait(device)
    assert same(got, expected)


def test_the_device_of_the_tensors_not_the_current_one(usual, two_devices, triton_backend):
    first, second = two_devices
    x = made(first, usual, 500)
    expected = results(triton_backend, x, build_layout(PATTERN, 8, 2, 500, device=first))
    with torch.cuda.device(first):
        for _ in range(2):  # the first call is analysed by Triton, the second repeated
            layout = build_layout(PATTERN, 8, 2, 500, device=second)
            got = results(triton_backend, [t.to(second) for t in x], layout)
            got = results(triton_backend, [t.to(second) for t in x], layout)
            assert same([t.to(first) for t in got], expected)
        assert torch.cuda.current_device() == first.index


def captured(device, run):
    """The results of a call inside a graph, and what starts it again; on a CPU simply the call."""
    if device.type != "cuda":
        static = run()

        def again():
            for old, new in zip(static, run(), strict=True):
                old.copy_(new)

        return static, again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = run()
    return static, graph.replay


def test_a_warm_call_can_be_captured_in_a_graph(usual, device, sized, triton_backend):
    n, pattern = sized(4096, 60), Global(sized(64, 8)) | Window(sized(256, 20))
    layout = build_layout(pattern, 8, 2, n, device=device, causal=False)
    x, later = made(device, usual, n), made(device, usual, n)
    expected = [results(triton_backend, given, layout) for given in (x, later)]
    wait(device)
    static, again = captured(device, lambda: results(triton_backend, x, layout))
    again()
    wait(device)
    assert same(static, expected[0])
    for old, new in zip(x, later, strict=True):
        old.copy_(new)
    again()
    wait(device)
    assert same(static, expected[1])


def compiled():
    """Compiled forms of all kernels; interpreted functions have none."""
    from s2attn.kernels import backward, forward, join

    kernels = [forward.forward_kernel, backward.delta_kernel, backward.dq_kernel, backward.dkv_kernel, join.merge_kernel, join.sum_kernel]
    return [sum(len(cache[0]) for cache in getattr(kernel, "device_caches", {}).values()) for kernel in kernels]


def test_one_compilation_serves_all_lengths_and_batches(usual, device, sized, triton_backend, record_property):
    counts = []
    for batch, n in sized([(1, 8192), (2, 333), (3, 64), (1, 1000), (1, 4097), (5, 17), (1, 32768)], [(1, 40), (2, 17)]):
        layout = build_layout(Global(64) | Window(100), 8, 2, n, device=device, causal=False)
        begin = time.perf_counter()
        results(triton_backend, made(device, usual, n, batch, width=sized(96, 16)), layout)
        wait(device)
        if not counts:
            record_property("first_call_seconds", round(time.perf_counter() - begin, 2))
        counts.append(compiled())
    assert counts[1:] == counts[:-1]


def host_microseconds(device, call, repeats):
    """The median over single calls; the device is waited for now and then, outside of what is timed."""
    times = []
    for number in range(repeats):
        if number % 25 == 0:
            wait(device)
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    wait(device)
    return round(median(times), 2)


def test_host_time_of_a_warm_call(usual, device, sized, record_property):
    n, repeats = sized(2048, 40), sized(1000, 2)
    backend, x = Triton(), made(device, usual, n, width=sized(128, 16))
    layout = build_layout(PATTERN, 8, 2, n, device=device)
    grad = [t.clone().requires_grad_() for t in x[:3]]
    out, lse = backend.forward(*x[:3], layout, SCORING)
    calls = {
        "forward": lambda: backend.forward(*x[:3], layout, SCORING),
        "backward": lambda: backend.backward(x[3], None, *x[:3], out, lse, layout, SCORING),
        "attention()": lambda: s2attn.attention(*x[:3], PATTERN, backend="triton"),
        "attention() of a layout": lambda: s2attn.attention(*x[:3], layout, backend="triton"),
        "attention() that records gradients": lambda: s2attn.attention(*grad, PATTERN, backend="triton"),
    }
    took = {}
    for name, call in calls.items():
        host_microseconds(device, call, min(repeats, 50))
        took[name] = host_microseconds(device, call, repeats)
        record_property(f"host microseconds of {name}", took[name])
    print("host microseconds of a warm call:", took)
    assert device.type != "cuda" or took["forward"] <= HOST_MICROSECONDS
