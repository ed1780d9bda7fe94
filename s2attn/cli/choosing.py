"""``s2attn recall`` and ``s2attn calibrate``: selectors judged, and fitted to a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from s2attn.cli.screen import console, table
from s2attn.core import bad_value
from s2attn.lab.choosing import budget_of, calibrated, methods, model_data, planted_data, read_by, write_thresholds
from s2attn.lab.data import read_corpus
from s2attn.lab.recall import judge, recall_chart, recall_table
from s2attn.lab.train import load_model
from s2attn.lab.training.tokens import read_tokens
from s2attn.selectors import XAttention


def show_recall(
    checkpoint: Path | None, *, text: Path | None, seqlen: int, block: int, thresholds: str, png: Path | None, seed: int
) -> None:
    """Judge the selectors on planted structures, or on a model's q and k; print the table, and perhaps draw it."""
    if text is not None and checkpoint is None:
        raise bad_value("--text", "must come with --checkpoint, whose model reads it", text)
    wanted = methods(block, read_shares(thresholds))
    data = planted_data(seqlen, seed) if checkpoint is None else model_data(load_model(checkpoint), tokens_of(checkpoint, text), seqlen)
    judged = judge(wanted, data)
    print(recall_table(judged, {name: [budget_of(one) for one in budgets] for name, budgets in wanted.items()}))
    if png is not None:
        png.parent.mkdir(parents=True, exist_ok=True)
        print(f"Picture: {recall_chart(judged, png)}")


def run_calibrate(
    checkpoint: Path, out: Path, *, text: Path | None, stride: int, block: int, target: float, windows: int, seqlen: int
) -> None:
    """Fit a table of threshold to a model, write it, and print what it keeps of text that was not used for it."""
    selector = XAttention(stride, block=block)
    layers = read_by(load_model(checkpoint), tokens_of(checkpoint, text), windows=windows, seqlen=seqlen)
    fitted, judged = calibrated(selector, layers, target)
    lines = [["layer", "threshold", "density", "mass kept"]]
    for number, found in enumerate(judged):
        shares = [f"{found['least']:.3f} to {found['most']:.3f}", f"{100 * found['density']:.1f} %", f"{100 * found['kept']:.1f} %"]
        lines.append([str(number), *shares])
    screen = console()
    screen.print(table(lines, f"{100 * target:g} % of the attention mass wanted; judged on {seqlen} tokens that the table has not seen"))
    screen.print(f"Table: [bold]{write_thresholds(fitted, target, out)}[/bold]")


def tokens_of(checkpoint: Path, path: Path | None) -> Tensor:
    """The tokens of a file for this model; of the standard library's files that the demo keeps for validation when None."""
    raw = read_corpus().validation.numpy().tobytes() if path is None else path.read_bytes()
    return torch.tensor(read_tokens(checkpoint, raw))


def read_shares(text: str) -> list[float]:
    """Numbers such as ``"0.5,0.9"``."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise bad_value("--thresholds", "must be numbers separated by commas", repr(text)) from None
