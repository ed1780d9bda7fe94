"""mbarriers: they count arrivals and bytes, flip their phase when both are complete, and hand on what those who arrived had done."""

from __future__ import annotations

from typing import Any

from tests.support.gluon.order import Actor, Clock, Order, join
from tests.support.gluon.values import ProtocolError, value_of


class Barrier:
    """One mbarrier.

    Attributes:
        landings: copies that have landed on it so far; with the barrier itself a time in the clocks of those who waited.
    """

    def __init__(self, name: str, order: Order):
        self.name, self._order = name, order
        self._count: int | None = None
        self._pending, self._bytes, self._phase = 0, 0, 0
        self._gathered: Clock = {}
        self._passed: Clock = {}
        self.landings = 0

    def init(self, count: int) -> None:
        if self._count is not None:
            raise ProtocolError(f"{self.name} is initialised twice")
        self._count = self._pending = int(count)
        self._by = self._order.current
        self._at = self._by.clock[self._by]
        self._by.tick()

    def _known_to(self, actor: Actor) -> None:
        if self._count is None or not actor.knows(self._by, self._at):
            raise ProtocolError(f"{actor.name} uses {self.name} before it is initialised")

    def arrive(self, count: int = 1, nbytes: int = 0) -> None:
        actor = self._order.current
        self._known_to(actor)
        join(self._gathered, actor.clock)
        actor.tick()
        self._bytes += nbytes
        self._pending -= int(count)
        if self._pending < 0:
            raise ProtocolError(f"{actor.name} arrives at {self.name}, which has had the {self._count} arrivals of this phase already")
        self._settle()
        self._order.pause()

    def land(self, nbytes: int, clock: Clock) -> None:
        """A copy of so many bytes, issued by somebody with this clock, has landed."""
        self.landings += 1
        self._bytes -= nbytes
        join(self._gathered, clock)
        self._gathered[self] = self.landings
        self._settle()

    def _settle(self) -> None:
        if self._pending == 0 and self._bytes == 0:
            self._phase ^= 1
            self._pending = self._count or 0
            join(self._passed, self._gathered)

    def wait(self, phase: Any) -> None:
        """Until the phase with this parity is complete."""
        actor, parity = self._order.current, int(value_of(phase))
        self._known_to(actor)
        if parity not in (0, 1):
            raise ProtocolError(f"{actor.name} waits for {self.name} with phase {parity}, which is not 0 or 1")
        self._order.pause(lambda: self._phase != parity, lambda: f"phase {parity} of {self.name}{self._lacking()}")
        actor.learns(self._passed)

    def _lacking(self) -> str:
        return f" (of its {self._count} arrivals {self._pending} and of its copies {self._bytes} bytes are missing)"


class Barriers:
    """An array of barriers; ``index`` picks one."""

    def __init__(self, name: str, order: Order, count: int):
        self._made = [Barrier(f"{name}[{i}]", order) for i in range(count)]

    def index(self, at: Any) -> Barrier:
        place = int(value_of(at))
        if not 0 <= place < len(self._made):
            raise ProtocolError(f"barrier {place} of {len(self._made)}")
        return self._made[place]
