"""A process that is watched: ended when nothing new begins in it, and started again behind the place where it ended."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from s2attn.tuning.journal import DeviceLost, Journal, Row

GRACE_S = 15.0
MOST_RESTARTS = 12


def run_to_end(start: Callable[[float, Sequence[Row]], Sequence[str]], state: Path, limit_s: float, stall_s: float) -> list[Row]:
    """Run a command until it comes to its end, or the time does; what ended it, each time that it did not.

    Args:
        start: the command, for so many seconds, behind these ends.
        state: a file in which the process says what it begins (`s2attn.tuning.journal.Journal`).
        stall_s: a process that begins nothing new for so long is ended.

    Raises:
        ValueError: the process says that it cannot do what it was asked for.
        RuntimeError: it ended before it began anything.
    """
    deadline, crashes = time.monotonic() + limit_s, list[Row]()
    while len(crashes) < MOST_RESTARTS and time.monotonic() < deadline:
        ended = _run_once(start(max(1.0, deadline - time.monotonic()), crashes), state, deadline, stall_s)
        if ended is None:
            break
        crashes.append(ended)
        print(f"ended: {ended['peer'] or 'timing'} in {ended['case']}: {ended['why']}", flush=True)
    return crashes


def _run_once(words: Sequence[str], state: Path, deadline: float, stall_s: float) -> Row | None:
    """One process; None when it came to its end, or else what it was doing and why it ended."""
    state.unlink(missing_ok=True)
    with subprocess.Popen(words) as process:
        try:
            why = _watch(process, state, deadline + GRACE_S, stall_s)
        finally:
            process.kill()
    if process.returncode == 0:
        return None
    known = json.loads(state.read_text()) if state.exists() else {"case": "", "peer": ""}
    if not known["case"]:
        if known.get("why"):
            raise ValueError(known["why"])
        raise RuntimeError(f"the process ended with code {process.returncode} before its first case")
    code = process.returncode
    ended = f"the process ended with signal {-code}" if code < 0 else f"the process ended with code {code}"
    return {"case": known["case"], "peer": known["peer"], "why": why or known.get("why") or ended}


def _watch(process: subprocess.Popen[bytes], state: Path, deadline: float, stall_s: float) -> str:
    """Wait for the end of a process; end it, and say why, when the time is over or nothing new begins."""
    began = time.time()
    while True:
        try:
            process.wait(0.5)
            return ""
        except subprocess.TimeoutExpired:
            last = max(began, state.stat().st_mtime if state.exists() else 0.0)
        if time.monotonic() > deadline:
            return "the time for all timings was over"
        if time.time() - last > stall_s:
            return f"nothing new began for {stall_s:.0f} seconds"


def main_watched(work: Callable[[], object], state: Path) -> int:
    """What the watched process runs; its exit code."""
    try:
        work()
    except ValueError as error:
        Journal(state=state).lost("", "", str(error))
        return 2
    except DeviceLost as error:
        print(f"s2attn: the device was lost: {error}", file=sys.stderr)
        return 3
    return 0
