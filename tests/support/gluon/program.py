"""One program of a grid: its partitions, shared memory, copies and products; and the kernel's functions with other globals."""

from __future__ import annotations

import builtins
import types
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from tests.support.gluon.copies import Descriptor, Engine
from tests.support.gluon.language import _counted, replacements
from tests.support.gluon.order import Order
from tests.support.gluon.products import TensorCores
from tests.support.gluon.shared import Buffer
from tests.support.gluon.values import Memory, Pointer, ProtocolError, Value, value_of


class Program:
    """What the parts of the emulated language share."""

    def __init__(self, ids: Sequence[int], grid: Sequence[int], seed: int):
        self.ids, self.grid = ids, grid
        self.order = Order(seed)
        self.engine, self.cores = Engine(self.order), TensorCores(self.order)
        self.buffers: list[Buffer] = []
        self._bound: dict[Any, Any] = {}
        self._replaced = replacements(self)

    def specialise(self, parts: Sequence[Any], worker_num_warps: Sequence[int], worker_num_regs: Sequence[int]) -> Any:
        """``warp_specialize``: every partition is an actor; the first one's result is the program's."""
        if not len(worker_num_warps) == len(worker_num_regs) == len(parts) - 1:
            raise ProtocolError(f"{len(parts)} partitions, warps for {worker_num_warps} and registers for {worker_num_regs}")

        def job(function: Any, args: Sequence[Any]) -> Any:
            result = function(*args)
            self._at_end()
            return result

        names = [f"partition {at} ({part[0].__name__})" for at, part in enumerate(parts)]
        return self.order.fork([(name, partial(job, *part)) for name, part in zip(names, parts, strict=True)])[0]

    def _at_end(self) -> None:
        actor = self.order.current
        if actor.products:
            raise ProtocolError(f"{actor.name} ends with {len(actor.products)} products under way")
        if actor.stores:
            raise ProtocolError(f"{actor.name} ends with {len(actor.stores)} copies to memory under way")

    def run(self, kernel: Any, args: Sequence[Any], constants: dict[str, Any]) -> None:
        self.bind(kernel)(*args, **constants)
        self._at_end()
        self.engine.finish(self.order.current)

    def bind(self, jitted: Any) -> Any:
        """The function under a jit, its globals replaced by what this program gives it."""
        function = jitted.fn
        if function not in self._bound:
            bound = types.FunctionType(function.__code__, {}, function.__name__, function.__defaults__, function.__closure__)
            bound.__kwdefaults__ = function.__kwdefaults__
            self._bound[function] = bound
            names = _names(function.__code__)
            bound.__globals__.update({name: self._replace(value) for name, value in function.__globals__.items() if name in names})
            bound.__globals__.update(__builtins__={**vars(builtins), "range": _counted}, __gluon__=True)
        return self._bound[function]

    def _replace(self, value: Any) -> Any:
        if id(value) in self._replaced:
            return self._replaced[id(value)]
        if isinstance(value, gl.constexpr):
            return value.value
        # A function under a jit, Triton's or its interpreter's; a constexpr function is none, and runs as it is.
        if hasattr(value, "fn") and hasattr(value, "arg_names"):
            return self.bind(value)
        return value


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


_INTEGERS = {"i32": gl.int32, "i64": gl.int64}


def argument(name: str, given: Any, declared: str | None) -> Any:
    """A kernel's argument as it sees it: tensors become pointers, numbers scalars of the type that is declared, if any."""
    if isinstance(given, torch.Tensor):
        return Pointer(Memory(name, given))
    if hasattr(given, "base") and hasattr(given, "block_shape"):
        return Descriptor(Pointer(Memory(name, given.base)), given.shape, given.strides, given.block_shape, given.layout)
    if isinstance(given, int) and declared in _INTEGERS:
        return Value(given, _INTEGERS[declared])
    return given if isinstance(given, (Value, Pointer, Descriptor)) or given is None else value_of(given)
