"""What the commands share: the console, tables, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2attn.core import Unsupported


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
