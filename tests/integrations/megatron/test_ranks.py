"""Tensor and context parallelism: the same loss and gradients on every split of four ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

SCRIPT = Path(__file__).with_name("gpt.py")
LIMIT = 240
"""Seconds that ranks have; on an idle machine they need about ten."""


def run_ranks(work: str, folder: Path) -> tuple[int, str]:
    """Run a piece of work of gpt.py; its exit code and what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), work, str(folder), str(LIMIT)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=LIMIT + 40)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, output


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of loss and gradients, each against the largest number in it."""
    return max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())


def test_every_split_gives_the_loss_and_gradients_of_one_rank(gpt: ModuleType, tmp_path: Path) -> None:
    """Each head keeps its own pattern, and each chunk its own place, whoever computes them.

    One test, since starting four ranks is most of its time.
    """
    code, output = run_ranks("all_cases", tmp_path)
    assert code == 0, output
    found = torch.load(tmp_path / "found.pt")
    assert set(found) == {(name, tp, cp) for name, (_, splits) in gpt.CASES.items() for tp, cp in splits}
    alone = {key: found[key[0], 1, 1] for key in found}
    assert {key for key in found if found[key].keys() != alone[key].keys() or "loss" not in found[key]} == set()
    apart = {key: difference(found[key], alone[key]) for key in found}
    assert {key: by for key, by in apart.items() if not by < 1e-5} == {}


def test_a_rank_that_dies_is_an_error_on_the_other(tmp_path: Path) -> None:
    code, output = run_ranks("rank_dies", tmp_path)
    assert code == 1
    assert output.splitlines()[-1] == "1 3", output
    assert not (tmp_path / "found.pt").exists()
