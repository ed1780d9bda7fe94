"""Tables of the suites that have columns of their own, as lines of cells: for a terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Lines = list[list[str]]


def decode_lines(rows: Sequence[Row]) -> Lines:
    """Heading and one line per case of `decode`: what is listed, every peer's median, and how near ours comes to a copy's rate."""
    from s2attn.bench.tables import by_case, dense_peer, duration, peer_names, size

    names = peer_names(rows)
    more = ["GB/s", "of a copy", "x dense", "efficiency", "ragged / uniform", "lists", "host", "timed by", "error"]
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


TABLES: dict[str, Callable[[Sequence[Row]], Lines]] = {"decode": decode_lines}
"""By op."""
