"""Launches over a GPU that is not there, in a process that has not loaded Triton as an interpreter; prints one line of JSON.

`test_starts.py` runs it: ``python tests/launch/recorded.py <name of a function>``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from s2attn import Global, Layout, Local, Sink, Window, build_layout
from s2attn.backends import Pages, Requests, Scoring, Writes
from s2attn.backends.triton import Triton, start
from s2attn.backends.triton.backend import find_tiles
from s2attn.backends.triton.tiles import Tiles
from s2attn.backends.triton.walk import Walk
from tests.support.recording import Launch, RecordingDriver, recording

PATTERN = Global(64) | Window(100)  # not causal, so that both a row block and a column block have long lists
SCORING = Scoring(0.1)


def tensors(batch: int, tokens: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [torch.randn(batch, tokens, heads, 64).to(dtype) for heads in (4, 2, 2)]


def call(backend: Triton, x: list[Tensor], layout: Layout, dout: Tensor | None = None) -> None:
    """Forward, and backward when there is an output gradient."""
    out, lse = backend.forward(*x, layout, SCORING)
    if dout is not None:
        backend.backward(dout, None, *x, out, lse, layout, SCORING)


def compiled() -> dict[str, int]:
    """Compiled forms of each kernel."""
    from s2attn.kernels import backward, forward, join

    kernels = [forward.forward_kernel, backward.delta_kernel, backward.dq_kernel, backward.dkv_kernel, join.merge_kernel, join.sum_kernel]
    return {kernel.fn.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels}


@contextmanager
def same_memory() -> Iterator[Callable[[], None]]:
    """Fresh tensors come from a fixed list, from its begin whenever what is yielded is called: like calls get the same addresses."""
    made: list[Tensor] = []
    at = 0
    owners = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    plain = [getattr(owner, name) for owner, name in owners]

    def again() -> None:
        nonlocal at
        at = 0

    def reused(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        nonlocal at
        at += 1
        fresh = make(*args, **kwargs)
        if at > len(made):
            made.append(fresh)
        known = made[at - 1]
        return known if (known.shape, known.stride(), known.dtype) == (fresh.shape, fresh.stride(), fresh.dtype) else fresh

    for (owner, name), make in zip(owners, plain, strict=True):
        setattr(owner, name, lambda *args, _make=make, **kwargs: reused(_make, *args, **kwargs))
    try:
        yield again
    finally:
        for (owner, name), make in zip(owners, plain, strict=True):
            setattr(owner, name, make)


def taken(driver: RecordingDriver) -> list[Launch]:
    """The launches since the last time."""
    launches = list(driver.launches)
    driver.launches.clear()
    return launches


def lengths(driver: RecordingDriver) -> Any:
    """Compiled forms after calls of many lengths and batch sizes, packed ones last."""
    backend, counts = Triton(), []
    for batch, tokens in ((1, 2048), (2, 333), (3, 64), (1, 1000), (1, 4097), (5, 17)):
        x = tensors(batch, tokens)
        call(backend, x, build_layout(PATTERN, 4, 2, tokens, causal=False), torch.randn_like(x[0]))
        counts.append(compiled())
    x = tensors(1, 300)
    cu = torch.tensor([0, 99, 99, 300])
    call(backend, x, build_layout(PATTERN, 4, 2, cu_seqlens_q=cu, cu_seqlens_k=cu), torch.randn_like(x[0]))
    return [*counts, compiled()]


def arguments(driver: RecordingDriver) -> Any:
    """For several calls: what Triton's own launch passes, the first start, and a repeated one; all on another stream each."""
    found = []
    short, long = build_layout(Local(2), 4, 2, 200), build_layout(PATTERN, 4, 2, 4000, causal=False)
    for batch, tokens, layout in ((2, 200, short), (1, 4000, long)):
        backend, x = Triton(), tensors(batch, tokens)
        dout = torch.randn_like(x[0])
        ways = []
        with same_memory() as again:
            for way, plain in (("Triton's own", True), ("first", False), ("repeated", False), ("repeated", False)):
                again()
                driver.stream += 8
                alone = start._plain
                start._plain = (lambda kernel: True) if plain else alone
                call(backend, x, layout, dout)
                start._plain = alone
                ways.append((way, driver.stream, [(one.kernel, one.stream) for one in driver.launches], shown(taken(driver))))
        found.append(ways)
    return found


