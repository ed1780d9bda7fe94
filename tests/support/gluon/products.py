"""Asynchronous products of a warp group: their operands are read at any time until they are waited for, their results exist afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.experimental.gluon import language as gl

from tests.support.gluon.order import Order
from tests.support.gluon.shared import Flight, Shared
from tests.support.gluon.values import ProtocolError, Value, value_of


class Product:
    """A product under way; whoever uses it before the wait that hands it out breaks the protocol."""

    def __init__(self, name: str, operands: tuple[Any, Any], acc: Any, use_acc: bool):
        self._name, self._operands, self._acc, self._use_acc = name, operands, acc, use_acc
        self._seen = [x.array.copy() for x in operands]
        self._flights = [(x, Flight(x.array, f"a product of {name}")) for x in operands if isinstance(x, Shared)]
        self._value: Value | None = None
        for operand, flight in self._flights:
            operand.buffer.reading.append(flight)

    def _complete(self, order: Order) -> None:
        for operand, flight in self._flights:
            operand.buffer.reading.remove(flight)
            operand.note_read(order.current)
        for operand, seen in zip(self._operands, self._seen, strict=True):
            if not np.array_equal(operand.array, seen, equal_nan=True):
                raise ProtocolError(f"{getattr(operand, 'name', 'an operand')} changed while a product of {self._name} read it")
        a, b = self._seen
        made = a @ b
        if self._use_acc:
            made = made + (self._acc.result() if isinstance(self._acc, Product) else value_of(self._acc)).array
        self._value = Value(made.astype(np.float32), gl.float32)

    def result(self) -> Value:
        """What the wait hands out."""
        if self._value is None:
            raise ProtocolError(f"{self._name} takes a product before the wait that completes it")
        return self._value

    def __getattr__(self, name: str) -> Any:
        raise ProtocolError(f"an unfinished product is used (.{name})")


def _refuse(*_: Any) -> Any:
    raise ProtocolError("an unfinished product is used in arithmetic")


for _name in ("add", "sub", "mul", "truediv", "radd", "rsub", "rmul", "rtruediv", "neg", "getitem", "lt", "gt", "le", "ge", "bool"):
    setattr(Product, f"__{_name}__", _refuse)


class TensorCores:
    """The products of one program."""

    def __init__(self, order: Order):
        self._order = order

    def multiply(
        self, a: Any, b: Shared, acc: Any, *, use_acc: Any = True, precision: Any = None, max_num_imprecise_acc: Any = None,
        is_async: bool = False,
    ) -> Any:  # fmt: skip
        """``warpgroup_mma``."""
        actor = self._order.current
        if not isinstance(b, Shared) or not isinstance(a, (Shared, Value)):
            raise ProtocolError("a product takes shared memory or registers on its left, and shared memory on its right")
        if a.dtype != b.dtype:
            raise ProtocolError(f"a product of {a.dtype} and {b.dtype}")
        for operand in (a, b):
            if isinstance(operand, Shared):
                operand.check_readable(actor, "multiplies")
        if isinstance(acc, Product) and acc not in actor.products and acc._value is None:
            raise ProtocolError("a product adds to one that another partition has under way")
        wanted = [a.shape[0], b.shape[1]]
        if not isinstance(acc, Product) and value_of(acc).shape != wanted:
            raise ProtocolError(f"a product of shape {wanted} adds to {value_of(acc).shape}")
        product = Product(actor.name, (a, b), acc, bool(value_of(use_acc)))
        actor.products.append(product)
        if not is_async:
            return self.wait(0, [product])
        self._order.pause()
        return product

    def wait(self, num_outstanding: int = 0, deps: Any = None) -> Any:
        """``warpgroup_mma_wait``: products end in the order in which they were begun."""
        actor = self._order.current
        if deps is None:
            raise ProtocolError("a wait for products names those that it hands out")
        self._order.pause()
        while len(actor.products) > int(num_outstanding):
            actor.products.pop(0)._complete(self._order)
        out = [dep.result() if isinstance(dep, Product) else dep for dep in deps]
        return out[0] if len(out) == 1 else tuple(out)
