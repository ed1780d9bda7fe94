"""What the commands of the experiments share: stages with progress bars, and the table of measured times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.progress import Show
from experiments.report_md import summary_table
from s2attn.cli.screen import table


class Screen(Show):
    """Stages as headings, work as progress bars."""

    def __init__(self, screen: Console):
        self.screen = screen
        self.progress: Progress | None = None

    def stage(self, title: str) -> None:
        self.screen.print(f"\n[bold]{title}[/bold]")

    def note(self, text: str) -> None:
        self.screen.print(f"  {text}", markup=False)

    def begin(self, total: int, unit: str) -> None:
        columns = (TextColumn("  "), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.description}"), console=self.screen, transient=True)
        self.progress.add_task("", total=total)
        self.progress.start()

    def advance(self, text: str = "") -> None:
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], advance=1, description=text)

    def end(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.progress = None


def show_times(rows: Sequence[dict[str, Any]], screen: Console) -> None:
    """Print the medians of benchmark rows, and below them why some are missing."""
    lines, reasons = summary_table(rows)
    screen.print(table([[cell.replace(" ms", "ms").replace(" s", "s") for cell in line] for line in lines], "Attention"))
    for reason in reasons:
        screen.print(f"without a number: {reason}", style="dim", markup=False)
