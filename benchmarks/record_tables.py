"""Tables of the suites that have columns of their own, as lines of cells: for a terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.tables import by_case, dense_peer, duration, head_of, notes, peer_names, plain, reasons, short_table, size
from s2attn.selectors.stages import HYPER_STAGES
from s2attn.tuning.cases import tokens

Row = Mapping[str, Any]
Lines = list[list[str]]


def decode_lines(rows: Sequence[Row]) -> Lines:
    """Heading and one line per case of `decode`: what is listed, every peer's median, and how near ours comes to a copy's rate."""
    names = peer_names(rows)
    more = ["GB/s", "of a copy", "x dense", "efficiency", "ragged / uniform", "new lengths", "host", "timed by", "error"]
    lines = [["case", "density", "listed", *names, *more]]
    for case, peers in by_case(rows).items():
        timed = {name: row for name, row in peers.items() if row["status"] == "ok"}
        ours = timed.get("s2attn")
        medians = [duration(timed[name]["median_s"]) if name in timed else "-" for name in names]
        if ours is None:
            lines.append([case, "-", "-", *medians, *["-"] * len(more)])
            continue
        dense = ours.get("speedup", {}).get(dense_peer(ours))
        numbers = [
            f"{ours['gbps']:.3g}",
            f"{100 * ours['share_of_copy']:.0f} %" if "share_of_copy" in ours else "-",
            "-" if dense is None else f"{dense:.2f}",
            f"{ours['efficiency']:.2f}" if "efficiency" in ours else "-",
            f"{ours['over_uniform']:.2f}" if "over_uniform" in ours else "-",
        ]
        times = [duration(ours.get("metadata_s")), duration(ours.get("host_s")), ours["timed_by"], f"{ours['error']:.0e}"]
        lines.append([case, f"{100 * ours['density']:.1f} %", size(ours["listed_bytes"]), *medians, *numbers, *times])
    return lines


def inference_lines(rows: Sequence[Row]) -> Lines:
    """Heading and one line per case and way to serve of `inference`: both phases, memory, and the largest batch."""
    more = ["cache", "of dense", "peak memory", "set-up", "largest batch", "with it", "error"]
    lines = [["case", "attention", "density", "prefill", "tokens/s", "decode", "tokens/s", "both", "s2attn over it", *more]]
    for case, peers in by_case(rows).items():
        for name, row in peers.items():
            if row["status"] != "ok":
                continue
            over = f"{1 / row['speedup']['s2attn']:.2f}x" if "s2attn" in row["speedup"] else "-"
            speeds = [
                duration(row["prefill_s"]),
                f"{row['prefill_tokens_per_s']:,.0f}",
                duration(row["decode_s"]),
                f"{row['tokens_per_s']:,.1f}",
            ]
            batch = str(row["batch_largest"]) if "batch_largest" in row else f"{row['batch_computed']}, not tried"
            memory = [size(row["cache_bytes"]), f"{100 * row['cache_bytes'] / row['cache_dense_bytes']:.1f} %"]
            memory += [size(row.get("total_peak_bytes") or row["peak_bytes"]), duration(row["metadata_s"]), batch]
            all_of_it = f"{row['batch_tokens_per_s']:,.0f} tokens/s" if "batch_tokens_per_s" in row else "-"
            cells = [case, name, f"{100 * row['density']:.1f} %", *speeds, duration(row["median_s"]), over, *memory, all_of_it]
            lines.append([*cells, f"{row['error']:.0e}"])
    return lines


def select_lines(rows: Sequence[Row]) -> Lines:
    """Heading and one line per case of `select`: the three parts, the whole beside dense attention and its roofline, and what was kept."""
    names, reached = [name for name in peer_names(rows) if name != "s2attn"], crossovers(rows)
    more = ["x dense", "roofline", "of it", "choosing / product", "mass kept", "least", "most", "faster from", "error"]
    lines = [["case", "density", "score", "select", "attention", "s2attn", *names, *more]]
    for case, peers in by_case(rows).items():
        ours = peers.get("s2attn")
        timed = {name: row for name, row in peers.items() if row["status"] == "ok"}
        medians = [duration(timed[name]["median_s"]) if name in timed else "-" for name in names]
        if ours is None or ours["status"] != "ok":
            lines.append([case, *["-"] * 5, *medians, *["-"] * len(more)])
            continue
        parts, dense = [duration(ours.get(f"{part}_s")) for part in ("score", "select", "attention")], ours["speedup"].get(dense_peer(ours))
        numbers = [
            "-" if dense is None else f"{dense:.2f}",
            f"{ours['roofline']:.2f}",
            f"{100 * ours['of_roofline']:.0f} %" if "of_roofline" in ours else "-",
            f"{ours['choosing_over_product']:.2f}" if "choosing_over_product" in ours else "-",
            *(f"{100 * ours[key]:.1f} %" for key in ("kept", "kept_worst", "kept_most")),
            reached.get((ours["pattern"], ours["structure"]), "-"),
            f"{ours['error']:.0e}",
        ]
        lines.append([case, f"{100 * ours['density']:.1f} %", *parts, duration(ours["median_s"]), *medians, *numbers])
    return lines


def crossovers(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """From which length on each method, on each structure, is faster than the fastest dense attention."""
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("dense_peer") and not row["dense"]:
            points.setdefault((row["pattern"], row["structure"]), []).append((row["seqlen"], row["speedup"][row["dense_peer"]]))
    return {key: crossover(found) for key, found in points.items()}


def crossover(points: Sequence[tuple[int, float]]) -> str:
    """The length from which on speed-ups over dense attention, given at some lengths, are above 1; between two lengths in logarithms.

    >>> crossover([(8192, 0.5), (16384, 2.0)]), crossover([(8192, 1.5), (16384, 2.0)]), crossover([(8192, 0.5)])
    ('11.3k', 'below 8k', 'above 8k')
    """
    ordered = sorted(points)
    slower = [i for i, (_, ratio) in enumerate(ordered) if ratio < 1]
    if not slower:
        return f"below {tokens(ordered[0][0])}"
    if slower[-1] + 1 == len(ordered):
        return f"above {tokens(ordered[-1][0])}"
    (low, before), (high, after) = ordered[slower[-1]], ordered[slower[-1] + 1]
    return f"{low * (high / low) ** (math.log(1 / before) / math.log(after / before)) / 1024:.3g}k"


def hyper_lines(rows: Sequence[Row]) -> Lines:
    """Heading and one line per case of `hyper`: its stages, the whole beside dense attention, and how far the estimate is from it."""
    names, stages = [name for name in peer_names(rows) if name != "s2attn"], (*HYPER_STAGES, "other", "backward")
    lines = [["case", "density", *stages, "s2attn", *names, "x dense", "from dense", "peak memory", "of dense", "error"]]
    for case, peers in by_case(rows).items():
        ours = peers.get("s2attn")
        timed = {name: row for name, row in peers.items() if row["status"] == "ok"}
        medians = [duration(timed[name]["median_s"]) if name in timed else "-" for name in names]
        if ours is None or ours["status"] != "ok":
            lines.append([case, *["-"] * (len(stages) + 2), *medians, *["-"] * 5])
            continue
        fastest = timed.get(dense_peer(ours) or "")
        memory = [row.get("peak_bytes") for row in (ours, fastest or {})]
        over = "-" if fastest is None else f"{ours['speedup'][fastest['peer']]:.2f}"
        last = [over, f"{100 * ours['from_dense']:.1f} %", *map(size, memory), f"{ours['error']:.0e}"]
        parts = [duration(ours.get(f"{stage}_s")) for stage in stages]
        lines.append([case, f"{100 * ours['density']:.1f} %", *parts, duration(ours["median_s"]), *medians, *last])
    return lines


TABLES: dict[str, Callable[[Sequence[Row]], Lines]] = {
    "decode": decode_lines,
    "inference": inference_lines,
    "select": select_lines,
    "hyper": hyper_lines,
}
"""By op."""


def record_text(record: Mapping[str, Any]) -> str:
    """A record as text: what it ran on, the table, and what is missing."""
    more = [f"without a number: {reason}" for reason in reasons(record["rows"])] + [f"note: {note}" for note in notes(record["rows"])]
    return "\n".join([head_of(record), *(plain(table) for table in tables_of(record["rows"])), *more])


def tables_of(rows: Sequence[Row]) -> list[Lines]:
    """A table for each kind of op that has columns of its own, behind one for all others."""
    own = {op: [row for row in rows if row["op"] == op] for op in TABLES}
    rest = [row for row in rows if row["op"] not in TABLES]
    made = [short_table(rest)] if rest or not rows else []
    return [*made, *(TABLES[op](found) for op, found in own.items() if found)]
