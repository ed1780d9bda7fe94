"""A GPU that is not there: Triton compiles for it as for a real one, and launches are written down instead of started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: its compiled form, its grid, its stream, and its arguments with tensors as addresses."""

    kernel: str
    compiled: int
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


@dataclass
class RecordingDriver:
    """Stands in for Triton's driver of an NVIDIA GPU.

    Attributes:
        arch: compute capability times ten.
        shared_limit: bytes of shared memory that one program can have.
        stream: the current one.
        keep: whether launches are written down.
        launches: what would have been started.
    """

    arch: int = 90
    shared_limit: int = 232448
    stream: int = 0
    keep: bool = True
    launches: list[Launch] = field(default_factory=list)

    @property
    def utils(self) -> RecordingDriver:
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_limit, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, id(binary), 0, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, told: Any, enter: Any, leave: Any, *rest: Any) -> None:
            if enter is not None:
                enter(told)
            if self.keep:
                addresses = tuple(arg.data_ptr() if hasattr(arg, "data_ptr") else arg for arg in rest)
                self.launches.append(Launch(metadata.name, function, (x, y, z), stream, addresses))
            if leave is not None:
                leave(told)

        return launch


@contextmanager
def recording(arch: int = 90, shared_limit: int = 232448) -> Iterator[RecordingDriver]:
    """Let Triton see such a GPU; needs a process in which Triton was not loaded as an interpreter."""
    from triton.runtime import driver

    before, made = driver._active, RecordingDriver(arch, shared_limit)
    driver.set_active(made)
    try:
        yield made
    finally:
        driver._active = before
