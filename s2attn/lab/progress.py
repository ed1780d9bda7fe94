"""Where long work reports to: a screen, and a file with a line of JSON for each event."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from s2attn.core import write_text

Record = dict[str, Any]


class Show(Protocol):
    """Where a long command reports to while it runs; the command line draws it, tests stay silent."""

    def stage(self, title: str) -> None: ...

    def note(self, text: str) -> None: ...

    def begin(self, total: int, unit: str) -> None: ...

    def advance(self, text: str = "") -> None: ...

    def end(self) -> None: ...


class Silent(Show):
    """Says nothing."""

    def stage(self, title: str) -> None: ...

    def note(self, text: str) -> None: ...

    def begin(self, total: int, unit: str) -> None: ...

    def advance(self, text: str = "") -> None: ...

    def end(self) -> None: ...


@dataclass
class Metrics:
    """Every event of a run as one line of JSON.

    Attributes:
        after: keep the lines of an earlier run up to this step, and go on behind them; start anew when it is None.
    """

    path: Path
    entries: list[Record] = field(default_factory=list)
    after: int | None = None

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if self.after is None or not self.path.is_file() else self._lines(self.after)
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def _lines(self, last: int) -> list[str]:
        """The whole lines of the file that belong to steps up to ``last``; a kill may have left half a line."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            if step <= last:
                kept.append(line)
        return kept

    def write(self, entry: Record) -> None:
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
