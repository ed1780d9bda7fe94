"""The page of all measurements, made from the committed records and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2attn.bench.journal import read_record
from s2attn.bench.serving_tables import TABLES
from s2attn.bench.tables import by_case, dense_peer, duration, head_of, notes, peer_names, reasons, size
from s2attn.bench.targets import TARGETS, Found
from s2attn.core import StrPath, as_path, write_text

Record = Mapping[str, Any]
RECORDS = Path(__file__).parent / "records"
OPS = {
    "forward": "forward",
    "backward": "backward alone",
    "forward_backward": "forward and backward together",
    "train": "training step",
    "prefill": "prefill",
    "decode": "decoding from pages",
    "inference": "prefill and decoding of a layer stack",
    "select": "blocks chosen from q and k",
    "hyper": "attention estimated from buckets and samples",
}


def committed_records(folder: StrPath | None = None) -> dict[str, Record]:
    """The records in a folder by file name, the package's own when none is named."""
    folder = None if folder is None else as_path("folder", folder)
    return {path.stem: read_record(path) for path in sorted((folder or RECORDS).glob("*.json"))}


def write_report(records: Mapping[str, Record], path: StrPath) -> Path:
    """Write the page."""
    path = as_path("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, report_page(records))
    return path


def report_page(records: Mapping[str, Record]) -> str:
    """The page as Markdown: what was measured on what, where we lose, and what of our targets is still unmeasured."""
    parts = [
        "# Performance",
        "Made by `s2attn bench report` from the records in `s2attn/bench/records/`; a test compares it with them. A record is written by "
        "the benchmark alone: random normal inputs, every result compared with float64 before it is timed, all peers in turn. An absolute "
        "time holds on the machine that is named with it. *Efficiency* is the speed-up over the fastest dense attention of the same run, "
        "times density: 1 is ideal.",
    ]
    for name, record in records.items():
        parts += [f"## Record `{name}`", _host(record), *_sections(record)]
    parts += ["## Where we lose", losing(records), "## Targets", targets_table(records)]
    return "\n\n".join(parts) + "\n"


def _host(record: Record) -> str:
    host = record["host"]
    facts = [head_of(record)]
    if host.get("gpu"):
        facts.append(f"driver {host.get('driver')}, CUDA {host.get('cuda')}, cuDNN {host.get('cudnn')}")
        if "matmul_tflops" in host:
            facts.append(f"Seen on it: a bf16 matrix product {host['matmul_tflops']:.0f} TFLOP/s, a copy {host['copy_gbps']:.0f} GB/s")
    else:
        facts.append(f"{host.get('threads')} threads on {host.get('cores')} cores")
    return ". ".join(facts) + "."


def _sections(record: Record) -> list[str]:
    rows, parts = record["rows"], []
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        if op == "layout":
            parts += ["### Building lists", markdown(layout_lines(own))]
        elif op in TABLES:
            parts += [f"### {OPS[op].capitalize()}", markdown(TABLES[op](own))]
        elif op in ("train", "prefill"):
            parts += [f"### {OPS[op].capitalize()}", markdown(stack_lines(own))]
        else:
            parts += [f"### Speed-up over density, {OPS[op]}", markdown(density_lines(own))]
            lengths = length_lines(own)
            if len(lengths) > 2:
                parts += [f"### Time over length, {OPS[op]}", markdown(lengths)]
    missing = [f"* {reason}" for reason in reasons(rows)] + [f"* {note}" for note in notes(rows)]
    return [*parts, *(["Without a number, and notes:\n\n" + "\n".join(missing)] if missing else [])]


def density_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line per case that has a speed-up over dense attention, densest first; the ideal stands beside it."""
    lines = [["case", "shape", "density", "ideal", "over the fastest dense", "over FlashAttention-2", "efficiency", "TFLOP/s", "error"]]
    ours = [row for row in rows if row["status"] == "ok" and row["peer"] == "s2attn"]
    for row in sorted(ours, key=lambda row: -row["density"]):
        dense, ratios = dense_peer(row), row.get("speedup", {})
        lines.append(
            [
                f"{row['case']}: `{row['pattern']}`",
                f"{row['heads']}/{row['kv_heads']} heads of {row['head_dim']}, block {row['block']}, {row['dtype']}",
                f"{100 * row['density']:.1f} %",
                f"{1 / row['density']:.2f}x",
                f"{ratios[dense]:.2f}x ({dense})" if dense in ratios else "-",
                f"{ratios['flash']:.2f}x" if "flash" in ratios else "-",
                f"{row['efficiency']:.2f}" if row.get("efficiency") is not None else "-",
                f"{row['effective_gflops'] / 1e3:.3g}",
                f"{row['error']:.0e}",
            ]
        )
    return lines


def length_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line per length of the pattern and shape that was measured at most lengths; every peer's median."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    keys = ("pattern", "heads", "kv_heads", "head_dim", "batch", "block", "dtype")
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    best = max(groups.values(), key=lambda own: len({row["seqlen"] for row in own if row["status"] == "ok"}), default=[])
    names = peer_names(best)
    lines = [["tokens", "density", *names]]
    for peers in sorted(by_case(best).values(), key=lambda peers: next(iter(peers.values()))["seqlen"]):
        timed = {name: row for name, row in peers.items() if row["status"] == "ok"}
        if timed:
            first = timed.get("s2attn") or next(iter(timed.values()))
            medians = [duration(timed[name]["median_s"]) if name in timed else "-" for name in names]
            lines.append([f"{first['seqlen']:,}", f"{100 * first['density']:.1f} %", *medians])
    return lines


def stack_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line per case and way to attend of a layer stack."""
    lines = [["case", "measured", "attention", "recipe", "tokens/s", "median", "peak memory", "s2attn over it"]]
    for peers in by_case(rows).values():
        for name, row in peers.items():
            if row["status"] == "ok":
                ours = f"{row['speedup']['s2attn'] ** -1:.2f}x" if "s2attn" in row["speedup"] else "-"
                peak, recipe = size(row.get("total_peak_bytes") or row["peak_bytes"]), row["pattern"] if name == "s2attn" else "dense"
                speed, median = f"{row['tokens_per_s']:,.0f}", duration(row["median_s"])
                lines.append([row["case"], row["measured"], name, recipe, speed, median, peak, ours])
    return lines


def layout_lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading and one line per layout that was built."""
    lines = [["tokens", "heads", "pattern", "median", "p20 to p80", "held"]]
    for row in rows:
        if row["status"] == "ok":
            spread, held = f"{duration(row['p20_s'])} to {duration(row['p80_s'])}", f"{row['bytes'] / 1e6:.0f} MB"
            lines.append([f"{row['seqlen']:,}", str(row["heads"]), f"`{row['pattern']}`", duration(row["median_s"]), spread, held])
    return lines


def losing(records: Mapping[str, Record]) -> str:
    """Every case in which a peer is faster, by how much, the worst first; and every case in which we have no number."""
    lost: list[tuple[float, list[str]]] = []
    failed = []
    for name, record in records.items():
        for case, peers in by_case(record["rows"]).items():
            ours = peers.get("s2attn")
            if ours is None or ours["status"] != "ok":
                failed += [f"* `{name}`, {case}: {ours['why']}"] if ours is not None else []
                continue
            for peer, ratio in ours.get("speedup", {}).items():
                if ratio < 1:
                    times = [duration(ours["median_s"]), duration(peers[peer]["median_s"])]
                    lost.append((ratio, [case, f"{100 * ours['density']:.1f} %", peer, *times, f"{1 / ratio:.2f}x", f"`{name}`"]))
    head = ["case", "density", "faster", "s2attn", "it", "by", "record"]
    table = markdown([head, *(line for _, line in sorted(lost, key=lambda pair: pair[0]))]) if lost else "In no case that was measured."
    return "\n\n".join([table, *(["s2attn has no number:\n\n" + "\n".join(failed)] if failed else [])])


def targets_table(records: Mapping[str, Record]) -> str:
    """Every target with what the records say about it; "not measured" where they say nothing."""
    found, lines = Found(records), [["work", "target", "measured", "reached"]]
    for target in TARGETS:
        readings = target.read(found)
        if not readings:
            lines.append([target.work, target.goal, "not measured", "-"])
        lines += [[target.work, target.goal, text, "yes" if reached else "no"] for text, reached in readings]
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head.

    >>> print(markdown([["a", "b"], ["1", "x|y"]]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    made = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([made[0], "|" + "---|" * len(lines[0]), *made[1:]])
