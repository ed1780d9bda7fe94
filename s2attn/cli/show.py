"""``s2attn show``: read a pattern from a word, a file or an expression, judge it, draw it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from s2attn.analysis.describe import describe
from s2attn.analysis.report import Report
from s2attn.analysis.words import read_what
from s2attn.cli.screen import console, table
from s2attn.layout import build_layout
from s2attn.layout.draw import draw
from s2attn.patterns import Pattern, Recipe

WIDTH = 32
"""Characters of a drawn head, so that two of them stand side by side on 80 columns."""
MOST_HEADS = 8


@dataclass(frozen=True)
class Asked:
    """The options of the command."""

    heads: int = 8
    kv_heads: int | None = None
    seqlen: int = 4096
    layers: int = 1
    layer: int = 0
    ranks: int | None = None


def show_pattern(what: str, asked: Asked, *, png: Path | None = None, as_json: bool = False) -> None:
    """Print the report of a pattern, draw its heads as text, and perhaps write a picture."""
    pattern = read_what(what)
    report = describe(pattern, asked.heads, asked.kv_heads, asked.seqlen, layers=asked.layers, ranks=asked.ranks)
    if png is not None:
        from s2attn.analysis.plot import plot

        plot(pattern, asked.heads, asked.kv_heads, asked.seqlen, png, layer=asked.layer)
    if as_json:
        spec = json.loads(pattern.to_json())
        print(json.dumps({"spec": spec, "report": report.to_dict(), "png": str(png) if png else None}, indent=1))
        return
    screen = console()
    screen.print(Text(repr(pattern), style="bold"))
    screen.print(table(figures(report), right_from=2))
    if report.context is not None:
        screen.print(table(report.context.table, report.context.title, right_from=3))
    for sentence in report.warnings:
        screen.print(Text(f"- {sentence}", style="yellow"))
    for one in report.advice:
        screen.print(Text(f"- {one}\n  {one.test}", style="dim"))
    *panels, (_, legend) = drawings(pattern, asked, report.block)
    screen.print(Columns([Panel.fit(Text(picture, no_wrap=True), title=title) for title, picture in panels[:MOST_HEADS]]))
    legend += "; heads that look alike share a picture"
    more = f" ({len(panels) - MOST_HEADS} more kinds of heads are not drawn)" if len(panels) > MOST_HEADS else ""
    screen.print(Text(f"layer {asked.layer}; {legend}{more}", style="dim"))
    if png is not None:
        screen.print(f"Picture: [bold]{png}[/bold]")


def figures(report: Report) -> list[list[str]]:
    """What the report found, as lines of name and value."""
    shape = f"{report.num_heads} query heads, {report.num_kv_heads} KV heads, {report.seqlen:,} tokens, {report.layers} layer"
    lines = [
        ["figure", "value"],
        ["shape", shape + ("s" if report.layers > 1 else "") + f", blocks of {report.block}"],
        ["density", f"{100 * report.density:.2f} % of the causal triangle, {100 * report.density_square:.2f} % of the square"],
        ["ideal speed-up", f"{report.ideal_speedup:.2f}x over dense"],
        ["listed blocks per head", f"{report.listed.min:,} to {report.listed.max:,}, mean {report.listed.mean:,.0f}"],
        ["forward", f"{report.flops_forward / 1e9:,.2f} GFLOP; dense {report.dense_flops_forward / 1e9:,.2f}"],
        ["block lists", size(report.layout_bytes)],
    ]
    if report.cache_bytes is not None:
        lines.append(["KV cache after eviction", f"{size(report.cache_bytes)} of {size(report.dense_cache_bytes)}"])
    if report.kv_efficient is not None:
        lines.append(["KV-efficient", "yes" if report.kv_efficient else f"no: {report.counter_example}"])
    lines.append(["complete", f"{'yes' if report.complete else 'no'}: heads and layers together read {report.cover}"])
    through = ", ".join(f"{seen:,}" for seen in report.reach.blocks[:12])
    lines.append(["reach by layer", f"{through} of {report.reach.total:,} blocks"])
    return lines


def size(count: float) -> str:
    """Bytes with a unit that suits them.

    >>> size(1536), size(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count:.0f} bytes"


def drawings(pattern: Pattern | Recipe, asked: Asked, block: int) -> list[tuple[str, str]]:
    """Title and drawing of every head that differs from those before it, and the legend last, with an empty title."""
    one = pattern.pattern(asked.layer) if isinstance(pattern, Recipe) else pattern
    layout = build_layout(one, asked.heads, asked.kv_heads, seqlen_q=asked.seqlen, block=block, layer=asked.layer)
    pictures: dict[str, list[int]] = {}
    for head in range(layout.heads):
        pictures.setdefault(draw(layout, head, WIDTH), []).append(head)
    kind = "head" if layout.heads == asked.heads else "KV head"
    legend = next(iter(pictures)).rpartition("\n")[2]
    return [*((head_names(kind, which), picture.rpartition("\n")[0]) for picture, which in pictures.items()), ("", legend)]


def head_names(kind: str, heads: list[int]) -> str:
    """
    >>> head_names("head", [3]), head_names("head", [0, 1, 2]), head_names("head", [0, 2, 4, 6, 8])
    ('head 3', 'heads 0, 1, 2', 'heads 0, 2, ... 8')
    """
    if len(heads) == 1:
        return f"{kind} {heads[0]}"
    named = ", ".join(map(str, heads)) if len(heads) <= 4 else f"{heads[0]}, {heads[1]}, ... {heads[-1]}"
    return f"{kind}s {named}"
