"""Time, memory and facts of a CUDA device: events, a flushed cache, and graphs for calls too short for the host to launch in time."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from typing import Any

import torch

from s2attn.tuning.clock import Armed, Call, Meter

GRAPH_BELOW_S = 1e-3
FLUSHES = 4


class CudaMeter(Meter):
    """Event timing on the current CUDA device.

    Before every timed call a buffer several times the size of the L2 cache is written some times over: the call finds nothing of its own
    there, and the host has a head start, so that an event does not time the launch.
    """

    device = "cuda"

    def __init__(self) -> None:
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        self.buffer = torch.empty(max(256 << 20, 4 * cache), dtype=torch.int8, device="cuda")

    def sync(self) -> None:
        torch.cuda.synchronize()

    def tidy(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def flush(self) -> None:
        for _ in range(FLUSHES):
            self.buffer.zero_()

    def seconds(self, call: Call) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def arm(self, call: Call, start: Call, graph: bool | None = None) -> Armed:
        self.begin(start)
        if graph is False or (graph is None and self._long(call)):
            return Armed(call, "events")
        try:
            return Armed(self._graph(call, start), "graph")
        except Exception as error:  # a call that cannot be captured is timed with its launch, and its row says so
            self.sync()
            self.begin(start)
            first = next(iter(str(error).splitlines()), "")
            return Armed(call, "events", f"no CUDA graph ({type(error).__name__}: {first}), so host time may be in it"[:300])

    def _long(self, call: Call) -> bool:
        return self.seconds(call) >= 5 * GRAPH_BELOW_S or statistics.median(self.seconds(call) for _ in range(3)) >= GRAPH_BELOW_S

    def _graph(self, call: Call, start: Call) -> Call:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # A backward pass runs on the stream of its forward pass, so that has to be the stream of the capture.
            self.begin(start)
            for _ in range(3):
                call()
        current.wait_stream(stream)
        self.sync()
        graph, kept = torch.cuda.CUDAGraph(), list[object]()
        with torch.cuda.graph(graph, stream=stream):
            kept.append(call())

        def replay() -> list[object]:
            graph.replay()
            return kept  # held as long as the graph, which writes there

        replay()
        self.sync()
        return replay

    def host_seconds(self, call: Call, repeats: int = 21, budget_s: float = 0.2) -> float | None:
        taken, first = [], time.perf_counter()
        while len(taken) < repeats and time.perf_counter() - first < budget_s:
            self.sync()
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
            self.sync()
        return statistics.median(taken)

    def peak_bytes(self, call: Call) -> int | None:
        gc.collect()
        self.sync()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.sync()
        return torch.cuda.max_memory_allocated() - before

    def allocated_bytes(self) -> int | None:
        return torch.cuda.memory_allocated()

    def free_bytes(self) -> int | None:
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def cuda_facts() -> dict[str, Any]:
    """The device, its driver and libraries, and what it was seen to do: a copy's bandwidth and a matrix product's rate."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **_ceilings_or_why(),
    }


def _driver() -> str | None:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def _ceilings_or_why() -> dict[str, Any]:
    try:
        return _ceilings()
    except RuntimeError as error:  # a card too small for them can still be measured
        return {"ceilings_failed": str(error).splitlines()[0][:200]}
    finally:
        torch.cuda.empty_cache()


def _ceilings(size: int = 8192) -> dict[str, float]:
    """A large bf16 product in TFLOP/s, and a large copy in GB/s (bytes read and written): the median of ten calls each."""
    meter = CudaMeter()
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    found = {}
    for name, call, work in (
        ("matmul_tflops", lambda: a @ b, 2 * size**3 / 1e12),
        ("copy_gbps", lambda: target.copy_(source), 2 * source.numel() * source.element_size() / 1e9),
    ):
        for _ in range(3):
            call()
        found[name] = work / statistics.median(meter.seconds(call) for _ in range(10))
    return found