def paged(driver: RecordingDriver) -> Any:
    """Kernels of paged calls of many batches and caches with their compiled forms, for each way of cutting."""
    layout, found = build_layout(Local(2), 4, 2, 4096), {}
    for cut in ("direct", "split", "stream"):
        backend, names = Triton(lambda *given, cut=cut: replace(find_tiles(*given), cut=cut)), []
        for batch, pages in ((2, 40), (5, 17), (16, 64), (2, 40)):
            k, v = torch.zeros(2, pages, 16, 2, 64, dtype=torch.float16)
            where = Pages(k, v, torch.zeros(batch, 1, pages, dtype=torch.int32))
            requests = Requests(torch.full((batch,), 99, dtype=torch.int32), None)
            backend.forward_paged(torch.zeros(1, batch, 4, 64, dtype=torch.float16), where, requests, layout, SCORING)
            backend.store(Writes(*(torch.zeros(batch, 2, 64, dtype=torch.float16),) * 2, k, v, torch.arange(batch)))
            names.append([(one.kernel, one.compiled) for one in taken(driver)])
        found[cut] = names
    return found


def shown(launches: list[Launch]) -> list[Any]:
    return [[one.kernel, one.compiled, list(one.grid), [repr(part) for part in one.arguments]] for one in launches]


def hopper(driver: RecordingDriver) -> Any:
    """Hopper's kernels over several lengths, then as in `arguments`; compiled forms, grids, and what the four launches pass."""
    from s2attn.backends.triton import hopper, hopper_backward, ways
    from s2attn.kernels.hopper.dkv import hopper_dkv_kernel
    from s2attn.kernels.hopper.dq import hopper_dq_kernel
    from s2attn.kernels.hopper.forward import hopper_forward_kernel

    ways.can_take = lambda *given: True
    hopper.programs_of = hopper_backward.programs_of = lambda index: 132
    backend, grids = Triton(lambda *given: Tiles(64, 64, 4, 3, form="hopper")), []
    for batch, tokens in ((1, 2048), (2, 333), (3, 64), (1, 12000)):
        x = tensors(batch, tokens)
        call(backend, x, build_layout(Local(2), 4, 2, tokens), torch.randn_like(x[0]))
        grids.append({one.kernel: one.grid for one in taken(driver) if one.kernel.startswith("hopper")})
    made = [hopper_forward_kernel, hopper_dq_kernel, hopper_dkv_kernel]
    forms = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in made]
    backend, x, layout, passed = (
        Triton(lambda *given: Tiles(64, 64, 4, 3, form="hopper")),
        tensors(2, 200),
        build_layout(Local(2), 4, 2, 200),
        [],
    )
    dout = torch.randn_like(x[0])
    with same_memory() as again:
        for plain in (True, False, False, False):
            again()
            alone = start._plain
            start._plain = (lambda kernel: True) if plain else alone
            call(backend, x, layout, dout)
            start._plain = alone
            passed.append(shown(taken(driver)))
    return {"forms": forms, "grids": grids, "kernels": [one[0] for one in passed[0]], "same": all(one == passed[0] for one in passed)}


