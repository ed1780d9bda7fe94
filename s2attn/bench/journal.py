"""What survives: a record that is written after every case, and what a run that was stopped had begun."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from s2attn.core import StrPath, as_path, write_text

Row = dict[str, Any]
Record = dict[str, Any]

SCHEMA = 2
"""1: errors relative to the largest value of a result. 2: errors row by row (`s2attn.bench.compare.Error`); ``complete``; more columns."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more, so this process can measure nothing more."""


class Journal:
    """The record of one suite, and on disk, when a ``path`` is given, the same after every case.

    Args:
        earlier: the record of a run that was stopped; its cases are not run again.
        state: a file that names the case and the peer that are being run, for whoever watches this process.
        crashes: what is known of runs that were stopped: ``{"case": ..., "peer": ..., "why": ...}`` each.
        tell: called with the rows of each case.
    """

    def __init__(
        self,
        path: StrPath | None = None,
        *,
        earlier: Record | None = None,
        state: StrPath | None = None,
        crashes: Sequence[Row] = (),
        tell: Callable[[Sequence[Row]], object] | None = None,
    ):
        path = None if path is None else as_path("path", path)
        state = None if state is None else as_path("state", state)
        self.path, self.state, self.crashes, self.tell = path, state, list(crashes), tell
        self.rows: list[Row] = list(earlier["rows"]) if earlier else []
        self._before_s = float(earlier["seconds"]) if earlier else 0.0

    def has(self, case: str) -> bool:
        """Whether the case was done by an earlier run."""
        return any(row["case"] == case for row in self.rows)

    def mark(self, case: str, peer: str) -> None:
        """Say what begins now."""
        if self.state is not None:
            write_atomically(self.state, json.dumps({"case": case, "peer": peer}))

    def lost(self, case: str, peer: str, why: str) -> None:
        """Say why this process ends."""
        if self.state is not None:
            write_atomically(self.state, json.dumps({"case": case, "peer": peer, "why": why}))

    def crash_of(self, case: str, peer: str) -> str | None:
        """Why a peer must not be tried in a case: it has stopped a run there, or three runs elsewhere, or all peers together have there."""
        own = [crash for crash in self.crashes if crash["peer"] == peer]
        here = [crash["why"] for crash in self.crashes if crash["case"] == case and crash["peer"] in (peer, "")]
        return here[0] if here else (f"left out: it stopped {len(own)} runs" if len(own) >= 3 else None)

    def add(self, rows: Sequence[Row], record: Record) -> None:
        """Take the rows of a case, and write ``record`` with all rows."""
        self.rows.extend(rows)
        self.write(record)
        if self.tell is not None:
            self.tell(rows)

    def write(self, record: Record) -> Record:
        """Write ``record`` with all rows and the seconds of all runs, and return it."""
        whole = {**record, "seconds": self._before_s + record["seconds"], "rows": self.rows}
        if self.path is not None:
            write_record(whole, self.path)
        return whole


def write_record(record: Record, path: StrPath) -> Path:
    """Write a record as JSON, whole or not at all."""
    path = as_path("path", path)
    return write_atomically(path, json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def read_record(path: StrPath) -> Record:
    """Read a record of any schema so far.

    Raises:
        ValueError: the file is no record.
    """
    path = as_path("path", path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"record must be JSON; got {path}: {error}") from None
    if not isinstance(record, dict) or record.get("schema") not in range(1, SCHEMA + 1) or "rows" not in record:
        raise ValueError(f"record must be a benchmark's record of schema 1 to {SCHEMA}; got {path}")
    return record


def write_atomically(path: StrPath, text: str) -> Path:
    """Write a file so that whoever reads it finds the old text or the new one, never a part."""
    path = as_path("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become None."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
