"""What a kernel finds under the names of Gluon's language while the runner runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from tests.support.gluon.barriers import Barriers
from tests.support.gluon.copies import Descriptor, fence
from tests.support.gluon.shared import allocate
from tests.support.gluon.values import Pointer, ProtocolError, Value, common, load, rounded, store, value_of

if TYPE_CHECKING:
    from tests.support.gluon.program import Program


class Namespace:
    """Stands for a module: the emulated names, and what is the same everywhere (types and layouts)."""

    def __init__(self, real: Any, emulated: dict[str, Any]):
        self._real, self._emulated = real, emulated

    def __getattr__(self, name: str) -> Any:
        if name in self._emulated:
            return self._emulated[name]
        found = getattr(self._real, name)
        if isinstance(found, (type, tl.dtype)):
            return found
        raise ProtocolError(f"the runner does not know {self._real.__name__}.{name}")


def _elementwise(function: Callable[..., np.ndarray]) -> Callable[..., Value]:
    def apply(x: Any) -> Value:
        given = value_of(x)
        dtype = given.dtype if given.dtype.is_floating() else gl.float32
        with np.errstate(all="ignore"):
            return Value(rounded(function(rounded(given.array, dtype)), dtype), dtype)

    return apply


def _pair(function: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    def apply(a: Any, b: Any) -> Value:
        left, right, dtype = common(a, b)
        # Triton's maximum and minimum give the number where the other operand is none.
        return Value(function(rounded(left.array, dtype), rounded(right.array, dtype)), dtype)

    return apply


def _reduction(function: Callable[..., Any]) -> Callable[..., Value]:
    def apply(x: Value, axis: int | None = None, **_: Any) -> Value:
        with np.errstate(all="ignore"):
            made = function(x.array, axis=axis)
        wide = gl.int32 if x.dtype.name in ("int1", "int8", "int16") else x.dtype
        return Value(rounded(made, wide), wide)

    return apply


def _where(condition: Any, a: Any, b: Any) -> Value:
    left, right, dtype = common(a, b)
    return Value(np.where(value_of(condition).array, rounded(left.array, dtype), rounded(right.array, dtype)), dtype)


def _full(shape: Sequence[Any], value: Any, dtype: Any, layout: Any = None) -> Value:
    return Value(np.full(tuple(int(n) for n in shape), rounded(value_of(value).array, dtype)), dtype)


def _counted(*bounds: Any, **_: Any) -> Iterator[Value]:
    """``range``: its numbers are tensors' scalars, as in a compiled loop."""
    for i in range(*(int(value_of(b)) for b in bounds)):
        yield value_of(i)


def _static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise ProtocolError(f"static_assert: {message}")


def _same(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _moved(asm: str, args: Sequence[Any], dtype: Any) -> Value:
    if not asm.startswith("mov.") or len(args) != 1:
        raise ProtocolError(f"the runner knows no assembly but a move: {asm}")
    return value_of(args[0]).to(dtype)


def _fma(a: Any, b: Any, c: Any) -> Value:
    return value_of(a) * b + c


_ELEMENTWISE = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "floor": np.floor, "ceil": np.ceil,
}  # fmt: skip
_PURE: dict[str, Any] = {
    **{name: _elementwise(function) for name, function in _ELEMENTWISE.items()},
    "abs": lambda x: Value(np.abs(value_of(x).array), value_of(x).dtype),
    "maximum": _pair(np.fmax), "minimum": _pair(np.fmin), "max": _reduction(np.max), "min": _reduction(np.min), "sum": _reduction(np.sum),
    "xor_sum": _reduction(np.bitwise_xor.reduce), "where": _where, "full": _full,
    "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype),
    "full_like": lambda x, value, **_: _full(x.shape, value, x.dtype), "zeros_like": lambda x, **_: _full(x.shape, 0, x.dtype),
    "arange": lambda start, end, layout=None: Value(np.arange(int(start), int(end)), gl.int32),
    "convert_layout": _same, "set_auto_layout": _same, "multiple_of": _same, "max_contiguous": _same, "max_constancy": _same,
    "assume": lambda condition: _static_assert(condition, "assume"), "to_tensor": value_of, "cast": lambda x, dtype: value_of(x).to(dtype),
    "cdiv": lambda a, b: (a + b - 1) // b, "fma": _fma, "static_range": range, "range": _counted, "static_assert": _static_assert,
    "static_print": lambda *_: None, "device_print": lambda *_: None, "thread_barrier": lambda: None, "fdiv": lambda a, b: value_of(a) / b,
    "expand_dims": lambda x, axis: Value(np.expand_dims(x.array, axis), x.dtype), "constexpr": _same,
    "broadcast": lambda a, b: tuple(Value(x, v.dtype) for x, v in zip(np.broadcast_arrays(a.array, b.array), (a, b), strict=True)),
    "permute": lambda x, order: Value(x.array.transpose(tuple(order)), x.dtype), "trans": lambda x: Value(x.array.T, x.dtype),
    "reshape": lambda x, shape: Value(x.array.reshape(tuple(shape)), x.dtype),
    "inline_asm_elementwise": lambda asm, constraints, args, dtype, **_: _moved(asm, args, dtype),
    "load": lambda pointer, mask=None, other=None, **_: load(pointer, mask, other),
    "store": lambda pointer, value, mask=None, **_: store(pointer, value, mask),
}  # fmt: skip


