"""The backends that can run here, as fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from s2attn.backends import Backend, backend_names, get_backend


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
    """The registered backends; kernels run in Triton's interpreter, and where there is a GPU, tests/gpu runs them compiled."""
    interpreted = find_spec("triton") is not None and not torch.cuda.is_available()
    return {name: get_backend(name) for name in backend_names() if name != "triton" or interpreted}


def serves(backend: Backend, dtype: torch.dtype) -> bool:
    x = torch.zeros(1, 1, 1, 16, dtype=dtype)
    return not backend.objections(x, x, x)


_SERVING = serving()
_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
_PAIRS = {f"{name}-{dtype}": (made, dtype) for name, made in _SERVING.items() for dtype in _DTYPES if serves(made, dtype)}


@pytest.fixture(params=list(_SERVING))
def backend(request: pytest.FixtureRequest) -> Backend:
    return _SERVING[request.param]


@pytest.fixture(params=[name for name in _SERVING if name not in ("cpu", "triton")])
def plain_backend(request: pytest.FixtureRequest) -> Backend:
    """Those in plain torch, which compute in float64 too."""
    return _SERVING[request.param]


@pytest.fixture(params=[name for name in _SERVING if name != "triton"])
def masking_backend(request: pytest.FixtureRequest) -> Backend:
    """Those where a bad number touches no query that does not see it, even inside its blocks."""
    return _SERVING[request.param]


@pytest.fixture(params=list(_PAIRS))
def backend_and_dtype(request: pytest.FixtureRequest) -> tuple[Backend, torch.dtype]:
    """Every backend with every dtype that it serves."""
    return _PAIRS[request.param]


@pytest.fixture(params=[name for name in _SERVING if name not in ("reference", "triton")])
def sparse_backend(request: pytest.FixtureRequest) -> Backend:
    """Those that never touch what a layout does not list."""
    return _SERVING[request.param]
