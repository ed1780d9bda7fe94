"""Faults that nothing else notices: random state that does not come back, files that the disk was not asked to keep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.files import whole_folder, write_file
from experiments.model import LanguageModel, ModelConfig
from experiments.train import Run, TrainConfig
from s2attn.patterns import Dense, Recipe

CONFIG = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, recipe=Recipe(Dense()))
TRAIN = TrainConfig(steps=2, batch=1, context=16)


def test_a_resumed_run_draws_the_numbers_that_the_saved_one_would_have_drawn(tmp_path: Path) -> None:
    run = Run("run", LanguageModel(CONFIG), TRAIN)
    torch.manual_seed(7)
    torch.rand(5)
    run.save(tmp_path)
    drawn = torch.rand(5)
    torch.manual_seed(8)
    Run.resume(tmp_path, "run", TRAIN)
    assert torch.equal(torch.rand(5), drawn)


def test_a_checkpoint_gets_its_name_after_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str]] = []

    def named(handle: int) -> str:
        """The name, at this moment, of the file or folder that is open."""
        return next(path.name for path in tmp_path.rglob("*") if os.path.samestat(path.stat(), os.fstat(handle)))

    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(handle: int) -> None:
        order.append(("sync", named(handle).split("partial")[0]))
        sync(handle)

    def renamed(path: Path, target: Any) -> Path:
        order.append(("rename", Path(target).name))
        return rename(path, target)

    def replaced(path: Path, target: Any) -> Path:
        order.append(("rename", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    (tmp_path / "store").mkdir()
    with whole_folder(tmp_path / "store" / "step-1") as beside:
        write_file(beside / "a.txt", "text")
        write_file(beside / "b.pt", {"x": torch.zeros(2)})
    kinds = [(what, name.strip(".").split(".")[0]) for what, name in order]
    files = [step for name in ("a", "b") for step in (("sync", name), ("rename", name), ("sync", "step-1"))]
    assert kinds == [*files, ("sync", "step-1"), ("rename", "step-1"), ("sync", "store")]
