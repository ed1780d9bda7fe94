"""Time and memory of calls: several calls timed in turn, and the peak of one call's resident memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls: the median, and the values below which a fifth and four fifths of them lie."""

    median_s: float
    p20_s: float
    p80_s: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """
        >>> Timing.of([3.0, 1.0, 2.0])
        Timing(median_s=2.0, p20_s=1.0, p80_s=3.0, runs=3)
        """
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(ordered[round(0.5 * last)], ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))

    def facts(self) -> dict[str, Any]:
        return asdict(self)


REST_S = 0.01
"""Seconds before a clock starts on a CPU: OpenMP's threads spin for some milliseconds after a call, beside whoever computes next."""


def seconds_of(call: Call) -> float:
    """Wall seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def time_in_turn(
    calls: Mapping[str, Call],
    *,
    rounds: int = 9,
    min_rounds: int = 3,
    budget_s: float = 10.0,
    measure: Callable[[Call], float] = seconds_of,
) -> dict[str, Timing]:
    """Time all ``calls`` A B C A B C ..., so that a slow moment of the machine falls on all of them.

    Args:
        rounds: turns at most.
        min_rounds: turns at least, however long they take.
        budget_s: after so many seconds no new turn begins.
        measure: seconds of one call, by the clock that suits the device.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= min_rounds and time.perf_counter() - began > budget_s:
            break
        for name, call in calls.items():
            taken[name].append(measure(call))
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


def peak_bytes(call: Call) -> int | None:
    """By how much the process's resident memory rises above its level before, while ``call`` runs; None where Linux cannot say.

    Freed memory is handed back to the system first, so that the call cannot hide in it.
    """
    reset = Path("/proc/self/clear_refs")
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return None  # another C library: what it keeps to itself would be counted as free
    try:
        reset.write_text("5")
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


@dataclass(frozen=True)
class Armed:
    """A call that is ready to be timed, and how: ``"wall"`` seconds, ``"events"`` around it, or a ``"graph"`` of it between events.

    ``note`` says why it is not timed the way it should be.
    """

    call: Call
    how: str
    note: str = ""


class Meter:
    """Time and memory on a CPU; `s2attn.tuning.cuda.CudaMeter` is the one for a graphics card."""

    device = "cpu"

    def sync(self) -> None:
        """Wait for all work that was handed out."""

    def tidy(self) -> None:
        """Give memory back that nobody holds."""
        gc.collect()

    def begin(self, start: Call) -> None:
        """Do what a call needs before it can be repeated."""
        start()

    def arm(self, call: Call, start: Call, graph: bool | None = None) -> Armed:
        """Make ``call``, which needs ``start`` once before it, ready to be timed.

        Args:
            graph: whether the call becomes a graph where the device has them: short calls do when None.
        """
        self.begin(start)
        return Armed(call, "wall")

    def seconds(self, call: Call) -> float:
        """Seconds of one call, after a rest."""
        time.sleep(REST_S)
        return seconds_of(call)

    def first_seconds(self, call: Call) -> float:
        """Seconds of a first call, to the end of its work."""
        began = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - began

    def host_seconds(self, call: Call) -> float | None:
        """Seconds until a call returns while the device still works; None where the two are the same."""
        return None

    def peak_bytes(self, call: Call) -> int | None:
        """By how much memory rises above its level before, while ``call`` runs."""
        return peak_bytes(call)

    def allocated_bytes(self) -> int | None:
        """Memory that is in use now; None where nobody says."""
        return None

    def free_bytes(self) -> int | None:
        """Memory that could still be taken; None where others would feel it."""
        return None
