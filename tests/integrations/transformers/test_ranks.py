"""Two processes: heads of a recipe stay where they are when they are cut over ranks, and weights may lie in pieces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import s2attn
from s2attn import HeadRange, Local, PerHead, Recipe, Sink, Stride, Unsupported, Window
from s2attn.integrations.transformers.plan import head_range
from tests.integrations.transformers.models import text, tiny
from tests.integrations.transformers.ranks import GREEDY

ROOT = Path(__file__).parents[3]
BY_HEAD = PerHead({0: Window(9), 1: Sink(3) | Window(30)}, default=Window(8))
RECIPE = Recipe(Local(1, block=16) | Stride(2, block=16), layers={1: BY_HEAD})


def run(way: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """What the two ranks of a way left behind; all of them end within two minutes, come what may."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integrations.transformers.ranks", way]
    started = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)[-4000:]
    return [torch.load(folder / f"{way}.{rank}.pt") for rank in (0, 1)]


def test_heads_cut_over_ranks_keep_their_patterns(tmp_path: Path) -> None:
    model, tokens = s2attn.patch(tiny(), RECIPE), text(2, 80)
    model.save_pretrained(tmp_path)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    with torch.no_grad():
        expected, generated = model(tokens).logits, model.generate(tokens, **GREEDY)
    for rank, got in enumerate(run("tensor_parallel", tmp_path)):
        assert got["heads"].tolist() == [2, 1, 2 * rank]
        torch.testing.assert_close(got["logits"], expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(got["loss"], loss.detach())
        assert torch.equal(got["generated"], generated)


def test_weights_in_pieces(tmp_path: Path) -> None:
    model, tokens = s2attn.patch(tiny(), RECIPE), text(2, 80)
    model.save_pretrained(tmp_path)
    losses = [model(row[None], labels=row[None], use_cache=False).loss for row in tokens]
    (sum(losses) / 2).backward()
    for got, loss in zip(run("fully_sharded", tmp_path), losses, strict=True):
        torch.testing.assert_close(got["loss"], loss.detach())
        torch.testing.assert_close(got["gradient"], model.model.layers[0].self_attn.k_proj.weight.grad, atol=1e-6, rtol=1e-4)


class Mesh:
    """As much of a device mesh as a head range is read from."""

    def __init__(self, names: Any, sizes: tuple[int, ...], ranks: tuple[int, ...]) -> None:
        self.mesh_dim_names, self.sizes, self.ranks, self.ndim = names, sizes, ranks, len(sizes)

    def size(self, axis: int = 0) -> int:
        return self.sizes[axis]

    def get_local_rank(self, axis: int = 0) -> int:
        return self.ranks[axis]


class Cut:
    def is_shard(self) -> bool:
        return True


def module_on(mesh: Mesh | None) -> nn.Module:
    module = nn.Linear(2, 2)
    if mesh is not None:
        module.weight.device_mesh, module.weight.placements = mesh, (Cut(),) * mesh.ndim
    return module


def test_a_head_range_is_never_guessed() -> None:
    assert head_range(module_on(None), (8, 2), (8, 2)) is None
    expected = HeadRange(4, 6, 8, 4)
    assert head_range(module_on(Mesh(("fsdp", "tp"), (4, 4), (1, 2))), (2, 1), (8, 4)) == expected
    assert head_range(module_on(Mesh(None, (4,), (2,))), (2, 1), (8, 4)) == expected
    for mesh in (None, Mesh(("fsdp",), (4,), (2,)), Mesh(("tp",), (2,), (1,))):
        with pytest.raises(Unsupported, match="nobody knows which heads these are"):
            head_range(module_on(mesh), (2, 1), (8, 4))
    with pytest.raises(Unsupported, match="not cut evenly"):
        head_range(module_on(None), (2, 2), (8, 4))
