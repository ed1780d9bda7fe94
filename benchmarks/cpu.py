"""``python -m benchmarks cpu``: attention on this CPU against its peers, with a table at the end."""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.peers import CPU_PEERS
from benchmarks.runner import Effort, run_suite, write_record
from experiments.cli.screen import show_times
from experiments.report_md import seconds
from s2attn.cli.screen import console
from s2attn.core import bad_value
from s2attn.tuning.cases import cpu_suite, quick_suite


def bench_cpu(out: Path, *, lengths: str, peers: str, quick: bool, seed: int) -> None:
    """Run the suite, write the record, print the table."""
    names = read_peers(peers)
    sizes = read_lengths(lengths)
    if out.is_dir():
        raise bad_value("--out", "must name a file", out)
    if quick:
        sizes, names = [256, 512], [name for name in names if name != "flex"]
    cases = quick_suite(sizes) if quick else cpu_suite(sizes)
    screen = console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("", total=len(cases), completed=-1)
        note = lambda name: progress.update(task, advance=1, description=name)  # noqa: E731
        effort = Effort(rounds=3, budget_s=1.0) if quick else Effort()
        record = run_suite("quick" if quick else "cpu", cases, peers=names, effort=effort, seed=seed, note=note)
    write_record(record, out)
    show_times(record["rows"], screen)
    for row in record["rows"]:
        if row["op"] == "layout":
            cost = f"{seconds(row['median_s'])}, {row['bytes'] / 1e6:.1f} MB" if row["status"] == "ok" else f"{row['status']}: {row['why']}"
            screen.print(f"Layout of {row['seqlen']:,} tokens, {row['heads']} heads, {row['pattern']}: {cost}", markup=False)
    screen.print(f"Record: [bold]{out}[/bold]")


def read_lengths(text: str) -> list[int]:
    """Lengths such as ``"4096,8192"``, ascending."""
    words = [word.strip() for word in text.split(",")]
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise bad_value("--lengths", "must be positive numbers separated by commas", repr(text))
    return sorted({int(word) for word in words})


def read_peers(text: str) -> list[str]:
    """Names of peers, separated by commas, in the order of the table."""
    words = {word.strip() for word in text.split(",")}
    if not words or words - set(CPU_PEERS):
        raise bad_value("--peers", f"must be some of {', '.join(CPU_PEERS)}, separated by commas", repr(text))
    return [name for name in CPU_PEERS if name in words]
