"""Without a GPU the kernels run in Triton's interpreter, which the tests' own conftest switches on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def triton_backend():
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: tests/gpu runs the compiled kernels")
    from s2attn.backends.triton import Triton

    return Triton()
