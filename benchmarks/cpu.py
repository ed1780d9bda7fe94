"""``python -m benchmarks``: on this CPU, suites for graphics cards, and what records say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from s2attn.tuning.cases import cpu_suite, quick_suite
from benchmarks.compared import compare_text, speedup_chart
from s2attn.tuning.journal import read_record
from benchmarks.peers import CPU_PEERS
from benchmarks.report import committed_records, write_report
from benchmarks.runner import Effort, run_suite, write_record
from benchmarks.session import Plan, run_plan
from benchmarks.tables import record_text
from s2attn.cli.screen import console, show_times
from s2attn.core import bad_value
from experiments.report_md import seconds


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


def bench_run(plan: Plan) -> None:
    """Run suites in a watched process, and print the table of each."""
    for record in run_plan(plan):
        print(f"\n{record_text(record)}\nRecord: {plan.path(record['suite'])}")


def bench_compare(paths: Sequence[Path], plot: Path | None) -> None:
    """Print records as tables, and perhaps draw speed-up over density."""
    records = {path.stem: read_record(path) for path in paths}
    print(compare_text(records))
    if plot is not None:
        print(f"Picture: {speedup_chart(records, plot)}")


def bench_report(folder: Path | None, out: Path) -> None:
    """Write the page of all measurements."""
    print(f"Page: {write_report(committed_records(folder), out)}")


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
