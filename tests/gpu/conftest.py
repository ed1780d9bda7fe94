"""These tests need a GPU. Without one they are left out, or run tiny in Triton's interpreter, which proves their own code.

``S2ATTN_GPU_TESTS_ON_CPU=1`` asks for the latter. ``S2ATTN_GPU_RECORD`` names a file to which every result is appended at once, so that
what was measured survives a run that is stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2attn.backends.triton import Triton, walk
from s2attn.backends.triton.backend import find_tiles

FOLDER = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
ON_CPU = not ON_GPU and os.environ.get("S2ATTN_GPU_TESTS_ON_CPU") == "1"


class Record:
    """Appends the result of every test to a file."""

    def __init__(self, path: str):
        self.path = Path(path)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        file, _, test = report.nodeid.partition("::")
        row = {"file": Path(file).name, "test": test, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        row |= {"why": why[-3000:], "measured": dict(report.user_properties)}
        with self.path.open("a") as out:
            out.write(json.dumps(row) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    path = os.environ.get("S2ATTN_GPU_RECORD")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(path))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here, before the project's own conftest leaves out what is marked; alone, this file says why."""
    for item in items:
        if FOLDER not in item.path.parents:
            continue
        if ON_CPU:
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"))
        else:
            item.add_marker("gpu")
            if not ON_GPU:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    """The same random state before every test, and memory given back after it."""
    torch.manual_seed(0)
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu", 0 if ON_GPU else None)


@pytest.fixture
def sized() -> Callable[[Any, Any], Any]:
    """Takes a size for a GPU and a tiny one for the interpreter."""
    return lambda large, tiny: large if ON_GPU else tiny


@pytest.fixture
def triton_backend() -> Triton:
    return Triton()


@pytest.fixture
def special(device: torch.device) -> Triton:
    """The backend with warp-specialised kernels wherever they can serve."""
    if ON_GPU and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("warps are specialised on Hopper alone")
    return Triton(lambda *given: replace(find_tiles(*given), form="specialised"))


@pytest.fixture
def hopper(device: torch.device) -> Iterator[Triton]:
    """The backend with Hopper's Gluon kernels wherever there is one that can serve; no interpreter has them, but our own runner."""
    if not ON_GPU:
        from tests.support.gluon.launches import hopper_on_cpu

        with hopper_on_cpu() as backend:
            yield backend
        return
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("kernels for Hopper alone")
    yield Triton(lambda *given: replace(find_tiles(*given), form="hopper"))


@pytest.fixture(params=["bf16", "fp16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == "bf16" and not ON_GPU:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[request.param]


@pytest.fixture
def usual() -> torch.dtype:
    """The 16-bit type that is used most; the interpreter has only the other one."""
    return torch.bfloat16 if ON_GPU else torch.float16


@pytest.fixture
def room() -> Callable[[float], None]:
    """Leaves a test out when the GPU has not so many GiB."""

    def needed(gibibytes: float) -> None:
        if ON_GPU and torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
            pytest.skip(f"needs {gibibytes} GiB of GPU memory")

    return needed


@pytest.fixture
def two_devices() -> list[torch.device]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture
def cut_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU lists are long enough to be cut; in the interpreter pieces of 32 tokens make tiny problems have many."""
    if not ON_GPU:
        monkeypatch.setattr(walk, "LEAST_TOKENS", 32)
        monkeypatch.setattr(walk, "piece_limits", lambda counts, seq, copies, least: torch.full((len(seq),), max(least, 1)).numpy())
