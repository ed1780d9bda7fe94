"""Numbers as a Gluon kernel has them: tensors with Triton's types on NumPy arrays, and pointers that know where their memory ends."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gl


class ProtocolError(AssertionError):
    """The kernel broke a rule; hardware would answer with a hang, a wrong number or a fault, and perhaps only sometimes."""


_CARRIERS: dict[str, Any] = {
    "int1": np.bool_, "int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16, "int32": np.int32, "uint32": np.uint32,
    "int64": np.int64, "uint64": np.uint64, "fp16": np.float32, "bf16": np.float32, "fp32": np.float32, "fp64": np.float64,
}  # fmt: skip
"""16-bit floating point numbers are carried as rounded float32."""

_FROM_TORCH = {
    torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.int32: gl.int32, torch.int64: gl.int64,
    torch.uint8: gl.uint8, torch.int8: gl.int8, torch.int16: gl.int16,
}  # fmt: skip


def carrier(dtype: Any) -> Any:
    """The NumPy type that carries numbers of a Gluon type."""
    return _CARRIERS[dtype.name]


def rounded(array: np.ndarray, dtype: Any) -> np.ndarray:
    """An array in the carrier of ``dtype``, rounded to what ``dtype`` can hold (bfloat16: to nearest even).

    >>> rounded(np.float32([1.00390625, 3.0]), gl.bfloat16).tolist()
    [1.0, 3.0]
    """
    if dtype.name in ("bf16", "fp16"):
        kind = torch.bfloat16 if dtype.name == "bf16" else torch.float16
        return torch.from_numpy(np.array(array, np.float32)).to(kind).float().numpy()
    with np.errstate(invalid="ignore"):
        return np.asarray(array).astype(carrier(dtype))


def _truncated(a: Any, b: Any) -> Any:
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _remainder(a: Any, b: Any) -> Any:
    return a - _truncated(a, b) * b


def _method(function: Callable[[Any, Any], Any], *, swapped: bool = False, kind: str = "") -> Callable[[Any, Any], Any]:
    """An operator of `Value`; kind "floating" has no result in integers, kind "comparison" has truth values."""

    def apply(me: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        left, right, dtype = common(other, me) if swapped else common(me, other)
        if kind == "floating" and not dtype.is_floating():
            dtype = gl.float32
        with np.errstate(all="ignore"):
            made = function(left.array.astype(carrier(dtype)), right.array.astype(carrier(dtype)))
        return Value(made, gl.int1) if kind == "comparison" else Value(rounded(made, dtype), dtype)

    return apply


class Value:
    """A tensor or a scalar of a kernel: a NumPy array with a Gluon type; operators follow Triton's rules for types."""

    def __init__(self, array: Any, dtype: Any):
        self.array, self.dtype = np.asarray(array, dtype=carrier(dtype)), dtype

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def to(self, dtype: Any) -> Value:
        return Value(rounded(self.array, dtype), dtype)

    def __getitem__(self, key: Any) -> Value:
        return Value(self.array[key], self.dtype)

    def __index__(self) -> int:
        return operator.index(self.array.item())

    def __int__(self) -> int:
        return int(self.array.item())

    def __float__(self) -> float:
        return float(self.array.item())

    def __bool__(self) -> bool:
        if self.array.ndim:
            raise ProtocolError(f"a tensor of shape {self.shape} decides a branch")
        return bool(self.array)

    __add__, __radd__ = _method(operator.add), _method(operator.add, swapped=True)
    __sub__, __rsub__ = _method(operator.sub), _method(operator.sub, swapped=True)
    __mul__, __rmul__ = _method(operator.mul), _method(operator.mul, swapped=True)
    __floordiv__, __rfloordiv__ = _method(_truncated), _method(_truncated, swapped=True)
    __mod__, __rmod__ = _method(_remainder), _method(_remainder, swapped=True)
    __and__, __rand__ = _method(operator.and_), _method(operator.and_, swapped=True)
    __or__, __ror__ = _method(operator.or_), _method(operator.or_, swapped=True)
    __xor__, __rxor__ = _method(operator.xor), _method(operator.xor, swapped=True)
    __lshift__, __rlshift__ = _method(operator.lshift), _method(operator.lshift, swapped=True)
    __rshift__, __rrshift__ = _method(operator.rshift), _method(operator.rshift, swapped=True)
    __truediv__, __rtruediv__ = _method(operator.truediv, kind="floating"), _method(operator.truediv, swapped=True, kind="floating")
    __eq__ = _method(operator.eq, kind="comparison")
    __ne__ = _method(operator.ne, kind="comparison")
    __lt__ = _method(operator.lt, kind="comparison")
    __le__ = _method(operator.le, kind="comparison")
    __gt__ = _method(operator.gt, kind="comparison")
    __ge__ = _method(operator.ge, kind="comparison")
    __hash__ = None

    def __neg__(self) -> Value:
        return Value(-self.array, self.dtype)

    def __invert__(self) -> Value:
        return Value(~self.array, self.dtype)

    def __repr__(self) -> str:
        return f"Value({self.array}, {self.dtype})"


