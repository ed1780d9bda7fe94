"""Pictures of a demo or a benchmark: losses, times and memory over length. Matplotlib is imported on first use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2attn.core import StrPath, as_path
from s2attn.lab.plot import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

COLORS = {"dense": "#8a8f98", "sdpa": "#8a8f98", "s2": "#1668b8", "s2attn": "#1668b8", "flex": "#d9822b"}
NAMES = {"sdpa": "dense, torch SDPA", "s2attn": "S2, s2attn", "flex": "S2, compiled FlexAttention", "dense": "dense", "s2": "S2 hybrid"}
OPS = {"forward": "forward", "forward_backward": "forward + backward"}


def new_figure(columns: int = 1, width: float = 6.4, height: float = 4.2, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels of ``width`` x ``height`` inches, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=130, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def loss_chart(history: Mapping[str, Sequence[Record]], path: StrPath) -> Path:
    """Training loss (faint: every step; strong: running mean) and validation loss of every run, in nats per byte."""
    path = as_path("path", path)
    figure, (left, right) = new_figure(2)
    for i, (name, entries) in enumerate(history.items()):
        color, label, width = COLORS.get(name), NAMES.get(name, name), 3.2 if i == 0 else 1.6
        steps = [entry["step"] for entry in entries if "loss" in entry]
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        left.plot(steps, losses, color=color, alpha=0.2, linewidth=0.7)
        left.plot(steps, smooth(losses), color=color, linewidth=width, label=f"{label} (running mean)")
        checks = [(entry["step"], entry["validation_loss"]) for entry in entries if "validation_loss" in entry]
        right.plot(
            *zip(*checks, strict=True), "o-", color=color, markersize=4 + width, linewidth=width, label=f"{label}: {checks[-1][1]:.3f}"
        )
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="training: same data, same order, same start")
    right.set(xlabel="step", ylabel="loss (nats per byte)", title="validation: files that neither has seen")
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=9, loc="upper right")
    save_figure(figure, path)
    return path


def smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Running mean that forgets: each new value weighs ``1 - keep``, corrected for the start.

    >>> smooth([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(round(total / weight, 12))
    return means


def timed_rows(rows: Sequence[Record], peer: str, op: str, key: str = "median_s") -> list[Record]:
    """The rows of one peer and op that have a number, by length."""
    found = [row for row in rows if row.get("peer") == peer and row.get("op") == op and row.get(key) is not None]
    return sorted(found, key=lambda row: row["seqlen"])


def times_chart(rows: Sequence[Record], path: StrPath) -> Path:
    """Median milliseconds over length, a panel per op, a line per peer, with p20 to p80 shaded; both axes logarithmic."""
    path = as_path("path", path)
    ops = [op for op in OPS if any(timed_rows(rows, peer, op) for peer in NAMES)]
    figure, axes = new_figure(max(1, len(ops)))
    for axis, op in zip(axes, ops, strict=False):
        for peer in ("sdpa", "flex", "s2attn"):
            found = timed_rows(rows, peer, op)
            if not found:
                continue
            lengths = [row["seqlen"] for row in found]
            axis.plot(lengths, [1e3 * row["median_s"] for row in found], "o-", color=COLORS[peer], label=NAMES[peer])
            low, high = ([1e3 * row[key] for row in found] for key in ("p20_s", "p80_s"))
            axis.fill_between(lengths, low, high, color=COLORS[peer], alpha=0.18, linewidth=0)
        _length_axis(axis, rows)
        _plain_log_scale(axis)
        axis.set(ylabel="milliseconds (median)", title=OPS[op])
        axis.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
    return path


def memory_chart(rows: Sequence[Record], path: StrPath) -> Path:
    """Peak memory of a call over length, measured; dotted, what one head's S x S scores would take."""
    path = as_path("path", path)
    ops = [op for op in OPS if any(timed_rows(rows, peer, op, "peak_bytes") for peer in NAMES)]
    figure, axes = new_figure(max(1, len(ops)))
    for axis, op in zip(axes, ops, strict=False):
        for peer in ("sdpa", "flex", "s2attn"):
            found = timed_rows(rows, peer, op, "peak_bytes")
            if found:
                axis.plot(
                    [row["seqlen"] for row in found],
                    [row["peak_bytes"] / 2**20 for row in found],
                    "o-",
                    color=COLORS[peer],
                    label=NAMES[peer],
                )
        lengths = sorted({row["seqlen"] for row in rows if row.get("op") == op})
        axis.plot(lengths, [4 * n * n / 2**20 for n in lengths], ":", color="#b3261e", label="one head's S x S scores")
        _length_axis(axis, rows)
        _plain_log_scale(axis)
        axis.set(ylabel="MiB above the level before", title=f"{OPS[op]}: peak memory")
        axis.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
    return path


def _plain_log_scale(axis: Axes) -> None:
    """A logarithmic y axis with ticks 1, 2, 5, 10, ... written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _length_axis(axis: Axes, rows: Sequence[Record]) -> None:
    lengths = sorted({row["seqlen"] for row in rows if row.get("op") in OPS})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [tokens(n) for n in lengths], minor=False)
    axis.minorticks_off()
    axis.set_xlabel("context length (tokens)")


def tokens(n: int) -> str:
    """A number of tokens, short.

    >>> tokens(16384), tokens(1 << 20), tokens(1000)
    ('16k', '1M', '1000')
    """
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)
