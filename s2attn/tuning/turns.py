"""Contestants of one case: each made ready and checked behind a guard, and all that are ready timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2attn.tuning.clock import Call, Meter, Timing, time_in_turn
from s2attn.tuning.compare import Error
from s2attn.tuning.journal import Journal, Row
from s2attn.tuning.rows import Effort, Skip, one_line, still_there

LATE = "the time for all timings was over"


@dataclass
class Ready:
    """A contestant whose result was found right.

    Attributes:
        call: what is timed.
        facts: what is known of it beside its time.
        graph: as in `s2attn.tuning.clock.Meter.arm`.
        worth: what its time is worth, as columns: called with the timing.
    """

    call: Call
    facts: Row
    graph: bool | None = None
    worth: Callable[[Timing], Row] = lambda timing: {}


@dataclass
class Turns:
    """The contestants of the case that is called ``case``: those that are ready, and why the others are not.

    Attributes:
        deadline: nobody begins after it, in seconds of ``time.perf_counter``.
    """

    case: str
    meter: Meter
    journal: Journal
    deadline: float = float("inf")
    ready: dict[str, Ready] = field(default_factory=dict)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)

    def enter(self, name: str, make: Callable[[], Ready]) -> None:
        """Make a contestant ready; one that breaks must not take the others' numbers with it."""
        crash = self.journal.crash_of(self.case, name)
        if crash is not None:
            self.missing[name] = ("failed", crash)
        elif time.perf_counter() > self.deadline:
            self.missing[name] = ("skipped", LATE)
        else:
            self.journal.mark(self.case, name)
            self._guarded(name, lambda: self.ready.update({name: make()}))

    def time(self, effort: Effort, measure: Callable[[Call], float] | None = None) -> dict[str, Timing]:
        """Time all that are ready, in turn; what cannot even be started is missing then.

        Args:
            measure: seconds of one call; the meter's own way when None.
        """
        armed: dict[str, Call] = {}
        for name, one in list(self.ready.items()):
            self.journal.mark(self.case, name)
            self._guarded(name, lambda name=name, one=one: armed.update({name: self._arm(one)}))
        self.journal.mark(self.case, "")
        rounds, least, budget = effort.rounds, effort.min_rounds, effort.budget_s
        return time_in_turn(armed, rounds=rounds, min_rounds=least, budget_s=budget, measure=measure or self.meter.seconds)

    def rows(self, names: Sequence[str], facts: Row, timings: dict[str, Timing]) -> list[Row]:
        """A row for each name: its numbers, or the reason why there are none."""
        made: list[Row] = []
        for name in names:
            own: Row = {**facts, "peer": name}
            if name in self.missing:
                made.append({**own, "status": self.missing[name][0], "why": self.missing[name][1]})
                continue
            one, timing = self.ready[name], timings[name]
            made.append({**own, "status": "ok", **one.facts, **one.worth(timing), **timing.facts()})
        return made

    def _arm(self, one: Ready) -> Call:
        armed = self.meter.arm(one.call, lambda: None, graph=one.graph)
        one.facts["timed_by"] = armed.how
        notes = [note for note in (one.facts.get("note"), armed.note) if note]
        if notes:
            one.facts["note"] = "; ".join(notes)
        return armed.call

    def _guarded(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
            return
        except Skip as why:
            self.missing[name] = ("skipped", str(why))
        except Exception as error:
            self.missing[name] = ("failed", one_line(error))
        self.ready.pop(name, None)
        still_there(self.meter, self.journal, self.case, name, self.missing[name][1])
        self.meter.tidy()


def error_facts(error: Error) -> Row:
    """An error and its bound, as columns."""
    return {"error": error.error, "error_bound": error.bound}
