"""Depth x length maps of scores. Matplotlib is imported on first use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from s2attn.core import StrPath, as_path, bad_value
from s2attn.lab.charts import new_figure, tokens
from s2attn.lab.plot import save_figure
from s2attn.lab.tasks.score import Scores


def heat_map(found: Sequence[Scores], path: StrPath, *, title: str = "") -> Path:
    """Draw the share of exact answers, a panel per task: lengths to the right, depths downward from the start of the context."""
    path = as_path("path", path)
    if not found:
        raise bad_value("found", "must hold one score at least", "none")
    figure, axes = new_figure(len(found), width=1.4 + 0.8 * max(len(one.lengths) for one in found), height=3.6)
    picture = None
    for axis, one in zip(axes, found, strict=True):
        cells = [[one.exact[x][y] for x in range(len(one.lengths))] for y in range(len(one.depths))]
        picture = axis.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.grid(False)
        for y, row in enumerate(cells):
            for x, share in enumerate(row):
                color = "black" if share > 0.6 else "white"
                axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
        axis.set_xticks(range(len(one.lengths)), [tokens(length) for length in one.lengths])
        axis.set_yticks(range(len(one.depths)), [f"{100 * depth:.0f} %" for depth in one.depths])
        axis.set(xlabel="length (tokens)", ylabel="depth", title=f"{one.task}: {100 * one.mean:.0f} %")
    if picture is not None:
        figure.colorbar(picture, ax=axes[-1], label="exact answers")
    if title:
        figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    return path
