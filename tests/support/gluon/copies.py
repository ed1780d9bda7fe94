"""The copy engine: descriptors, copies into shared memory that land late, and copies out of it that read late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.gluon.barriers import Barrier
from tests.support.gluon.order import Actor, Order
from tests.support.gluon.shared import Flight, Shared
from tests.support.gluon.values import Pointer, ProtocolError, carrier, value_of

ALIGNMENT = 16
LARGEST_BOX = 256


class Descriptor:
    """A strided view of global memory that is copied box by box; what lies beyond its shape reads as zero and is not written.

    Attributes:
        copies: copies through it, as (barrier, landing) from the moment when they have landed, else None.
    """

    def __init__(self, base: Pointer, shape: Sequence[Any], strides: Sequence[Any], box: Sequence[int], layout: Any):
        self.memory, self.first = base.memory, int(base.offset)
        self.shape, self.strides = [int(value_of(n)) for n in shape], [int(value_of(n)) for n in strides]
        self.block_shape, self.layout, self.dtype = [int(n) for n in box], layout, base.memory.dtype
        size = self.dtype.primitive_bitwidth // 8
        self.block_type = SimpleNamespace(nbytes=int(np.prod(self.block_shape)) * size, shape=self.block_shape, element_ty=self.dtype)
        self.copies: list[Copy] = []
        name = self.memory.name
        if not len(self.shape) == len(self.strides) == len(self.block_shape):
            raise ProtocolError(f"the descriptor of {name} has {self.shape}, {self.strides} and {self.block_shape}")
        if (self.memory.flat.data_ptr() + self.first * size) % ALIGNMENT or any(s * size % ALIGNMENT for s in self.strides[:-1]):
            raise ProtocolError(
                f"the descriptor of {name} begins at element {self.first} with strides {self.strides}: not multiples of 16 bytes"
            )
        if self.strides[-1] != 1 or min(self.shape) < 1:
            raise ProtocolError(f"the descriptor of {name} has shape {self.shape} and strides {self.strides}")
        if max(self.block_shape) > LARGEST_BOX or self.block_shape[-1] * size < ALIGNMENT:
            raise ProtocolError(f"the descriptor of {name} has boxes of {self.block_shape}")

    def places(self, at: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The element of each place of a box, and whether there is one."""
        offset, inside = np.asarray(self.first), np.asarray(True)
        if len(at) != len(self.shape):
            raise ProtocolError(f"{len(at)} coordinates for a descriptor of {len(self.shape)}")
        for place, n, stride, box in zip(at, self.shape, self.strides, self.block_shape, strict=True):
            index = int(value_of(place)) + np.arange(box)
            offset = offset[..., None] + index * stride
            inside = inside[..., None] & (index >= 0) & (index < n)
        return offset, inside

    def read(self, at: Sequence[Any]) -> np.ndarray:
        offset, inside = self.places(at)
        made = np.zeros(offset.shape, carrier(self.dtype))
        made[inside] = self.memory.read(offset[inside])
        return made


@dataclass(eq=False)
class Copy:
    """A copy into shared memory, and where and when it landed."""

    target: str
    barrier: Barrier
    landing: int = 0

    def waited_for_by(self, actor: Actor) -> bool:
        return bool(self.landing) and actor.knows(self.barrier, self.landing)


@dataclass(eq=False)
class Out:
    """A copy out of shared memory that has not been waited for."""

    desc: Descriptor
    at: tuple[Any, ...]
    source: Shared
    seen: np.ndarray
    flight: Flight


class Engine:
    """The copies of one program."""

    def __init__(self, order: Order):
        self._order = order
        self.copies: list[Copy] = []

    def copy_in(self, desc: Descriptor, at: Sequence[Any], barrier: Barrier, target: Shared, pred: Any = True) -> None:
        """``async_copy_global_to_shared``: the target is no number until the copy lands."""
        if not value_of(pred):
            return
        actor = self._order.current
        if target.shape != desc.block_shape or target.dtype != desc.dtype:
            raise ProtocolError(f"{target.name} of {target.dtype} {target.shape} is the target of boxes of {desc.dtype} {desc.block_shape}")
        target.check_writable(actor)
        target.destroy()
        flight, copy, clock = Flight(target.array, "a copy"), Copy(target.name, barrier), dict(actor.clock)
        place = [int(value_of(x)) for x in at]
        actor.tick()
        target.buffer.landing.append(flight)
        self.copies.append(copy)
        desc.copies.append(copy)

        def land() -> None:
            target.array[...] = desc.read(place)
            target.buffer.landing.remove(flight)
            barrier.land(desc.block_type.nbytes, clock)
            copy.landing = barrier.landings
            target.note_write(barrier, barrier.landings, f"the copy that {barrier.name} announces")

        self._order.late.append(land)
        self._order.pause()

    def copy_out(self, desc: Descriptor, at: Sequence[Any], source: Shared) -> None:
        """``async_copy_shared_to_global``: the source is read when the store is waited for."""
        actor = self._order.current
        if source.shape != desc.block_shape or source.dtype != desc.dtype:
            raise ProtocolError(f"{source.name} of {source.dtype} {source.shape} is the source of boxes of {desc.dtype} {desc.block_shape}")
        source.check_readable(actor, "copies out of")
        flight = Flight(source.array, f"a copy to memory of {actor.name}")
        source.buffer.reading.append(flight)
        actor.stores.append(Out(desc, tuple(int(value_of(x)) for x in at), source, source.array.copy(), flight))
        self._order.pause()

    def store_wait(self, pendings: int = 0) -> None:
        """Until at most so many of this partition's copies to memory are under way."""
        actor = self._order.current
        while len(actor.stores) > int(pendings):
            out = actor.stores.pop(0)
            out.source.buffer.reading.remove(out.flight)
            out.source.note_read(actor)
            if not np.array_equal(out.seen, out.source.array, equal_nan=out.desc.dtype.is_floating()):
                raise ProtocolError(f"{out.source.name} changed while {out.flight.name} read it")
            offset, inside = out.desc.places(out.at)
            out.desc.memory.write(offset[inside], out.source.array[inside])
        self._order.pause()

    def remade(self, old: Descriptor | None) -> None:
        """A descriptor made in a kernel has one place in memory for each place in the source; the old one must not be needed any more."""
        actor = self._order.current
        for copy in old.copies if old is not None else ():
            if not copy.waited_for_by(actor):
                raise ProtocolError(f"{actor.name} makes a descriptor anew while the copy into {copy.target} may still read the old one")

    def finish(self, actor: Actor) -> None:
        """Nothing may be under way when the program ends."""
        for copy in self.copies:
            if not copy.waited_for_by(actor):
                raise ProtocolError(f"the program ends, and nobody waited for a copy into {copy.target}")


def fence(order: Order, buffers: Sequence[Any]) -> None:
    """``fence_async_shared``: what this partition stored is seen by the copy engine and the tensor cores."""
    for buffer in buffers:
        for access in buffer.writes:
            if access.who is order.current:
                access.unfenced = False
