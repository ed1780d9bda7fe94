"""Tensor and context parallelism: the same loss and gradients on every split of four ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Loss and gradients of every case on every split, from one start of four ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    code, output = run_ranks("all_cases", folder)
    assert code == 0, output
    return torch.load(folder / "found.pt")


def splits() -> list[tuple[str, int, int]]:
    names = {
        "rows": [(2, 1), (1, 2), (2, 2), (1, 4)],
        "fewer groups than ranks": [(4, 1)],
        "packed": [(1, 2), (2, 2), (1, 4)],
    }
    return [(name, tp, cp) for name, split in names.items() for tp, cp in split]


@pytest.mark.parametrize(("name", "tp", "cp"), splits(), ids=lambda value: str(value))
def test_every_split_gives_the_loss_and_gradients_of_one_rank(found: dict, name: str, tp: int, cp: int) -> None:
    """Each head keeps its own pattern, and each chunk its own place, whoever computes them."""
    alone, split = found[name, 1, 1], found[name, tp, cp]
    assert alone.keys() == split.keys() and "loss" in alone
    for value in alone:
        torch.testing.assert_close(
            split[value], alone[value], rtol=0, atol=1e-5 * alone[value].abs().max().item(), msg=lambda text, of=value: f"{of}: {text}"
        )


def test_all_splits_were_run(found: dict, gpt: ModuleType) -> None:
    assert set(found) == {(name, tp, cp) for name, (_, splits) in gpt.CASES.items() for tp, cp in splits}
    assert set(splits()) == {key for key in found if key[1:] != (1, 1)}


def test_a_rank_that_dies_is_an_error_on_the_other(tmp_path: Path) -> None:
    code, output = run_ranks("rank_dies", tmp_path)
    assert code == 1
    assert output.splitlines()[-1] == "1 3", output
    assert not (tmp_path / "found.pt").exists()
