"""`plot`: what the heads read, side by side, as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2attn.core import Unsupported, bad_kind, bad_value, check_int
from s2attn.lab.raster import Raster, last_blocks, raster_of
from s2attn.lab.stack import stack_of
from s2attn.layout import Layout, build_layout, dense_pairs
from s2attn.layout.entries import first_with_same_lists
from s2attn.patterns import Pattern, Recipe
from s2attn.patterns.runs import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FULL = np.array([0.14, 0.30, 0.53])
_PARTIAL = np.array([0.93, 0.55, 0.23])
_EMPTY = np.array([0.975, 0.975, 0.965])
_FUTURE = np.array([0.90, 0.90, 0.89])
_INK, _FAINT = "#2b2b2b", "#6f6f6f"
_PIXELS = 512
_GAMMA = 0.55  # a pixel of which a twentieth is read must still be seen
_MOST_COLUMNS = 4
MOST_PANELS, MOST_DPI = 64, 600
"""A picture of so many panels at so many pixels per inch has some hundred million pixels."""
_CLOSER = 64  # blocks on a side of the closer look


def plot(
    pattern: Pattern | Recipe | Layout,
    num_heads: int = 8,
    num_kv_heads: int | None = None,
    seqlen: int | None = None,
    path: str | Path = "s2attn.png",
    *,
    block: int | None = None,
    causal: bool = True,
    layer: int = 0,
    panels: int = 8,
    dpi: int = 150,
) -> Path:
    """Draw which keys the heads read, one panel for every distinct head, and write the picture to ``path``.

    Up to 512 tokens every token is drawn, up to 512 blocks every block, and above that the share of the blocks that is read; nothing
    larger than the picture is made on the way.

    Args:
        pattern: a pattern, a recipe (then layer ``layer`` of it), or a layout.
        num_heads, num_kv_heads: heads of the call; a layout brings its own.
        seqlen: tokens (4096 by default); a layout brings its own.
        path: file to write; its ending says the format (png, svg, pdf).
        block, causal, layer: as in `build_layout`.
        panels: at most so many panels; the title says how many heads were left out.
        dpi: pixels per inch.

    Returns:
        The path.

    Raises:
        Unsupported: matplotlib is not installed.
        ValueError, TypeError: naming the argument, the rule and what came.
    """
    panels, dpi = check_int("panels", panels, 1), check_int("dpi", dpi, 20)
    if panels > MOST_PANELS or dpi > MOST_DPI:
        raise bad_value("panels and dpi", f"must be at most {MOST_PANELS} and {MOST_DPI}", (panels, dpi))
    path = checked_path(path)
    if isinstance(pattern, Layout):
        if seqlen is not None or block is not None:
            raise bad_value("seqlen and block", "must be left out when a Layout is given", (seqlen, block))
        layout, name, kind = pattern, repr(pattern), "head"
    else:
        seqlen = 4096 if seqlen is None else seqlen
        # The same checks, and the same default block, as `describe` has.
        block = stack_of(pattern, num_heads, num_kv_heads, seqlen, block=block, causal=causal, layer=layer).block
        one = pattern.pattern(layer) if isinstance(pattern, Recipe) else pattern
        layout, name = build_layout(one, num_heads, num_kv_heads, seqlen, block=block, causal=causal, layer=layer), repr(one)
        kind = "KV head" if layout.heads == (num_kv_heads or num_heads) else "query head"
    figure = _figure(layout, name, panels, kind, layer)
    figure.savefig(path, dpi=dpi, facecolor="white")
    return path


def checked_path(path: Any) -> Path:
    if not isinstance(path, (str, Path)):
        raise bad_kind("path", "must be a string or a Path", path)
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise bad_value("path", "must end in .png, .svg or .pdf", repr(path.name))
    if not path.absolute().parent.is_dir():
        raise bad_value("path", "must lie in a folder that exists", repr(str(path)))
    return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to nobody else: no window, no state shared with the caller's own plots.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        reason = "matplotlib is not installed; pip install 's2attn[lab]' brings it"
        raise Unsupported("plot cannot draw", {"matplotlib": [reason]}) from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True)
class _Page:
    """Where everything lies, in inches from the upper left corner."""

    panels: int
    title_lines: int
    side: float

    left = 0.72
    gap_x = 0.5
    gap_y = 0.62
    foot = 0.86

    @property
    def columns(self) -> int:
        return min(_MOST_COLUMNS, self.panels)

    @property
    def head(self) -> float:
        return 0.82 + 0.23 * self.title_lines

    @property
    def width(self) -> float:
        return self.left + self.columns * self.side + (self.columns - 1) * self.gap_x + 0.22

    @property
    def height(self) -> float:
        rows = -(-self.panels // self.columns)
        return self.head + rows * self.side + (rows - 1) * self.gap_y + self.foot

    def box(self, number: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel, as shares of the figure."""
        row, column = divmod(number, self.columns)
        x = self.left + column * (self.side + self.gap_x)
        y = self.head + row * (self.side + self.gap_y)
        return x / self.width, 1 - (y + self.side) / self.height, self.side / self.width, self.side / self.height


