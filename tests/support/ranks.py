"""Several processes that talk over gloo, started from a test: one interpreter loads torch and forks, results and errors come back.

A test file ends with ``if __name__ == "__main__": run_here(globals())`` and asks `run_ranks` for one of its functions, which every process
calls. Nothing waits for ever: collectives have a limit, and so has the whole.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_SECONDS = 60.0
"""After so long a collective that somebody does not join is an error."""


@dataclass(frozen=True)
class Ended:
    """How one process ended: what its function returned, or the text of its error; ``None`` for both where it died."""

    value: Any = None
    error: str | None = None


def run_ranks(script: Path | str, function: str, ranks: int, *, seconds: float = 180.0) -> list[Ended]:
    """Call a function of a script in so many processes, and return how each ended.

    Args:
        script: a file that ends as said above.
        function: takes no arguments; in it `torch.distributed` is ready. What it returns must be what `torch.save` can write.
        seconds: after so long all processes are killed.

    Raises:
        TimeoutError: they were still running then.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), function, str(ranks), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        try:
            _, said = parent.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(parent.pid, signal.SIGKILL)
            _, said = parent.communicate()
            raise TimeoutError(f"{function} on {ranks} processes took longer than {seconds} s\n{said}") from None
        ended = []
        for rank in range(ranks):
            path = Path(folder) / f"{rank}.pt"
            ended.append(Ended(**torch.load(path, weights_only=False)) if path.exists() else Ended())
        if parent.returncode:
            raise RuntimeError(f"the processes could not be started\n{said}")
        return ended


def values(ended: list[Ended]) -> list[Any]:
    """What all processes returned; an error where one of them failed."""
    wrong = {rank: one.error or "died" for rank, one in enumerate(ended) if one.error is not None or one.value is None}
    if wrong:
        raise RuntimeError("\n".join(f"rank {rank}: {why}" for rank, why in wrong.items()))
    return [one.value for one in ended]


def run_here(names: Mapping[str, Callable[[], Any]]) -> None:
    """What a script that `run_ranks` starts does: fork, and run the function in each process."""
    function, ranks, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    children = []
    for rank in range(ranks):  # nothing has been computed yet, so that there are no threads that a fork would lose
        child = os.fork()
        if not child:
            _one(names[function], rank, ranks, folder)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _one(function: Callable[[], Any], rank: int, ranks: int, folder: Path) -> None:
    result: dict[str, Any]
    try:
        limit = timedelta(seconds=COLLECTIVE_SECONDS)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks, timeout=limit)
        torch.manual_seed(0)
        result = {"value": function()}
    except BaseException:
        result = {"error": traceback.format_exc()}
    partly = folder / f"{rank}.part"
    torch.save(result, partly)
    partly.rename(folder / f"{rank}.pt")
    if "value" in result:
        dist.destroy_process_group()
    os._exit(0)
