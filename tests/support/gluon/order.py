"""Who runs next: partitions are threads of which one runs at a time, and a seeded generator passes the turn on at every event.

Nothing depends on the machine's speed, so a seed always gives the same run; and when nobody can go on, that is known at once.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from tests.support.gluon.values import ProtocolError

PATIENCE = 2_000_000
"""Events of one program; a kernel that needs more of them does not end."""
PACES = (1.0, 1.0, 0.3, 0.03)
"""How eagerly a partition, or copies in flight, take their turn; drawn for each seed, so that somebody is often far behind."""

Clock = dict[Any, int]


class Stopped(BaseException):
    """Another partition failed; this one unwinds."""


class Actor:
    """A partition (or the program before and after its partitions), what it waits for, and what it knows to have happened."""

    def __init__(self, name: str, clock: Clock, pace: float):
        self.name, self.clock, self.pace = name, dict(clock), pace
        self.go = threading.Semaphore(0)
        self.until: Callable[[], bool] | None = None
        self.what: Callable[[], str] = str
        self.done = False
        self.products: list[Any] = []
        self.stores: list[Any] = []
        self.clock[self] = 1

    def tick(self) -> None:
        self.clock[self] += 1

    def learns(self, clock: Clock) -> None:
        """What is in ``clock`` happened before whatever this actor does from now on."""
        join(self.clock, clock)

    def knows(self, who: Any, time: int) -> bool:
        return self.clock.get(who, 0) >= time


def join(clock: Clock, more: Clock) -> None:
    """Take the later of both times, for everyone."""
    for who, time in more.items():
        if clock.get(who, 0) < time:
            clock[who] = time


class Order:
    """The turn of one program's actors and of what lands later.

    Attributes:
        late: what is under way and lands when its turn comes: copies.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.late: list[Callable[[], None]] = []
        self.failure: BaseException | None = None
        self.events = 0
        self.late_pace = self.random.choice(PACES)
        self.main = Actor("the program", {}, 1.0)
        self.actors = [self.main]
        self.current = self.main

    def pause(self, until: Callable[[], bool] | None = None, what: Callable[[], str] = str) -> None:
        """An event: let others go first, at least until ``until`` holds.

        Raises:
            ProtocolError: nobody can go on any more.
        """
        me = self.current
        me.until, me.what = until, what
        self._pass_on(me)
        if self.failure is not None:
            raise self.failure if me is self.main else Stopped
        me.until = None

    def _pass_on(self, me: Actor) -> None:
        chosen = self._next()
        if chosen is None or chosen is me:
            return
        self.current = chosen
        chosen.go.release()
        if not me.done:
            me.go.acquire()

    def _next(self) -> Actor | None:
        """The actor whose turn it is, after whatever lands before; None after a failure."""
        while True:
            self.events += 1
            ready = [a for a in self.actors if not a.done and (a.until is None or a.until())]
            if not ready and not self.late:
                self.fail(ProtocolError("nobody can go on: " + "; ".join(f"{a.name} waits for {a.what()}" for a in self._waiting())))
            elif self.events > PATIENCE:
                self.fail(ProtocolError(f"no end after {PATIENCE} events"))
            if self.failure is not None:
                return None
            weights = [a.pace for a in ready] + [self.late_pace] * bool(self.late)
            at = self.random.choices(range(len(weights)), weights)[0]
            if at < len(ready):
                return ready[at]
            self.late.pop(self.random.randrange(len(self.late)))()

    def _waiting(self) -> list[Actor]:
        others = [a for a in self.actors if not a.done and a is not self.main]
        return others or [self.main]

    def fail(self, error: BaseException) -> None:
        """Keep the first error, and wake everybody to unwind."""
        if self.failure is None:
            self.failure = error
            for actor in self.actors:
                if actor is not self.current:
                    actor.go.release()

    def fork(self, jobs: list[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """Run the jobs as actors, and go on when all have ended; returns their results."""
        results: list[Any] = [None] * len(jobs)
        made = [Actor(name, self.main.clock, self.random.choice(PACES)) for name, _ in jobs]

        def body(at: int) -> None:
            me, job = made[at], jobs[at][1]
            me.go.acquire()
            try:
                if self.failure is None:
                    results[at] = job()
            except Stopped:
                pass
            except BaseException as error:
                self.fail(error)
            me.done = True
            if self.failure is None:
                self._pass_on(me)

        threads = [threading.Thread(target=body, args=(at,), daemon=True, name=actor.name) for at, actor in enumerate(made)]
        self.actors += made
        for thread in threads:
            thread.start()
        try:
            self.pause(lambda: all(actor.done for actor in made), lambda: "its partitions")
        finally:
            for thread in threads:
                thread.join()
        for actor in made:
            self.main.learns(actor.clock)
        return results
