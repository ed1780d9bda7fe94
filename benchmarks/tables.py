"""Records as short tables of plain text, for a terminal without anything installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Lines = list[list[str]]


def by_case(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows by case, and in it by peer, in the order of the record."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["peer"]] = row
    return found


def peer_names(rows: Sequence[Row]) -> list[str]:
    """Who has a number, s2attn last."""
    names = list(dict.fromkeys(row["peer"] for row in rows if row["status"] == "ok"))
    return [name for name in names if name != "s2attn"] + [name for name in names if name == "s2attn"]


def short_table(rows: Sequence[Row]) -> Lines:
    """Heading and one line per case: every peer's median, and what s2attn makes of it."""
    names = peer_names(rows)
    last = ["set-up", "host", "peak"]
    lines = [["case", "density", *names, "TFLOP/s", "x dense", "efficiency", *last]]
    for case, peers in by_case(rows).items():
        timed = {name: row for name, row in peers.items() if row["status"] == "ok"}
        if timed:
            lines.append([case, *_line(timed, names)])
    return lines


def _line(timed: Mapping[str, Row], names: Sequence[str]) -> list[str]:
    ours = timed.get("s2attn")
    medians = [duration(timed[name]["median_s"]) if name in timed else "-" for name in names]
    if ours is None:
        return ["-", *medians, *["-"] * 6]
    dense = ours.get("speedup", {}).get(dense_peer(ours))
    return [
        f"{100 * ours['density']:.1f} %",
        *medians,
        f"{ours['effective_gflops'] / 1e3:.3g}" if "effective_gflops" in ours else "-",
        "-" if dense is None else f"{dense:.2f}",
        f"{ours['efficiency']:.2f}" if "efficiency" in ours else "-",
        duration(ours.get("metadata_s")),
        duration(ours.get("host_s")),
        size(ours.get("total_peak_bytes") or ours.get("peak_bytes")),
    ]


def dense_peer(row: Row) -> str | None:
    """The fastest dense peer of a row's case; records of schema 1 have one only."""
    known = row.get("dense_peer")
    return known if known is not None else ("sdpa" if "sdpa" in row.get("speedup", {}) else None)


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why numbers are missing: each peer and reason once, with the number of its cases."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["peer"], row["status"], row["why"])
            counts[key] = counts.get(key, 0) + 1
    return [f"{peer} {status} in {count} case{'s' if count > 1 else ''}: {why}" for (peer, status, why), count in counts.items()]


def notes(rows: Sequence[Row]) -> list[str]:
    """What rows say about their numbers, each once."""
    return list(dict.fromkeys(f"{row['peer']}: {row['note']}" for row in rows if row.get("note")))


def head_of(record: Mapping[str, Any]) -> str:
    """A record in one line: suite, machine, versions."""
    host = record["host"]
    where = host.get("gpu") or host.get("processor")
    parts = [f"{name} {host[name]}" for name in ("torch", "triton", "commit") if host.get(name)] + [str(host.get("made"))]
    ended = "" if record.get("complete", True) else "; stopped before its end"
    return f"{record['suite']} on {where} ({', '.join(parts)}){ended}"


def plain(lines: Sequence[Sequence[str]]) -> str:
    """Columns in line, the first to the left, the others to the right.

    >>> print(plain([["case", "time"], ["a", "10 ms"]]))
    case   time
    a     10 ms
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    made = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        made.append("  ".join(cells).rstrip())
    return "\n".join(made)


def duration(seconds: float | None) -> str:
    """Seconds with a unit that suits them.

    >>> duration(0.0000123), duration(0.01234), duration(2.5), duration(None)
    ('12.3 us', '12.3 ms', '2.5 s', '-')
    """
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def size(count: float | None) -> str:
    """Bytes as MiB or GiB.

    >>> size(3 << 20), size(5 << 30), size(None)
    ('3 MiB', '5 GiB', '-')
    """
    if count is None:
        return "-"
    return f"{count / 2**20:.3g} MiB" if count < 1000 * 2**20 else f"{count / 2**30:.3g} GiB"


def case_lines(rows: Sequence[Row]) -> str:
    """The rows of one case as they come, for whoever watches."""
    made = []
    for row in rows:
        if row["status"] != "ok":
            made.append(f"  {row['peer']:12} {row['status']}: {row['why'][:160]}")
            continue
        parts = [duration(row["median_s"])]
        if "effective_gflops" in row:
            parts.append(f"{row['effective_gflops'] / 1e3:.4g} TFLOP/s of {100 * row['density']:.1f} %")
        if "tokens_per_s" in row:
            parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        if "share_of_copy" in row:
            parts.append(f"{row['gbps']:.4g} GB/s, {100 * row['share_of_copy']:.0f} % of a copy")
        if "efficiency" in row:
            parts.append(f"efficiency {row['efficiency']:.2f} over {row['dense_peer']}")
        parts.append(f"error {row['error']:.1e} of {row['error_bound']:.1e}" if "error" in row else "")
        made.append(f"  {row['peer']:12} {', '.join(part for part in parts if part)}")
    return "\n".join(made)
