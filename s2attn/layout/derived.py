"""What is derived from a layout and kept with it: counted in bytes, bounded, and freed when the layout is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from ctypes import Array, sizeof
from threading import RLock
from types import NoneType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
Storages = dict[tuple[torch.device, int], int]
"""Bytes of memory by its device and address."""

KEEP_BYTES = 64 << 20
"""What one layout may keep in any case, in bytes."""
KEEP_TIMES = 16
"""A larger layout may keep so many times its own size."""

_CPU = torch.device("cpu")
_lock = RLock()


class Derived:
    """Values derived from one layout by key: the columns, what a backend's kernels read, plans.

    The values live as long as the layout, or until more than ``limit`` bytes are kept: then the
    least recently used ones are dropped, and derived again when they are asked for. The last
    value that was asked for always stays.

    Args:
        own: tensors of the layout itself; values that share their memory are not charged for it.
        nbytes: bytes of the layout.
    """

    def __init__(self, own: Iterable[Tensor], nbytes: int) -> None:
        self.limit = max(KEEP_BYTES, KEEP_TIMES * nbytes)
        self.nbytes = 0
        self.grown: Callable[[], None] | None = None
        """Called after ``nbytes`` has changed, without arguments and outside of any lock."""
        self._own = storages_of(list(own))
        self._values: OrderedDict[Hashable, tuple[Any, Storages]] = OrderedDict()
        self._pinned = False

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def items(self) -> list[tuple[Hashable, Any]]:
        """Keys and values, the least recently used first."""
        with _lock:
            return [(key, value) for key, (value, _) in self._values.items()]

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``key``; ``make()`` derives it when it is not kept."""
        with _lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                return found[0]
        value = make()  # outside of the lock: it may take long, and may ask for other values
        memory = storages_of(value)
        with _lock:
            if key in self._values:  # another thread was faster
                return self._values[key][0]
            self._values[key] = value, {at: size for at, size in memory.items() if at not in self._own}
            self._drop_old()
        if memory and self.grown is not None:
            self.grown()
        return value

    def pin(self) -> None:
        """Drop nothing from now on: a CUDA graph holds addresses of values."""
        self._pinned = True

    def _drop_old(self) -> None:
        self.nbytes = self._count()
        while self.nbytes > self.limit and len(self._values) > 1 and not self._pinned:
            self._values.popitem(last=False)
            self.nbytes = self._count()

    def _count(self) -> int:
        together: Storages = {}
        for _, memory in self._values.values():
            together |= memory
        return sum(together.values())


def storages_of(value: Any) -> Storages:
    """The memory of all tensors, arrays and buffers in a value: in containers, and in attributes of objects.

    >>> x = torch.zeros(4)
    >>> sum(storages_of({"a": [x, x[1:]], "b": np.zeros(3)}).values())
    40
    """
    found: Storages = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            if not one.is_meta:
                storage = one.untyped_storage()
                found[one.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, np.ndarray):
            base = one
            while isinstance(base.base, np.ndarray):
                base = base.base
            found[_CPU, base.ctypes.data] = base.nbytes
        elif isinstance(one, (bytes, bytearray, Array)):
            found[_CPU, id(one)] = len(one) if isinstance(one, (bytes, bytearray)) else sizeof(one)
        elif id(one) not in seen and not isinstance(one, (str, int, float, torch.dtype, torch.device, NoneType)):
            seen.add(id(one))
            if isinstance(one, dict):
                waiting.extend(one.values())
            elif isinstance(one, (list, tuple, set, frozenset)):
                waiting.extend(one)
            elif not callable(one):
                waiting.extend(getattr(one, "__dict__", {}).values())
                waiting.extend(getattr(one, name, None) for name in getattr(type(one), "__slots__", ()))
    return found
