"""Starting kernels: Triton analyses and compiles a call once; what is known of it afterwards is kept, and repeated with new addresses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes that Triton assumes of a pointer when it compiles for aligned ones."""


@dataclass(frozen=True)
class Call:
    """What follows the pointers that change from call to call: everything here depends on shapes, strides and the layout alone.

    Attributes:
        grid: programs by axis.
        rest: tensors of the layout, numbers and strides, in the kernel's order.
        constants: compile-time numbers and compiler options by name, in the kernel's order.
    """

    grid: tuple[int, int, int]
    rest: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class _Known:
    compiled: Any
    grid: tuple[int, int, int]
    rest: tuple[Any, ...]


Starts = dict[tuple, _Known]
"""Calls that were made before; it belongs to the object that keeps their layout's tensors alive."""

KEPT_STARTS = 1024
"""Calls come in any number of shapes: beyond so many, all are forgotten."""


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the device of their tensors, whichever is current."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def start(kernel: Any, pointers: tuple[Tensor, ...], starts: Starts, key: tuple, describe: Callable[[], Call]) -> Any:
    """Start ``kernel`` on the current stream of the tensors' device, which is current.

    Args:
        pointers: the tensors that come first among the kernel's arguments and may be others in every call.
        key: names the kernel and all that ``describe`` depends on.
        describe: the rest of the call; asked only when the key is new, or a pointer is not aligned.

    Returns:
        the compiled kernel where Triton was asked for it, None where it was known.

    Tensors on the meta device have no memory to work on: the kernel is compiled for such a call, and not started.
    """
    if pointers[0].is_meta:
        call = describe()
        return kernel.warmup(*pointers, *call.rest, grid=call.grid, **call.constants)
    if _plain(kernel):
        call = describe()
        return kernel[call.grid](*pointers, *call.rest, **call.constants)
    addresses = [tensor.data_ptr() for tensor in pointers]
    together = 0
    for address in addresses:
        together |= address
    driver, runtime = _triton()
    # A profiler's hooks want to know more of a launch than is kept here.
    watched = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    known = None if together % ALIGNMENT or watched else starts.get(key)
    if known is None:
        call = describe()
        compiled = kernel[call.grid](*pointers, *call.rest, **call.constants)
        if together % ALIGNMENT == 0:
            if len(starts) >= KEPT_STARTS:
                starts.clear()
            starts[key] = _Known(compiled, call.grid, _arguments(kernel, call))
        return compiled
    compiled = known.compiled
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    compiled.run(*known.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *known.rest)
    return None


def _arguments(kernel: Any, call: Call) -> tuple[Any, ...]:
    """The rest of a call as Triton's own launch passes it: addresses, numbers, then constants in the order of the parameters."""
    static = [part.data_ptr() if isinstance(part, Tensor) else part for part in call.rest]
    return (*static, *(call.constants[name] for name in kernel.arg_names if name in call.constants))


def _plain(kernel: Any) -> bool:
    """Interpreted functions, and releases of Triton whose launch was not looked at, are called in the documented way."""
    return not hasattr(kernel, "device_caches") or not _launch_is_known()


@cache
def _launch_is_known() -> bool:
    import triton

    return triton.__version__.split(".")[:2] == ["3", "6"]


@cache
def _triton() -> tuple[Any, Any]:
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime
