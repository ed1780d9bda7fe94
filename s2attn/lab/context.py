"""`describe_context` and `plot_context`: what context parallelism moves and holds, for any number of ranks, as a table and a picture."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.distributed.balance import balanced_shards
from s2attn.distributed.shards import Shards
from s2attn.distributed.traffic import WAYS, Traffic, ask, traffic_of
from s2attn.lab.stack import check_sizes
from s2attn.lab.text import amount
from s2attn.patterns import Pattern, Recipe

MOST_RANKS = 65536


@dataclass(frozen=True)
class WayReport:
    """Bytes of one way, for all described layers together (batch 1).

    Attributes:
        way: "all-gather", "exchange" or "ring".
        forward, backward: what the busiest rank sends or receives in each direction, the larger of the two.
        forward_mean, backward_mean: the mean over ranks.
        held: K and V that a rank has room for at one time, in one layer, the most of any rank.
    """

    way: str
    forward: int
    backward: int
    forward_mean: float
    backward_mean: float
    held: int


@dataclass(frozen=True)
class ShardingReport:
    """One way to deal out tokens: ``imbalance`` is the listed blocks of the busiest rank over the mean of all ranks."""

    sharding: str
    imbalance: float
    ways: tuple[WayReport, ...]

    def way(self, name: str) -> WayReport:
        """The figures of one way."""
        return next(one for one in self.ways if one.way == name)


@dataclass(frozen=True)
class ContextReport:
    """What `describe_context` found; ``str(report)`` is a table, ``report.to_dict()`` plain JSON values."""

    seqlen: int
    ranks: int
    layers: int
    shardings: tuple[ShardingReport, ...]

    def sharding(self, name: str) -> ShardingReport:
        """The figures of one sharding: "contiguous", "zigzag" or "balanced"."""
        return next(one for one in self.shardings if one.sharding == name)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values."""
        return dataclasses.asdict(self)

    @property
    def title(self) -> str:
        """What was asked, and what the table's numbers are."""
        layers = "" if self.layers == 1 else f", {self.layers} layers together"
        asked = f"{self.seqlen:,} tokens on {self.ranks:,} ranks{layers}"
        return f"context parallelism: {asked}; of the busiest rank, work over the mean and bytes"

    @property
    def table(self) -> list[list[str]]:
        """Heading and one line for each sharding and way."""
        lines = [["sharding", "work", "way", "forward", "mean", "backward", "mean", "held"]]
        for sharding in self.shardings:
            names = [sharding.sharding, f"{sharding.imbalance:.3f}"]
            for one in sharding.ways:
                numbers = (one.forward, one.forward_mean, one.backward, one.backward_mean, one.held)
                lines.append([*names, one.way, *(amount(round(number), "B", 1024) for number in numbers)])
                names = ["", ""]
        return lines

    def __str__(self) -> str:
        lines = self.table
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        left = (0, 2)
        padded = [[f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line)] for line in lines]
        return "\n".join([self.title, *("  ".join(line).rstrip() for line in padded)])


def describe_context(
    pattern: Pattern | Recipe,
    num_heads: int,
    num_kv_heads: int | None = None,
    seqlen: int | None = None,
    *,
    ranks: int,
    layers: int = 1,
    block: int | None = None,
    causal: bool = True,
    head_dim: int = 128,
    dtype_bytes: int = 2,
    layer: int = 0,
) -> ContextReport:
    """Count the bytes that each way of context parallelism moves and holds, under each sharding; sizes that fit nowhere are welcome.

    Intervals are counted, not tokens: ten million tokens on a thousand ranks take seconds, and no process group.

    Args:
        pattern: a pattern or a recipe; num_heads, num_kv_heads, layers, block, causal, layer, head_dim, dtype_bytes: as of `describe`.
        seqlen: tokens of all ranks, a multiple of ``ranks``. A sharding that needs more (zigzag ``2 * ranks``, balanced ``ranks * block``)
            is left out where that does not hold.
        ranks: how many ranks share the sequence.

    >>> from s2attn.patterns import Sink, Window
    >>> print(describe_context(Sink(64) | Window(1024), 8, 8, 1 << 20, ranks=64))
    context parallelism: 1,048,576 tokens on 64 ranks; of the busiest rank, work over the mean and bytes
    sharding     work  way          forward      mean  backward      mean      held
    contiguous  1.001  all-gather  3.94 GiB  3.94 GiB  7.88 GiB  7.88 GiB  4.00 GiB
                       exchange    19.8 MiB  4.49 MiB  19.8 MiB  4.49 MiB  68.2 MiB
    ...
    """
    ranks, layers, layer = check_int("ranks", ranks, 1), check_int("layers", layers, 1), check_int("layer", layer, 0)
    check_sizes(check_int("num_heads", num_heads, 1), layers)
    if ranks > MOST_RANKS:
        raise bad_value("ranks", f"must be at most {MOST_RANKS}", ranks)
    seqlen = check_int("seqlen", seqlen, 1)
    pair = 2 * check_int("head_dim", head_dim, 1)
    sizes = pair * check_int("dtype_bytes", dtype_bytes, 1), pair * max(4, dtype_bytes)
    if not isinstance(pattern, (Pattern, Recipe)):
        raise bad_kind("pattern", "must be a Pattern or a Recipe", pattern)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    numbers = range(layer, layer + layers)
    chosen = [(number, pattern.pattern(number) if isinstance(pattern, Recipe) else pattern) for number in numbers]
    settings: dict[str, Any] = {"block": block, "causal": causal}
    reports = []
    for name in ("contiguous", "zigzag", "balanced"):
        shards = _shards(name, pattern, num_heads, kv_heads, seqlen, ranks, {**settings, "layers": layers, "layer": layer})
        if shards is None:
            continue
        asked = Counter(ask(one, num_heads, kv_heads, shards, layer=number, **settings) for number, one in chosen)
        reports.append(_sharding_report(name, [(traffic_of(one), times) for one, times in asked.items()], *sizes))
    return ContextReport(seqlen, ranks, layers, tuple(reports))


def _shards(name: str, pattern: Any, heads: int, kv_heads: int, seqlen: int, ranks: int, settings: dict[str, Any]) -> Shards | None:
    """The sharding, or None where the length does not allow it; a length that not even equal parts allow is an error."""
    try:
        if name == "balanced":
            return balanced_shards(pattern, heads, kv_heads, seqlen, ranks=ranks, **settings)
        return Shards.named(name, seqlen, ranks)
    except ValueError:
        if name == "contiguous" or seqlen % ranks:
            raise
        return None


def _sharding_report(name: str, layers: list[tuple[Traffic, int]], pair: int, total: int) -> ShardingReport:
    work = reduce(np.add, (traffic.listed * times for traffic, times in layers))
    ways = []
    for way in WAYS:
        forward, backward = (
            reduce(np.add, (np.maximum(*traffic.moved(way, pair, total, backward=back)) * times for traffic, times in layers))
            for back in (False, True)
        )
        held = max(int(traffic.held(way).max()) for traffic, _ in layers) * pair
        ways.append(WayReport(way, int(forward.max()), int(backward.max()), float(forward.mean()), float(backward.mean()), held))
    mean = float(work.mean())
    return ShardingReport(name, float(work.max()) / mean if mean else 1.0, tuple(ways))


_LINES = {"contiguous": ("-", "#1668b8"), "zigzag": ("--", "#d9822b"), "balanced": (":", "#2e8b57")}
_WHOLE = {"all-gather": "#8a8f98", "ring": "#b9bec6"}


def _moved(sharding: ShardingReport, way: str) -> float:
    """MiB of the busiest rank in both directions."""
    return (sharding.way(way).forward + sharding.way(way).backward) / 2**20


def plot_context(
    pattern: Pattern | Recipe,
    num_heads: int,
    num_kv_heads: int | None = None,
    seqlen: int | None = None,
    path: str | Path = "context.png",
    *,
    ranks: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024),
    dpi: int = 150,
    **settings: Any,
) -> Path:
    """Draw the bytes of the busiest rank (forward and backward together) and its work, over the number of ranks.

    Args:
        pattern, num_heads, num_kv_heads, seqlen, settings: as of `describe_context`.
        path: file to write (png, svg, pdf).
        ranks: numbers of ranks, ascending; seqlen is a multiple of each.
        dpi: pixels per inch.

    Raises:
        Unsupported: matplotlib is not installed.
        ValueError, TypeError: naming the argument, the rule and what came.
    """
    from s2attn.lab.plot import checked_path, new_figure

    path = checked_path(path)
    if not ranks or list(ranks) != sorted(set(ranks)):
        raise bad_value("ranks", "must be ascending numbers, at least one", list(ranks))
    reports = [describe_context(pattern, num_heads, num_kv_heads, seqlen, ranks=number, **settings) for number in ranks]
    figure = new_figure(10.5, 4.4)
    left, right = figure.subplots(1, 2)
    for sharding, (style, color) in _LINES.items():
        found = [(report.ranks, one) for report in reports for one in report.shardings if one.sharding == sharding]
        line: dict[str, Any] = {"linestyle": style, "color": color, "marker": "o", "markersize": 3}
        places = [number for number, _ in found]
        left.plot(places, [_moved(one, "exchange") for _, one in found], label=f"exchange, {sharding}", **line)
        right.plot(places, [one.imbalance for _, one in found], label=sharding, **line)
    for way, color in _WHOLE.items():  # the same under every sharding
        left.plot(list(ranks), [_moved(report.shardings[0], way) for report in reports], "-", color=color, label=way)
    left.set(xlabel="ranks", ylabel="MiB, busiest rank, forward and backward", title=f"{seqlen:,} tokens: what travels")
    left.set_yscale("log")
    right.set(xlabel="ranks", ylabel="listed blocks, busiest rank over mean", title="work")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(ranks), [str(number) for number in ranks])
        axis.minorticks_off()
        axis.grid(True, color="#e6e8eb", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=dpi, facecolor="white")
    return path