def _language(program: Program) -> dict[str, Any]:
    allocated: list[str] = []

    def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any, value: Any = None) -> Any:
        name = f"shared{len(allocated)}{[int(n) for n in shape]}"
        allocated.append(name)
        if isinstance(layout, hopper.mbarrier.MBarrierLayout):
            made = Barriers(name, program.order, int(shape[0]))
            return made if len(shape) > 1 else made.index(0)
        part = allocate(name, dtype, shape, layout, program.order)
        program.buffers.append(part.buffer)
        if value is not None:
            part.store(value)
        return part

    def device_assert(condition: Any, message: str = "") -> None:
        if not np.all(value_of(condition).array):
            raise ProtocolError(f"device_assert: {message}")

    return _PURE | {
        "allocate_shared_memory": allocate_shared_memory, "warp_specialize": program.specialise, "device_assert": device_assert,
        "program_id": lambda axis: value_of(program.ids[axis]), "num_programs": lambda axis: value_of(program.grid[axis]),
    }  # fmt: skip


def _barriers() -> dict[str, Any]:
    def expect(barrier: Any, bytes: Any, pred: Any = True) -> None:
        if value_of(pred):
            barrier.arrive(1, int(bytes))

    def arrive(barrier: Any, *, count: int = 1, pred: Any = True) -> None:
        if value_of(pred):
            barrier.arrive(count)

    def wait(barrier: Any, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if value_of(pred):
            barrier.wait(phase)

    return {
        "init": lambda barrier, count: barrier.init(count), "expect": expect, "arrive": arrive, "wait": wait,
        "invalidate": lambda barrier: None,
    }  # fmt: skip


def _copies(program: Program) -> dict[str, Any]:
    made: dict[tuple[Any, ...], Descriptor] = {}

    def make_tensor_descriptor(
        base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any, padding_option: str = "zero"
    ) -> Descriptor:  # fmt: skip
        if padding_option != "zero":
            raise ProtocolError("the runner pads with zeros only")
        site, frame = [program.order.current], sys._getframe(1)
        while frame is not None and frame.f_globals.get("__gluon__"):
            site += [frame.f_code, frame.f_lasti]
            frame = frame.f_back
        program.engine.remade(made.get(tuple(site)))
        made[tuple(site)] = Descriptor(base, shape, strides, block_shape, layout)
        return made[tuple(site)]

    engine = program.engine
    return {
        "async_copy_global_to_shared": engine.copy_in, "async_load": engine.copy_in, "store_wait": engine.store_wait,
        "async_copy_shared_to_global": engine.copy_out, "async_store": engine.copy_out, "make_tensor_descriptor": make_tensor_descriptor,
    }  # fmt: skip


def replacements(program: Program) -> dict[int, Any]:
    """What stands for every function and module of the language, by the identity of the real one."""
    language, barriers, copies = _language(program), _barriers(), _copies(program)
    cores = {
        "warpgroup_mma": program.cores.multiply, "warpgroup_mma_wait": program.cores.wait, "warpgroup_mma_init": _same,
        "fence_async_shared": lambda cluster=False: fence(program.order, program.buffers),
    }  # fmt: skip
    rooms = [(gl, language), (tl, language), (hopper.mbarrier, barriers), (hopper.tma, copies)]
    spaces = [Namespace(real, emulated) for real, emulated in rooms]
    rooms.append((hopper, cores))
    spaces.append(Namespace(hopper, {**cores, "mbarrier": spaces[2], "tma": spaces[3]}))
    out: dict[int, Any] = {}
    for (real, emulated), space in zip(rooms, spaces, strict=True):
        out[id(real)] = space
        out |= {id(getattr(real, name)): value for name, value in emulated.items() if hasattr(real, name)}
    return out
