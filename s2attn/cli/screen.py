"""What the commands share: the console, tables, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from s2attn.core import Unsupported
from experiments.progress import Show


def console() -> Console:
    """A console on the present standard output."""
    return Console(highlight=False)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what the user got wrong into one line on stderr and exit code 2; everything else keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, Unsupported) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        print(f"s2attn: {'; '.join(lines)}", file=sys.stderr)
        raise typer.Exit(2) from error


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


def table(lines: Sequence[Sequence[str]], title: str = "", right_from: int = 1) -> Table:
    """A table whose first line is its head; columns from ``right_from`` on stand at the right, and the first is never wrapped."""
    made = Table(
        title=f"\n{title}" if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )
    for i, name in enumerate(lines[0]):
        made.add_column(Text(name), justify="right" if i >= right_from else "left", overflow="fold", no_wrap=i == 0)
    for line in lines[1:]:
        made.add_row(*(Text(cell) for cell in line))
    return made


def show_times(rows: Sequence[dict[str, Any]], screen: Console) -> None:
    """Print the medians of benchmark rows, and below them why some are missing."""
    from experiments.report_md import summary_table

    lines, reasons = summary_table(rows)
    screen.print(table([[cell.replace(" ms", "ms").replace(" s", "s") for cell in line] for line in lines], "Attention"))
    for reason in reasons:
        screen.print(f"without a number: {reason}", style="dim", markup=False)
