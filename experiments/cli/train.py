"""``python -m experiments train``: a run from a configuration file, with a progress bar and a table at its end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.cli.screen import Screen
from experiments.progress import Silent
from experiments.training.config import read_config
from experiments.training.job import run_training
from s2attn.cli.screen import console, table


def show_training(path: Path | None, changes: Sequence[str], *, resume: bool) -> None:
    """Train as the file and the changes say; under torchrun the first process alone speaks."""
    config = read_config(path, changes)
    first = os.environ.get("RANK", "0") == "0"
    screen = console()
    results = run_training(config, Screen(screen) if first else Silent(), resume=resume)
    if first:
        screen.print(table(lines_of(results), "Result"))
        screen.print(f"\nCheckpoint: {results['checkpoint']}", markup=False, soft_wrap=True)


def lines_of(results: dict[str, Any]) -> list[list[str]]:
    """The summary as the lines of a table."""
    return [
        ["", "value"],
        ["steps", f"{results['steps']:,}"],
        ["weights", f"{results['parameters']:,}"],
        ["tokens read", f"{results['tokens_read']:,}"],
        ["validation loss, nats per token", f"{results['validation_loss']:.4f}"],
        ["bits per byte", f"{results['bits_per_byte']:.4f}"],
        ["tokens per second", f"{results['tokens_per_second']:,.0f}"],
    ]