def _figure(layout: Layout, name: str, panels: int, kind: str, layer: int) -> Figure:
    kinds = _kinds(layout)
    shown = list(kinds.items())[:panels]
    side = {1: 5.4, 2: 3.9, 3: 3.3}.get(len(shown), 2.9)
    wide = _Page(len(shown), 1, side).width
    title = textwrap.wrap(name, int(wide * 10))
    title = title if len(title) <= 3 else [*title[:2], title[2] + " ..."]
    page = _Page(len(shown), len(title), side)
    figure = new_figure(page.width, page.height)
    figure.text(0.5, 1 - 0.15 / page.height, "\n".join(title), ha="center", va="top", fontsize=11.5, color=_INK, linespacing=1.3)
    below = 1 - (0.22 + 0.23 * len(title)) / page.height
    figure.text(0.5, below, _subtitle(layout, layer, len(kinds), len(shown)), ha="center", va="top", fontsize=8.5, color=_FAINT)
    rasters = [raster_of(layout, head, _PIXELS) for head, _ in shown]
    for number, ((head, same), raster) in enumerate(zip(shown, rasters, strict=True)):
        axes = figure.add_axes(page.box(number))
        _panel(axes, layout, raster)
        _closer_look(axes, layout, head)
        share = int(layout.pairs[head]) / max(1, dense_pairs(layout))
        axes.set_title(f"{_heads(same, layout.heads, kind)} · {100 * share:.3g} %", fontsize=9.5, color=_INK, pad=5)
        if number % page.columns == 0:
            axes.set_ylabel("query (tokens)", fontsize=8.5, color=_FAINT)
        if number + page.columns >= len(shown):
            axes.set_xlabel("key (tokens)", fontsize=8.5, color=_FAINT)
    _legend(figure, rasters[0], 0.1 / page.height)
    return figure


def _closer_look(axes: Axes, layout: Layout, head: int) -> None:
    """The last rows, block by block, in the empty corner above the diagonal: heads that look alike from afar differ here."""
    if layout.packed or not layout.causal or layout.seqlen_q != layout.seqlen_k or len(layout.k_spans) < 4 * _CLOSER:
        return
    close = last_blocks(layout, head, _CLOSER)
    inset = axes.inset_axes((0.52, 0.54, 0.46, 0.46 * 0.94))
    inset.imshow(colours(close), interpolation="nearest", aspect="auto")
    inset.set_xticks([])
    inset.set_yticks([])
    inset.set_xlabel(f"last {_tokens(_CLOSER * layout.block)} tokens", fontsize=7, color=_FAINT, labelpad=2)
    for spine in inset.spines.values():
        spine.set(linewidth=0.6, color="#8f8f8f")


def _kinds(layout: Layout) -> dict[int, list[int]]:
    """First head of every distinct kind -> the heads of that kind."""
    kinds: dict[int, list[int]] = {}
    for head, first in enumerate(first_with_same_lists(layout.rows)):
        kinds.setdefault(first, []).append(head)
    return kinds


