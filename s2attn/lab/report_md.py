"""The demo's report: one Markdown page with pictures, made from ``results.json`` alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2attn.core import StrPath, as_path, write_text
from s2attn.lab.charts import NAMES, OPS, loss_chart, memory_chart, times_chart, tokens

Record = dict[str, Any]
TIME_HEAD = (
    *("length", "direction", "who", "density", "median", "p20 to p80", "vs dense", "efficiency"),
    *("mask or lists", "compile or plan", "peak memory", "error"),
)
SUMMARY_HEAD = ("", "den-\nsity", "dense", "flex", "s2attn", "vs\ndense", "vs\nflex", "effi-\nciency", "s2attn\nset-up", "flex\nset-up")


def write_report(results: Record, out: StrPath) -> Path:
    """Write ``report.md`` and its charts into ``out``; the pattern picture ``pattern.png`` is shown when it lies there."""
    out = as_path("out", out)
    rows = results["attention"]["rows"]
    loss_chart(results["history"], out / "losses.png")
    times_chart(rows, out / "times.png")
    memory_chart(rows, out / "memory.png")
    parts = [_head(results), _pattern(results, out), _training(results), _checkpoint(results), _attention(results), _made_on(results)]
    page = out / "report.md"
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def loss_table(results: Record) -> list[list[str]]:
    """Heading and one line per model, as text."""
    lines = [["model", "parameters", "validation loss (nats/byte)", "bits per byte", "bytes/s in training", "median step"]]
    for run in results["runs"]:
        speed, step = f"{run['bytes_per_second']:,.0f}", f"{1e3 * run['step_seconds']:.0f} ms"
        loss, bits = f"{run['validation_loss']:.3f}", f"{run['bits_per_byte']:.3f}"
        lines.append([NAMES.get(run["name"], run["name"]), f"{run['parameters']:,}", loss, bits, speed, step])
    return lines


def pattern_table(found: Sequence[Record]) -> list[list[str]]:
    """Heading and one line per length: what the pattern leaves of work and memory."""
    lines = [
        ["length", "density", "ideal speed-up", "KV cache after eviction", "of", "block lists", "instead of a mask of", "union of heads"]
    ]
    for one in found:
        sizes = [mebibytes(one[key]) for key in ("cache_bytes", "dense_cache_bytes", "layout_bytes", "mask_bytes")]
        union = "complete" if one["complete"] else "incomplete"
        lines.append([tokens(one["seqlen"]), f"{100 * one['density']:.1f} %", f"{one['ideal_speedup']:.1f}x", *sizes, union])
    return lines


def mebibytes(count: int | None) -> str:
    """Bytes as MiB, or nothing.

    >>> mebibytes(3 << 20), mebibytes(None)
    ('3.0 MiB', '-')
    """
    return "-" if count is None else f"{count / 2**20:,.1f} MiB"


def time_table(rows: Sequence[Record]) -> list[list[str]]:
    """Heading and one line per case and peer, as text; a row without a number says why."""
    lines = [
        [
            "length",
            "direction",
            "who",
            "density",
            "median",
            "p20 to p80",
            "vs dense",
            "efficiency",
            "mask or lists",
            "compile or plan",
            "error",
        ]
    ]
    for row in rows:
        if row.get("op") not in OPS:
            continue
        start = [tokens(row["seqlen"]), OPS[row["op"]], NAMES.get(row["peer"], row["peer"])]
        lines.append([*start, *(_times(row) if row["status"] == "ok" else [f"{row['status']}: {row['why']}", *[""] * 8])])
    return lines


def summary_table(rows: Sequence[Record]) -> tuple[list[list[str]], list[str]]:
    """Heading and one line per case, narrow enough for a terminal, and the reasons of what is missing."""
    lines, reasons = [list(SUMMARY_HEAD)], []
    cases: dict[str, dict[str, Record]] = {}
    for row in rows:
        if row.get("op") in OPS:
            cases.setdefault(row["case"], {})[row["peer"]] = row
    for name, by_peer in cases.items():
        timed = {peer: row for peer, row in by_peer.items() if row["status"] == "ok"}
        reasons += [row["why"] for row in by_peer.values() if row["status"] != "ok"]
        lines.append([name, *_summary(timed)])
    return lines, list(dict.fromkeys(reasons))


def _summary(timed: Mapping[str, Record]) -> list[str]:
    ours, flex = timed.get("s2attn"), timed.get("flex")
    medians = [seconds(timed[peer]["median_s"]) if peer in timed else "-" for peer in ("sdpa", "flex", "s2attn")]
    faster = [f"{ours['speedup'][peer]:.2f}x" if ours and peer in ours["speedup"] else "-" for peer in ("sdpa", "flex")]
    return [
        f"{100 * ours['density']:.1f}%" if ours else "-",
        *medians,
        *faster,
        f"{ours['efficiency']:.2f}" if ours and "efficiency" in ours else "-",
        *(seconds(row["metadata_s"] + row["compile_s"], digits=2) if row else "-" for row in (ours, flex)),
    ]


def _times(row: Record) -> list[str]:
    dense = row.get("speedup", {}).get("sdpa")
    return [
        f"{100 * row['density']:.1f} %",
        seconds(row["median_s"]),
        f"{seconds(row['p20_s'])} to {seconds(row['p80_s'])}",
        f"{dense:.2f}x" if dense else "",
        f"{row['efficiency']:.2f}" if "efficiency" in row else "",
        seconds(row["metadata_s"]) if row["metadata_s"] else "",
        seconds(row["compile_s"]) if row["peer"] != "sdpa" else "",
        f"{row['peak_bytes'] / 2**20:.0f} MiB" if row.get("peak_bytes") is not None else "",
        f"{row['error']:.0e}",
    ]


def seconds(value: float, digits: int = 3) -> str:
    """A duration with a unit that suits it.

    >>> seconds(0.01234), seconds(0.9999), seconds(2.5), seconds(150.0), seconds(29.68, digits=2)
    ('12.3 ms', '1.00 s', '2.50 s', '150 s', '30 s')
    """
    rounded = float(f"{value:.{digits}g}")
    number, unit = (1e3 * rounded, "ms") if rounded < 1 else (rounded, "s")
    whole = len(str(int(number))) if number >= 1 else 1
    return f"{number:.{max(0, digits - whole)}f} {unit}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head.

    >>> print(markdown([["a", "b"], ["1", "x|y"]]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    cells = [[cell.replace("|", "\\|").replace("-\n", "").replace("\n", " ") for cell in line] for line in lines]
    made = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([made[0], "|" + "---|" * len(cells[0]), *made[1:]])


def _head(results: Record) -> str:
    settings, host = results["settings"], results["attention"]["host"]
    where = f"{host['processor']}, {host['cores']} cores, torch {host['torch']}, s2attn {host['s2attn']}"
    lines = ["# s2attn demo", f"{where}; seed {settings['seed']}; {results['total_seconds']:.0f} seconds in all."]
    if settings["quick"]:
        lines.append("**Quick run with tiny sizes: it shows that everything works, and none of its numbers means anything.**")
    return "\n\n".join(lines)


def _pattern(results: Record, out: Path) -> str:
    if not (out / "pattern.png").is_file():
        return ""
    lines = [
        "## Who reads what",
        f"The pattern that is timed below, `{results['settings']['timed_pattern']}`: every head keeps a local window and its own stripes "
        "of the past; together the heads read everything.",
        "![pattern](pattern.png)",
        markdown(pattern_table(results["pattern"])),
    ]
    return "\n\n".join(lines)


def _training(results: Record) -> str:
    corpus, train, recipes = results["corpus"], results["settings"]["train"], results["settings"]["recipes"]
    train_seconds = results["settings"]["train_seconds"]
    dense, sparse = results["runs"][0], results["runs"][-1]
    fitted = f" (as many as fit into {train_seconds:.0f} seconds here; `--steps` fixes them)" if train_seconds else ""
    gap = sparse["validation_loss"] - dense["validation_loss"]
    lines = [
        "## Two language models on real text",
        f"Text: the source files of the running Python's standard library, byte by byte; {corpus['train_files']} files "
        f"({corpus['train_bytes'] / 1e6:.1f} MB) to train on and {corpus['validation_files']} others "
        f"({corpus['validation_bytes'] / 1e6:.2f} MB) to validate. Both models start from the same weights and read the same "
        f"{dense['bytes_read']:,} bytes in the same order, {dense['steps']} steps{fitted} at a context of {train['context']}, in turn. "
        f"Dense: `{recipes['dense']}`. S2: `{recipes['s2']}`.",
        markdown(loss_table(results)),
        f"The S2 model ends {abs(gap):.3f} nats per byte {'above' if gap > 0 else 'below'} the dense one. "
        f"(Knowing nothing costs {math.log(256):.2f}.)",
        "![losses](losses.png)",
    ]
    return "\n\n".join(lines)


def _checkpoint(results: Record) -> str:
    saved, made = results["checkpoint"], results["generation"]
    fence = "~" * 8
    lines = [
        "## Saved, loaded, and writing",
        f"The S2 model was saved ({saved['bytes'] / 1e6:.1f} MB, with its recipe as JSON) and loaded again: equal logits, bit for bit. "
        f"It then continued {made['prompt_bytes']} bytes of a validation file by {made['new_bytes']}, with a KV cache "
        f"(prefill {seconds(made['prefill_seconds'])}, then {(made['new_bytes'] - 1) / made['decode_seconds']:.0f} bytes/s). "
        f"Logits with and without the cache differ by at most {made['cache_error']:.0e} of the largest logit. The cache gives back keys "
        f"that no later query reads: it never held more than {made['cache_most_bytes'] / 1e3:.0f} kB, where a dense one ends with "
        f"{made['cache_dense_bytes'] / 1e3:.0f} kB.",
        f"{fence}text\n{made['prompt_end']}⟶{made['text']}\n{fence}",
        "(The model begins at the arrow. After minutes of training, one so small writes the look of the language, not its sense.)",
    ]
    return "\n\n".join(lines)


def _attention(results: Record) -> str:
    lines = [
        "## Attention alone",
        f"Pattern `{results['settings']['timed_pattern']}`, float32, random normal inputs, everybody in turn; medians. Every result was "
        "compared to float64 on sampled rows before it was timed; its error may be at most twice that of plain eager code. "
        "*Efficiency* is speed-up over dense times density: 1 is ideal. *Mask or lists* is the time to build the block lists, once per "
        "mask; *compile or plan* is what the first call took beyond the median.",
        markdown(summary_table(results["attention"]["rows"])[0]),
        "![times](times.png)",
        "![memory](memory.png)",
        "All of it, with spread and error:",
        markdown(time_table(results["attention"]["rows"])),
    ]
    return "\n\n".join(lines)


def _made_on(results: Record) -> str:
    parts = ", ".join(f"{name} {seconds(value)}" for name, value in results["seconds"].items())
    return (
        f"## How it was made\n\n`{results['command']}`: {parts}. Everything above stands in `results.json`, every event in "
        "`metrics.jsonl`, the model in `checkpoint/`."
    )
