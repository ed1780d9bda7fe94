"""``python -m s2attn.tuning``: what ``s2attn tune`` does, where nothing but torch and Triton is installed."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from s2attn.tuning.tune_session import main_tune_work, run_tune


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write the table; 2 for what cannot be done."""
    given = list(sys.argv[1:] if words is None else words)
    if given[:1] == ["work"]:
        return main_tune_work(Path(given[1]), Path(given[2]))
    parser = argparse.ArgumentParser(prog="python -m s2attn.tuning", description="Measure which tiles are the fastest on this GPU.")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the table; the variable OUT, or the package's own, when left out"
    )
    parser.add_argument("--ops", default="forward,dq,dkv,decode", help="separated by commas")
    parser.add_argument("--dims", default="128,64", help="head widths, separated by commas")
    parser.add_argument("--blocks", default="64,128,32", help="tokens per block, separated by commas")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--size", default="full", help="full, or tiny for a first look on a CPU")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for everything together")
    # Told to end, end the watched process, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print("\n".join(run_tune(**vars(parser.parse_args(given)))))
    except (ValueError, OSError) as error:
        print(f"s2attn: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
