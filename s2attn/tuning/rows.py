"""What all runs share: how much effort a case is worth, rows compared with one another, and errors told apart from a lost device."""

from __future__ import annotations

from dataclasses import dataclass

from s2attn.tuning.clock import Meter
from s2attn.tuning.compare import Error
from s2attn.tuning.journal import DeviceLost, Journal, Row


class Skip(Exception):
    """A peer cannot take part in a case; the text says why and stands in the record."""


@dataclass(frozen=True)
class Effort:
    """How much time a case may take: rounds of the peers in turn, and seconds after which no new round begins."""

    rounds: int = 9
    min_rounds: int = 3
    budget_s: float = 8.0


def compared(rows: list[Row]) -> list[Row]:
    """Add to every timed row its speed-up over each other one, and the fastest dense one's name.

    Rows of attention alone (those with ``pairs``) also get their efficiency: speed-up over the fastest dense one, times density.
    """
    timed = {row["peer"]: row["median_s"] for row in rows if row["status"] == "ok"}
    dense = {row["peer"]: row["median_s"] for row in rows if row["status"] == "ok" and row["dense"]}
    fastest = min(dense, key=dense.__getitem__, default=None)
    for row in rows:
        if row["status"] == "ok":
            row["speedup"] = {name: seconds / row["median_s"] for name, seconds in timed.items() if name != row["peer"]}
            if fastest in row["speedup"]:
                row["dense_peer"] = fastest
                if "pairs" in row:
                    row["efficiency"] = row["speedup"][fastest] * row["density"]
    return rows


def refuse_wrong(error: Error) -> None:
    """Raise `ArithmeticError` for a result that is not right."""
    if not error.within:
        raise ArithmeticError(f"wrong result: error {error.error:.2e} where {error.bound:.2e} is allowed")


def still_there(meter: Meter, journal: Journal, case: str, peer: str, why: str) -> None:
    """Raise `DeviceLost`, and leave a note of it, when the device answers nothing any more."""
    try:
        meter.sync()
    except Exception as error:
        journal.lost(case, peer, f"the device was lost: {why}"[:300])
        raise DeviceLost(f"{peer} in {case}: {why}") from error


def one_line(error: Exception) -> str:
    """An error's kind and the first line of its text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
