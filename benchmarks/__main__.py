"""``python -m benchmarks``: the benchmark where nothing but torch, and Triton perhaps, is installed."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; 2 for what cannot be done."""
    parser = _parser()
    given = parser.parse_args(words)
    try:
        return given.command(given)
    except (ValueError, OSError) as error:
        print(f"s2attn: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time attention against its peers.")
    commands = parser.add_subparsers(required=True)
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
    report.add_argument("--records", type=Path, default=None, help="folder of records; those of the package when left out")
    report.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    report.set_defaults(command=_report)
    tune = commands.add_parser("tune", help="measure which tiles are the fastest on this GPU, and write the table")
    tune.add_argument("--out", type=Path, default=None, help="folder for the table; the variable OUT, or the package's own, when left out")
    tune.add_argument("--ops", default="forward,dq,dkv,decode", help="separated by commas")
    tune.add_argument("--dims", default="128,64", help="head widths, separated by commas")
    tune.add_argument("--blocks", default="64,128,32", help="tokens per block, separated by commas")
    tune.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    tune.add_argument("--size", default="full", help="full, or tiny for a first look on a CPU")
    tune.add_argument("--limit", type=float, default=540.0, help="seconds for everything together")
    tune.set_defaults(command=_tune)
    for name, command in (("work", _work), ("tune-work", _tune_work)):
        hidden = commands.add_parser(name)
        hidden.add_argument("job", type=Path)
        hidden.add_argument("state", type=Path)
        hidden.set_defaults(command=command)
    return parser


def _run(given: argparse.Namespace) -> int:
    from benchmarks.session import plan_of, run_plan
    from benchmarks.tables import record_text

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


def _tune(given: argparse.Namespace) -> int:
    from s2attn.tuning.tune_session import run_tune

    names = ("out", "ops", "dims", "blocks", "dtype", "size", "limit")
    # Told to end, end the watched process, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("\n".join(run_tune(**{name: getattr(given, name) for name in names})))
    return 0


def _tune_work(given: argparse.Namespace) -> int:
    from s2attn.tuning.tune_session import main_tune_work

    return main_tune_work(given.job, given.state)


def _work(given: argparse.Namespace) -> int:
    from benchmarks.session import main_work

    return main_work(given.job, given.state)


if __name__ == "__main__":
    sys.exit(main())