def ahead(driver: RecordingDriver) -> Any:
    """What `s2attn tune` compiles ahead for decoding, and what its small and its full problems compile beyond that; what they launch."""
    from s2attn.kernels.decode import count_kernel, decode_kernel, reduce_kernel
    from s2attn.tuning.benches import Bench
    from s2attn.tuning.candidates import compiled_ahead, small_target, targets

    kernels = (decode_kernel, count_kernel, reduce_kernel)
    forms = lambda: [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]  # noqa: E731
    (target,) = targets(dims=[64], blocks=[64], ops=["decode"], dtype="float16")[1:2]
    ((situation, tiles),) = compiled_ahead(target.situation, 232448)[1:2]
    small, counts = small_target(situation), []
    for bench in (
        Bench.hollow(small, torch.device("cpu")),
        Bench.random(small, torch.device("cpu")),
        Bench.hollow(target, torch.device("cpu")),
    ):
        for run in bench.calls(tiles).values():
            run()
        counts.append(forms())
    return {"cut": tiles.cut, "forms": counts, "launched": [one.kernel for one in taken(driver)]}


def unaligned(driver: RecordingDriver) -> Any:
    """Calls whose q begins 0, 1 and 0 elements after an aligned address: compiled forms, addresses, and what is kept of them."""
    x, layout, backend = tensors(1, 200), build_layout(Local(2), 4, 2, 200), Triton()
    room = torch.zeros(x[0].numel() + 8, dtype=x[0].dtype)
    found = []
    for offset in (1, 0, 1, 0):
        q = room[offset : offset + x[0].numel()].view(x[0].shape)
        call(backend, [q, *x[1:]], layout)
        one = taken(driver)[0]
        kept = sum(len(one.starts) for _, one in layout.derived.items() if isinstance(one, Walk))
        found.append({"offset": offset, "compiled": one.compiled, "address": one.arguments[0] == q.data_ptr(), "kept": kept})
    return found


def strides(driver: RecordingDriver) -> Any:
    """Tensors of the same shapes in another order of axes, in turn: their strides, and those that were passed."""
    x, layout, backend = tensors(2, 200), build_layout(Local(2), 4, 2, 200), Triton()
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    found = []
    for given in (x, turned, x, turned, [x[0], turned[1], x[2]]):
        call(backend, given, layout)
        numbers = [part for part in taken(driver)[0].arguments if isinstance(part, int)]
        wanted = [number for t in given for number in t.stride()]
        found.append(any(numbers[i : i + len(wanted)] == wanted for i in range(len(numbers))))
    return found


def hooks(driver: RecordingDriver) -> Any:
    """Kernel names that a profiler's hook is told of a first call and of a repeated one, and launches after it has gone."""
    from triton import knobs

    told: list[str] = []

    def watch(metadata: Any) -> None:
        told.append(metadata.get()["name"])

    x, layout, backend = tensors(1, 200), build_layout(Local(2), 4, 2, 200), Triton()
    knobs.runtime.launch_enter_hook.add(watch)
    for _ in range(2):
        call(backend, x, layout)
    knobs.runtime.launch_enter_hook.remove(watch)
    call(backend, x, layout)
    return [told, len(driver.launches)]


def host_time(driver: RecordingDriver) -> Any:
    """Microseconds of a warm forward call, repeated and through Triton's own launch, timed in turn; medians."""
    driver.keep = False
    backend, x = Triton(), tensors(1, 512)
    layout, alone = build_layout(Sink(64) | Window(100), 4, 2, 512), start._plain
    times: dict[bool, list[float]] = {False: [], True: []}
    for round_number in range(400):
        plain = bool(round_number % 2)
        start._plain = (lambda kernel: True) if plain else alone
        for _ in range(10):
            begin = time.perf_counter_ns()
            backend.forward(*x, layout, SCORING)
            times[plain].append((time.perf_counter_ns() - begin) / 1e3)
    start._plain = alone
    return {"repeated": median(times[False]), "own": median(times[True])}


if __name__ == "__main__":
    with recording() as shared:
        print(
            json.dumps(
                {f.__name__: f for f in (lengths, arguments, hopper, ahead, unaligned, paged, strides, hooks, host_time)}[sys.argv[1]](
                    shared
                )
            )
        )
