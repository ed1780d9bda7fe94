"""Several records beside each other: a table of all peers, and a picture of speed-up over density with the ideal line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2attn.bench.tables import dense_peer, duration, head_of, notes, plain, reasons
from s2attn.core import StrPath, as_path, atomic_write

Record = Mapping[str, Any]
HEAD = ["case", "peer", "density", "executed", "median", "p20 to p80", "TFLOP/s", "x dense", "efficiency", "set-up", "first call", "error"]


def compare_text(records: Mapping[str, Record]) -> str:
    """Every row of every record as a table; and where two records hold the same case and peer, how their medians differ."""
    parts = []
    for name, record in records.items():
        lines = [HEAD, *(_line(row) for row in record["rows"] if row["status"] == "ok")]
        missing = [f"without a number: {reason}" for reason in reasons(record["rows"])]
        parts.append(
            "\n".join([f"{name}: {head_of(record)}", plain(lines), *missing, *(f"note: {note}" for note in notes(record["rows"]))])
        )
    changes = changes_of(records)
    return "\n\n".join([*parts, *([plain(changes)] if len(changes) > 1 else [])])


def _line(row: Mapping[str, Any]) -> list[str]:
    dense = row.get("speedup", {}).get(dense_peer(row))
    executed, first = row.get("executed_density"), row.get("first_s", row.get("compile_s"))
    return [
        row["case"],
        row["peer"],
        f"{100 * row['density']:.1f} %",
        "-" if executed is None else f"{100 * executed:.1f} %",
        duration(row["median_s"]),
        f"{duration(row['p20_s'])} to {duration(row['p80_s'])}",
        f"{row['effective_gflops'] / 1e3:.4g}" if "effective_gflops" in row else "-",
        "-" if dense is None else f"{dense:.2f}",
        f"{row['efficiency']:.2f}" if row.get("efficiency") is not None else "-",
        duration(row.get("metadata_s")),
        duration(first),
        f"{row['error']:.0e}" if row.get("error") is not None else "-",
    ]


def changes_of(records: Mapping[str, Record]) -> list[list[str]]:
    """Heading and one line per case and peer that at least two records have: the medians, and the last over the first."""
    names = list(records)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name, record in records.items():
        for row in record["rows"]:
            if row["status"] == "ok":
                found.setdefault((row["case"], row["peer"]), {})[name] = row["median_s"]
    lines = [["case", "peer", *names, "last / first"]]
    for (case, peer), medians in found.items():
        if len(medians) > 1:
            times = list(medians.values())
            lines.append([case, peer, *(duration(medians.get(name)) for name in names), f"{times[-1] / times[0]:.2f}"])
    return lines


def speedups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(density, speed-up over the fastest dense peer) by op and peer, densest first; dense peers themselves are left out."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        dense = row.get("speedup", {}).get(dense_peer(row)) if row["status"] == "ok" else None
        if dense is not None and "pairs" in row and not row.get("dense"):
            found.setdefault((row["op"], row["peer"]), []).append((row["density"], dense))
    return {key: sorted(points, reverse=True) for key, points in found.items()}


def speedup_chart(records: Mapping[str, Record], path: StrPath) -> Path:
    """Draw speed-up over density, a panel for each op, with the ideal line; matplotlib comes with the extra ``lab``.

    Raises:
        ValueError: no row of attention has a speed-up over a dense peer.
    """
    path = as_path("path", path)
    from matplotlib.figure import Figure

    points = speedups([row for record in records.values() for row in record["rows"]])
    if not points:
        raise ValueError("records must hold a row with a speed-up over a dense peer; got none")
    ops = list(dict.fromkeys(op for op, _ in points))
    figure = Figure(figsize=(6.0 * len(ops), 4.4), dpi=110, layout="constrained")
    for i, op in enumerate(ops):
        axis = figure.add_subplot(1, len(ops), i + 1)
        densities = [density for (own, _), values in points.items() if own == op for density, _ in values]
        ideal = [min(densities), 1.0]
        axis.plot(ideal, [1 / density for density in ideal], ":", color="#b3261e", label="ideal: 1 / density")
        for (own, peer), values in points.items():
            if own == op:
                axis.plot(*zip(*values, strict=True), "o", markersize=5, label=peer)
        axis.set(xscale="log", yscale="log", xlabel="density", ylabel="speed-up over the fastest dense attention", title=op)
        axis.invert_xaxis()
        axis.grid(True, which="both", color="#e6e8eb", linewidth=0.6)
        axis.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or None)
    return path
