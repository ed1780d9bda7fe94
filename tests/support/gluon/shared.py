"""Shared memory that remembers who wrote and read what, so that a missing wait is found in whatever order things happen to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.gluon.order import Actor, Order
from tests.support.gluon.values import ProtocolError, Value, carrier, poison, rounded, value_of


@dataclass(eq=False)
class Access:
    """Something that was done to a part of a buffer, and the time in somebody's clock that proves that it is over."""

    part: np.ndarray
    who: Any
    time: int
    name: str
    unfenced: bool = False

    def known_to(self, actor: Actor) -> bool:
        return actor.knows(self.who, self.time)


@dataclass(eq=False)
class Flight:
    """A copy that is writing a part of a buffer, or a product or a store that is reading one."""

    part: np.ndarray
    name: str


class Buffer:
    """One allocation: its numbers and their history."""

    def __init__(self, name: str, array: np.ndarray):
        self.name, self.array = name, array
        self.writes: list[Access] = []
        self.reads: list[Access] = []
        self.landing: list[Flight] = []
        self.reading: list[Flight] = []


def touching(found: Sequence[Any], part: np.ndarray) -> list[Any]:
    """Those that share memory with a part."""
    return [x for x in found if np.may_share_memory(x.part, part) and np.shares_memory(x.part, part)]


class Shared:
    """A part of shared memory, as a kernel holds it."""

    def __init__(self, buffer: Buffer, array: np.ndarray, dtype: Any, layout: Any, order: Order, name: str):
        self.buffer, self.array, self.dtype, self.layout, self._order, self.name = buffer, array, dtype, layout, order, name

    @property
    def shape(self) -> list[int]:
        return list(self.array.shape)

    def _part(self, array: np.ndarray, name: str) -> Shared:
        if array.size and not np.shares_memory(array, self.array):
            raise ProtocolError(f"{name} is no view of {self.name}")
        return Shared(self.buffer, array, self.dtype, self.layout, self._order, name)

    def index(self, at: Any) -> Shared:
        place = int(value_of(at))
        if not 0 <= place < self.array.shape[0]:
            raise ProtocolError(f"stage {place} of {self.name}, which has {self.array.shape[0]}")
        return self._part(self.array[place], f"{self.name}[{place}]")

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if not 0 <= start <= start + length <= self.array.shape[dim]:
            raise ProtocolError(f"{start} .. {start + length} of {self.name}, which has {self.array.shape[dim]}")
        key = (np.s_[:],) * dim + (np.s_[start : start + length],)
        return self._part(self.array[key], f"{self.name}[{start}:{start + length}]")

    def permute(self, order: Sequence[int]) -> Shared:
        return self._part(self.array.transpose(tuple(order)), self.name)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self._part(self.array.reshape(tuple(shape)), self.name)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        if dtype != self.dtype:
            raise ProtocolError(f"{self.name} of {self.dtype} is taken for {dtype}")
        return self.reshape(shape)

    def load(self, layout: Any = None) -> Value:
        """A synchronous read by the partition whose turn it is."""
        self.check_readable(self._order.current, "reads", generic=True)
        self.note_read(self._order.current)
        return Value(self.array.copy(), self.dtype)

    def store(self, value: Any) -> None:
        """A synchronous write; the copy engine and the tensor cores see it after a fence only."""
        actor, given = self._order.current, value_of(value)
        if given.shape and given.shape != self.shape:
            raise ProtocolError(f"a tensor of shape {given.shape} is stored into {self.name} of shape {self.shape}")
        self.check_writable(actor)
        self.array[...] = rounded(given.array, self.dtype)
        self.note_write(actor, actor.clock[actor], actor.name, unfenced=True)
        self._order.pause()

    def check_readable(self, actor: Actor, does: str, *, generic: bool = False) -> None:
        """Nothing may be under way to it, and what is in it must have been waited for."""
        if touching(self.buffer.landing, self.array):
            raise ProtocolError(f"{actor.name} {does} {self.name} while a copy into it is under way")
        written = touching(self.buffer.writes, self.array)
        if not written:
            raise ProtocolError(f"{actor.name} {does} {self.name}, into which nothing was written")
        for access in written:
            if not access.known_to(actor):
                raise ProtocolError(f"{actor.name} {does} {self.name} without having waited for {access.name}")
            if access.unfenced and not generic:
                raise ProtocolError(f"{actor.name} {does} {self.name} with no fence after what {access.name} stored")

    def check_writable(self, actor: Actor) -> None:
        """Nothing may be under way to it, and whoever read it must be known to have ended."""
        if touching(self.buffer.landing, self.array):
            raise ProtocolError(f"{actor.name} overwrites {self.name} while a copy into it is under way")
        for flight in touching(self.buffer.reading, self.array):
            raise ProtocolError(f"{actor.name} overwrites {self.name} while {flight.name} still reads it")
        for access in touching([*self.buffer.reads, *self.buffer.writes], self.array):
            if not access.known_to(actor):
                raise ProtocolError(f"{actor.name} overwrites {self.name} without having waited for {access.name}")

    def note_read(self, actor: Actor) -> None:
        self.buffer.reads.append(Access(self.array, actor, actor.clock[actor], actor.name))

    def note_write(self, who: Any, time: int, name: str, *, unfenced: bool = False) -> None:
        for found in (self.buffer.reads, self.buffer.writes):
            for old in touching(found, self.array):
                found.remove(old)
        self.buffer.writes.append(Access(self.array, who, time, name, unfenced))

    def destroy(self) -> None:
        self.array[...] = poison(self.dtype)


def allocate(name: str, dtype: Any, shape: Sequence[int], layout: Any, order: Order) -> Shared:
    """New shared memory; nothing in it is a number."""
    array = np.full(tuple(int(n) for n in shape), poison(dtype), carrier(dtype))
    return Shared(Buffer(name, array), array, dtype, layout, order, name)
