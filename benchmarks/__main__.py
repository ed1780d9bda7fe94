"""``python -m benchmarks``: runs where nothing but torch, and Triton perhaps, is installed; ``cpu`` needs rich, too."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; 2 for what cannot be done."""
    parser = command_parser()
    given = parser.parse_args(words)
    try:
        return given.command(given)
    except (ValueError, OSError) as error:
        print(f"s2attn: {error}", file=sys.stderr)
        return 2


def command_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time attention against its peers.")
    commands = parser.add_subparsers(required=True)
    cpu = commands.add_parser("cpu", help="s2attn on this CPU against torch's dense attention and a compiled FlexAttention")
    cpu.add_argument("--out", type=Path, default=Path("bench-cpu.json"), help="JSON file for the record")
    cpu.add_argument("--lengths", default="4096,8192,16384", help="context lengths, separated by commas")
    cpu.add_argument("--peers", default="s2attn,sdpa,flex", help="who takes part, separated by commas")
    cpu.add_argument("--quick", action="store_true", help="tiny sizes and no FlexAttention, a few seconds: measures nothing")
    cpu.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    cpu.set_defaults(command=_cpu)
    run = commands.add_parser("run", help="run suites, write their records, print tables")
    run.add_argument(
        "suites", nargs="*", help="forward, backward, train, prefill, decode, inference, select, hyper; all of them when left out"
    )
    run.add_argument("--size", default="full", help="full; small, for some suites, on a CPU; or tiny for a first look on one")
    run.add_argument("--peers", default="", help="who takes part in forward and backward, separated by commas")
    run.add_argument("--peer-path", action="append", default=[], metavar="NAME=PATH", help="where a peer lies")
    run.add_argument("--backend", default=None, help="of s2attn")
    run.add_argument("--limit", type=float, default=540.0, help="seconds for everything together")
    run.add_argument("--cases", default="", help="only cases whose name holds this text")
    run.add_argument("--out", default=None, help="folder for the records; the variable OUT, or bench-results, when left out")
    run.add_argument("--seed", type=int, default=0, help="of the inputs")
    run.add_argument("--commit", default=None, help="for the record, where the source tree cannot tell")
    run.set_defaults(command=_run)
    compare = commands.add_parser("compare", help="print records as tables, and draw speed-up over density")
    compare.add_argument("records", nargs="+", type=Path)
    compare.add_argument("--plot", type=Path, default=None, help="picture of speed-up over density; needs matplotlib")
    compare.set_defaults(command=_compare)
    report = commands.add_parser("report", help="make the page of all measurements from records")
    report.add_argument("--records", type=Path, default=None, help="folder of records; those of the checkout when left out")
    report.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    report.set_defaults(command=_report)
    hidden = commands.add_parser("work")
    hidden.add_argument("job", type=Path)
    hidden.add_argument("state", type=Path)
    hidden.set_defaults(command=_work)
    return parser


def _cpu(given: argparse.Namespace) -> int:
    from benchmarks.cpu import bench_cpu

    bench_cpu(given.out, lengths=given.lengths, peers=given.peers, quick=given.quick, seed=given.seed)
    return 0


def _run(given: argparse.Namespace) -> int:
    from benchmarks.record_tables import record_text
    from benchmarks.session import plan_of, run_plan

    names = ("suites", "size", "peers", "peer_path", "backend", "limit", "cases", "out", "seed", "commit")
    # Told to end, end the watched process, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = plan_of(**{name: getattr(given, name) for name in names})
    for record in run_plan(plan):
        print(f"\n{record_text(record)}\nRecord: {plan.path(record['suite'])}")
    return 0


def _compare(given: argparse.Namespace) -> int:
    from benchmarks.compared import compare_text, speedup_chart
    from s2attn.tuning.journal import read_record

    records = {path.stem: read_record(path) for path in given.records}
    print(compare_text(records))
    if given.plot is not None:
        print(f"Picture: {speedup_chart(records, given.plot)}")
    return 0


def _report(given: argparse.Namespace) -> int:
    from benchmarks.report import committed_records, write_report

    print(f"Page: {write_report(committed_records(given.records), given.out)}")
    return 0


def _work(given: argparse.Namespace) -> int:
    from benchmarks.session import main_work

    return main_work(given.job, given.state)


if __name__ == "__main__":
    sys.exit(main())
