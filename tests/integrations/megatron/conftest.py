"""The tiny GPT as a module, and a world of one rank for the tests that need no more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

SCRIPT = Path(__file__).with_name("gpt.py")


@pytest.fixture(scope="session")
def gpt() -> ModuleType:
    """The helpers in gpt.py."""
    spec = spec_from_file_location("megatron_gpt", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(gpt: ModuleType) -> Iterator[None]:
    """One gloo rank with Megatron's groups, on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in gpt.STAND_INS:
            patch.setattr(owner, name, value)
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        gpt.start_model_parallel(1, 1)
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
