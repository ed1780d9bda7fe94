"""`make gpu-tests`: the tests here with a plain Python that has torch, Triton and pytest; nothing is installed.

The cheap and most telling tests come first. What can share the device runs in several processes where pytest-xdist is there, because most
of the time goes into compiling. Every result is appended to ``gpu-tests.jsonl`` in the output folder at once; the table is made of it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
SHARED = ("test_problems.py", "test_calls.py", "test_pieces.py", "test_decode.py", "test_generate.py", "test_score.py")
# The specialised kernels and those for Hopper come last: warps that wait for each other wrongly would wait until the time is over.
STAGES = (("test_first.py",), ("test_launches.py",), SHARED, ("test_long.py",), ("test_specialised.py",), ("test_hopper.py",))
WORKERS = 8
# The project's own settings ask for plugins that may be missing, and its own conftest for hypothesis.
PLAIN = ["-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(ROOT / "tests"), "--import-mode", "importlib"]
PLAIN += ["-p", "no:cacheprovider", "-q", "-rf", "--tb", "short", "-o", "faulthandler_timeout=120"]


def stage(files: tuple[str, ...], seconds: float, record: Path, more: list[str]) -> int:
    """One run of pytest, ended after so many seconds; 124 when it was."""
    several = ["-n", str(WORKERS)] if files == SHARED and find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *PLAIN, *several, *(str(FOLDER / file) for file in files), *more]
    paths = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
    environment = {**os.environ, "S2ATTN_GPU_RECORD": str(record), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"{', '.join(files)}: stopped, no time was left", flush=True)
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    given, more = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    record, end = given.out.resolve() / "gpu-tests.jsonl", time.monotonic() + given.seconds
    record.unlink(missing_ok=True)
    codes = [stage(files, end - time.monotonic(), record, more) if time.monotonic() < end else 124 for files in STAGES]
    subprocess.run([sys.executable, str(FOLDER / "table.py"), str(record)], check=False)
    # 5: a selection given on the command line leaves nothing of a stage.
    return max((code for code in codes if code != 5), default=0)


if __name__ == "__main__":
    sys.exit(main())
