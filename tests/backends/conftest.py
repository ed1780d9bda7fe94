"""The backends that can run here, as fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from s2attn.backends import Backend, backend_names, get_backend
from s2attn.backends.portable import Portable
from s2attn.backends.portable.tile import StackTile


@pytest.fixture(autouse=True)
def _same_numbers_and_one_thread() -> Iterator[None]:
    """Problems here are too small for threads, which would only wait for each other."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(_same_numbers_and_one_thread: None) -> None:
    torch.set_num_threads(2)


def serving() -> dict[str, Backend]:
    """Backends in plain torch, and the portable one as it would run on another device. Kernels have a folder of their own."""
    registered = {name: get_backend(name) for name in backend_names() if name != "triton"}
    return registered | {"portable-stack": Portable(StackTile())}


_SERVING = serving()


@pytest.fixture(params=list(_SERVING))
def backend(request: pytest.FixtureRequest) -> Backend:
    return _SERVING[request.param]


@pytest.fixture(params=[name for name in _SERVING if name != "reference"])
def sparse_backend(request: pytest.FixtureRequest) -> Backend:
    """Those that never touch what a layout does not list."""
    return _SERVING[request.param]