def value_of(x: Any) -> Value:
    """A number as Triton sees it: Python's ints are int32 where they fit, its floats float32."""
    if isinstance(x, Value):
        return x
    if isinstance(x, (bool, np.bool_)):
        return Value(x, gl.int1)
    if isinstance(x, (int, np.integer)):
        return Value(x, gl.int32 if -(2**31) <= int(x) < 2**31 else gl.int64)
    if isinstance(x, (float, np.floating)):
        return Value(x, gl.float32)
    raise ProtocolError(f"{type(x).__name__} is not a number")


def _rank(dtype: Any) -> tuple[bool, int, bool]:
    return dtype.is_floating(), dtype.primitive_bitwidth, dtype.name == "fp16"


def common(a: Any, b: Any) -> tuple[Value, Value, Any]:
    """Two operands and the type in which they meet: a Python number takes the tensor's type unless it is a float and that an int."""
    left, right = value_of(a), value_of(b)
    if isinstance(a, Value) == isinstance(b, Value):
        return left, right, max(left.dtype, right.dtype, key=_rank)
    given, dtype = (left, right.dtype) if isinstance(b, Value) else (right, left.dtype)
    if given.dtype.is_floating():
        dtype = dtype if dtype.is_floating() else gl.float32
    elif given.dtype.name == "int64" or dtype.name == "int1":
        dtype = max(dtype, given.dtype, key=_rank)
    return left, right, dtype


class Memory:
    """The elements of one tensor argument, from its first to its last; whatever lies outside is not the kernel's to touch."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name, self.tensor, self.dtype = name, tensor, _FROM_TORCH[tensor.dtype]
        count = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        self.flat = torch.as_strided(tensor.detach(), (count,), (1,))

    def _inside(self, offset: np.ndarray, what: str) -> torch.Tensor:
        if offset.size and (offset.min() < 0 or offset.max() >= len(self.flat)):
            raise ProtocolError(f"{what} of {self.name} at {offset.min()} .. {offset.max()}, outside its {len(self.flat)} elements")
        return torch.from_numpy(np.array(offset, dtype=np.int64))

    def read(self, offset: np.ndarray) -> np.ndarray:
        found = self.flat[self._inside(offset, "a read")]
        return (found.float() if found.is_floating_point() else found).numpy()

    def write(self, offset: np.ndarray, values: np.ndarray) -> None:
        at = self._inside(offset, "a write")
        if len(np.unique(offset)) != offset.size:
            raise ProtocolError(f"one store writes the same element of {self.name} twice")
        self.flat[at] = torch.from_numpy(np.array(values)).to(self.flat.dtype)


class Pointer:
    """Addresses in one `Memory`, counted in elements from its first."""

    def __init__(self, memory: Memory, offset: Any = 0):
        self.memory, self.offset = memory, np.asarray(offset, dtype=np.int64)

    @property
    def dtype(self) -> Any:
        return gl.pointer_type(self.memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + value_of(more).array)

    __radd__ = __add__

    def __sub__(self, less: Any) -> Pointer:
        return Pointer(self.memory, self.offset - value_of(less).array)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, self.offset[key])


def poison(dtype: Any) -> Any:
    """What stands where nothing was loaded: not a number, or a number that fits nowhere."""
    return np.nan if dtype.is_floating() else np.iinfo(carrier(dtype)).max if dtype.name != "int1" else True


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
    """``gl.load``: what the mask excludes is not read, and is poison unless ``other`` says what it is."""
    dtype = pointer.memory.dtype
    if mask is None:
        return Value(pointer.memory.read(pointer.offset), dtype)
    keep = value_of(mask).array
    offset, keep = np.broadcast_arrays(pointer.offset, keep)
    made = np.full(offset.shape, poison(dtype), carrier(dtype)) if other is None else np.broadcast_to(
        value_of(other).array.astype(carrier(dtype)), offset.shape
    ).copy()  # fmt: skip
    made[keep] = pointer.memory.read(offset[keep])
    return Value(made, dtype)


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    """``gl.store``: what the mask excludes is not written."""
    given = value_of(value).to(pointer.memory.dtype).array
    keep = np.bool_(True) if mask is None else value_of(mask).array
    if given.ndim > pointer.offset.ndim:
        raise ProtocolError(f"a tensor of shape {given.shape} is stored through pointers of shape {pointer.offset.shape}")
    offset, given, keep = np.broadcast_arrays(pointer.offset, given, keep)
    pointer.memory.write(offset[keep], given[keep])