def _heads(same: list[int], total: int, name: str) -> str:
    if len(same) == 1:
        return f"{name} {same[0]}"
    if len(same) == total:
        return f"all {total} {name}s"
    if same[-1] - same[0] == len(same) - 1:
        return f"{name}s {same[0]}-{same[-1]}"
    return f"{name}s {', '.join(map(str, same[:3]))}{' ...' if len(same) > 3 else ''}"


def _subtitle(layout: Layout, layer: int, kinds: int, shown: int) -> str:
    density = float(layout.pairs.double().mean()) / max(1, dense_pairs(layout))
    lengths = (
        f"{layout.seqlen_k:,} tokens" if layout.seqlen_q == layout.seqlen_k else f"{layout.seqlen_q:,} queries, {layout.seqlen_k:,} keys"
    )
    over = "the causal triangle" if layout.causal else "all pairs"
    parts = [lengths, f"block {layout.block}", f"density {100 * density:.3g} % of {over} (mean of all heads)"]
    if layer:
        parts.insert(0, f"layer {layer}")
    if layout.packed:
        parts.insert(1, f"{int(layout.k_spans.seq.max()) + 1 if len(layout.k_spans) else 0} sequences")
    if kinds > shown:
        parts.append(f"{shown} of {kinds} different heads")
    return " · ".join(parts)


def _panel(axes: Axes, layout: Layout, raster: Raster) -> None:
    picture = colours(raster)
    extent = (0, raster.key_tokens, raster.query_tokens, 0)
    shrunk = raster.full.shape[0] > 200
    axes.imshow(picture, extent=extent, interpolation="antialiased" if shrunk else "nearest", aspect="auto", rasterized=True)
    axes.set_xlim(0, max(1, layout.seqlen_k))
    axes.set_ylim(max(1, layout.seqlen_q), 0)
    axes.set_box_aspect(1)
    for axis, length in ((axes.xaxis, layout.seqlen_k), (axes.yaxis, layout.seqlen_q)):
        ticks = token_ticks(length)
        axis.set_ticks(ticks, [_tokens(tick) for tick in ticks])
    axes.tick_params(labelsize=7.5, colors=_FAINT, length=2.5, width=0.6)
    for spine in axes.spines.values():
        spine.set(linewidth=0.6, color="#b5b5b5")


def colours(raster: Raster) -> Array:
    """The picture ``(rows, columns, 3)`` in 0 .. 1: what is read fades in over empty or, after the query, grey."""
    share = np.clip(raster.full + raster.partial, 0, 1)
    strength = (share**_GAMMA)[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        mix = np.nan_to_num(raster.partial / (raster.full + raster.partial))[..., None]
    ground = np.where(raster.future[..., None], _FUTURE, _EMPTY)
    return ground * (1 - strength) + ((1 - mix) * _FULL + mix * _PARTIAL) * strength


def token_ticks(length: int) -> Sequence[int]:
    """At most five round numbers of tokens, from 0.

    >>> token_ticks(4096), token_ticks(131072), token_ticks(100)
    ([0, 1024, 2048, 3072, 4096], [0, 32768, 65536, 98304, 131072], [0, 32, 64, 96])
    """
    step = 1
    while step * 4 < length:
        step *= 2
    return list(range(0, length + 1, step))


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


_LABELS = {
    "token": ("read, full block", "read, partial block"),
    "block": ("block read in full", "block read in part"),
    "share of blocks": ("blocks read in full (darker: more)", "blocks read in part"),
}


def _legend(figure: Figure, raster: Raster, bottom: float) -> None:
    from matplotlib.patches import Patch

    full, partial = _LABELS[raster.unit]
    kinds = [(_FULL, full), (_PARTIAL, partial), (_EMPTY, "not read")]
    if raster.future.any():
        kinds.append((_FUTURE, "after the query"))
    handles = [Patch(facecolor=tuple(colour), edgecolor="#b5b5b5", linewidth=0.6, label=label) for colour, label in kinds]
    style = {"fontsize": 8, "frameon": False, "handlelength": 1.4, "columnspacing": 1.6, "ncols": len(handles)}
    legend = figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, bottom), **style)
    for text in legend.get_texts():
        text.set_color(_FAINT)
