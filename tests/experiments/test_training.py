"""`experiments train`: the same losses after a kill, on two processes, compiled or recomputed; nothing lost when something fails."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.model import LanguageModel, ModelConfig
from experiments.progress import Silent
from experiments.train import Run, TrainConfig, load_model
from experiments.training.config import JobConfig, read_config
from experiments.training.job import CHECKPOINTS, run_training
from experiments.training.packing import Packed, Rows
from experiments.training.tokens import Bytes, Tokens
from s2attn.patterns import Dense, Local, Recipe, Stride

SPARSE = Recipe(Local(2, block=16) | Stride(2, block=16), dense_layers=[0])
SMALL = [
    *("model.layers=2", "model.width=32", "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "model.hidden=48"),
    *("model.recipe={default='local:2,block=16|stride:2,block=16', dense_layers=[0]}", "train.context=64", "train.batch=2"),
    *("train.steps=6", "train.warmup=2", "train.eval_every=3", "train.eval_windows=3", "run.save_every=2", "run.device=cpu"),
    *("data.split=file", "data.percent=30"),
]
LONG_S = 150
"""Seconds after which a process that hangs is ended."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"m{i}.txt").write_text(f"def f{i}(x):\n" + f"    x = x + {i}\n" * (2 + i))
    return texts


def changes_of(texts: Path, out: Path) -> list[str]:
    return [*SMALL, f"data.source={json.dumps(str(texts))}", f"run.out={json.dumps(str(out))}"]


def config_of(texts: Path, out: Path, *changes: str) -> JobConfig:
    return read_config(None, [*changes_of(texts, out), *changes])


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """The lines of a run without what differs from machine to machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def steps_in(out: Path) -> list[str]:
    return sorted(path.name for path in (out / CHECKPOINTS).iterdir())


KILLED = """
import os, signal, sys
from experiments.progress import Silent
from experiments.training.config import read_config
from experiments.training.job import run_training

class Killer(Silent):
    steps = 0
    def advance(self, text=""):
        self.steps += 1
        if self.steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)  # as nothing that could be caught does

run_training(read_config(None, sys.argv[1:]), Killer())
"""


def test_a_run_leaves_metrics_results_and_a_model(folder: Path, tmp_path: Path) -> None:
    results = run_training(config_of(folder, tmp_path / "out", "data.tokenizer=bpe", "data.vocabulary=300"), Silent())
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert results["tokens_read"] == 6 * 2 * 64 and results["data"]["train_files"] + results["data"]["validation_files"] == 20
    assert steps_in(tmp_path / "out") == ["step-00000004", "step-00000006"]
    model = load_model(tmp_path / "out" / CHECKPOINTS / "step-00000006")
    assert model.config.recipe == SPARSE and model.config.vocabulary == results["data"]["vocabulary"] <= 300
    assert results["bits_per_byte"] < results["validation_loss"] / torch.log(torch.tensor(2.0))


def test_a_killed_run_goes_on_with_the_same_losses(folder: Path, tmp_path: Path) -> None:
    more = ("data.tokenizer=bpe", "data.vocabulary=300")
    run_training(config_of(folder, tmp_path / "straight", *more), Silent())
    words = [*changes_of(folder, tmp_path / "killed"), *more]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert steps_in(tmp_path / "killed") == ["step-00000002", "step-00000004"]
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # half a line
    run_training(config_of(folder, tmp_path / "killed", *more), Silent(), resume=True)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "straight")
    straight, killed = (load_model(tmp_path / name / CHECKPOINTS / "step-00000006") for name in ("straight", "killed"))
    for a, b in zip(straight.parameters(), killed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_two_processes_give_the_losses_of_one_and_either_goes_on_from_the_other(folder: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled = ("train.compile=true", "train.compile_backend=eager")
    run_training(config_of(folder, tmp_path / "one", *compiled), Silent())
    sets = [word for change in (*changes_of(folder, tmp_path / "two"), *compiled) for word in ("--set", change)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "experiments", "train", *sets]
    for more in (["--set", "run.save_every=4"], ["--resume"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=LONG_S)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "2 x cpu" in done.stdout
        for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
            assert two == pytest.approx(one, rel=1e-5)
        last = tmp_path / "two" / CHECKPOINTS / "step-00000006"
        if last.exists():  # for the second turn: as if killed behind step 4
            shutil.rmtree(last)
    resumed = run_training(config_of(folder, tmp_path / "two", *compiled), Silent(), resume=True)
    straight = json.loads((tmp_path / "one" / "results.json").read_text())
    assert resumed["validation_loss"] == pytest.approx(straight["validation_loss"], rel=1e-5)


def test_documents_in_a_row_see_nothing_of_each_other() -> None:
    model = LanguageModel(ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48, recipe=SPARSE)).eval()
    texts = [torch.randint(1, 256, (1, n), generator=torch.Generator().manual_seed(n)) for n in (40, 1, 23, 64)]
    rows = torch.cat(texts, dim=1).view(2, 64)
    with torch.no_grad():
        packed = model(rows, torch.tensor([0, 40, 41, 64, 128], dtype=torch.int32)).flatten(0, 1)
        apart = torch.cat([model(text)[0] for text in texts])
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(rows).flatten(0, 1), apart, atol=1e-3)


def losses_with(**changes: Any) -> list[float]:
    model = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48, recipe=changes.pop("recipe", SPARSE))
    model = replace(model, layers=changes.pop("layers", 2))
    config = TrainConfig(**{"steps": 4, "batch": 2, "context": 64, "warmup": 1, "learning_rate": 1e-2, **changes})
    tokens = Tokens.of(["for i in range(10):\n    print(i)\n" * 9, "x = 1\n" * 7, "import os\n" * 30], Bytes())
    run = Run("run", LanguageModel(model), config)
    return [run.advance(Packed(tokens, tokens, Rows(config.batch, config.context)))["loss"] for _ in range(config.steps)]


def test_recomputing_changes_no_loss() -> None:
    assert losses_with(recompute=True) == losses_with()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_many_layers_are_compiled_too() -> None:
    torch._dynamo.reset()
    short = {"layers": 12, "steps": 2}
    assert losses_with(compile=True, compile_backend="eager", **short) == pytest.approx(losses_with(**short), rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiling_changes_losses_by_rounding_only(recompute: bool) -> None:
    torch._dynamo.reset()
    compiled = losses_with(compile=True, compile_backend="aot_eager", recompute=recompute)
    assert compiled == pytest.approx(losses_with(), rel=1e-4)


def test_bfloat16_learns_like_float32_but_not_with_the_same_bits() -> None:
    half, full = losses_with(precision="bfloat16", steps=12), losses_with(steps=12)
    assert half != full
    assert half == pytest.approx(full, rel=0.03)
    assert half[-1] < 0.8 * half[0]


def test_a_pattern_that_sees_everything_learns_like_a_dense_one_on_packed_rows() -> None:
    assert losses_with(recipe=Recipe(Local(4, block=16))) == pytest.approx(losses_with(recipe=Recipe(Dense())), rel=1e-4)


def test_a_folder_with_checkpoints_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    run_training(config_of(folder, tmp_path / "out"), Silent())
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"run.out must be a folder without checkpoints, or be resumed \(--resume\); got .*step-00000006"):
        run_training(config_of(folder, tmp_path / "out"), Silent())
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_configuration_or_other_text_is_refused(folder: Path, tmp_path: Path) -> None:
    run_training(config_of(folder, tmp_path / "out"), Silent())
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    rule = r"the configuration must be that of the checkpoint .*step-00000006; got "
    with pytest.raises(ValueError, match=rule + r"train.learning_rate is 0.5 here and 0.004 there; train.seed is 3 here and 0 there"):
        run_training(config_of(folder, tmp_path / "out", "train.seed=3", "train.learning_rate=0.5"), Silent(), resume=True)
    with pytest.raises(ValueError, match=rule + "model.recipe"):
        run_training(config_of(folder, tmp_path / "out", "model.recipe=dense"), Silent(), resume=True)
    (folder / "m0.txt").write_text("something else\n")
    with pytest.raises(ValueError, match=r"the text must be that of the checkpoint .*; got other tokens"):
        run_training(config_of(folder, tmp_path / "out"), Silent(), resume=True)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    assert steps_in(tmp_path / "out") == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("name", ["weights.pt", "training.pt"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_as_good(folder: Path, tmp_path: Path, name: str) -> None:
    run_training(config_of(folder, tmp_path / "out"), Silent())
    expected, newest = metrics_of(tmp_path / "out"), tmp_path / "out" / CHECKPOINTS / "step-00000006"
    (newest / name).write_bytes((newest / name).read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"the newest checkpoint must be readable; without its folder .*step-00000006\); got "):
        run_training(config_of(folder, tmp_path / "out"), Silent(), resume=True)
    shutil.rmtree(newest)
    run_training(config_of(folder, tmp_path / "out"), Silent(), resume=True)
    assert metrics_of(tmp_path / "out") == expected


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write beyond ``size`` bytes, in the middle of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Full(Silent):
    """The disk is full from a step on."""

    def __init__(self, step: int):
        self.left, self.limit = step, files_of_at_most(20_000)

    def advance(self, text: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            self.limit.__enter__()


def test_a_full_disk_leaves_the_checkpoints_as_they_were(folder: Path, tmp_path: Path) -> None:
    run_training(config_of(folder, tmp_path / "straight"), Silent())
    show, out = Full(3), tmp_path / "out"
    try:
        with pytest.raises(OSError, match=r"step-00000004 could not be saved; those before it are as they were, .* \(File too large\)"):
            run_training(config_of(folder, out), show)
    finally:
        show.limit.__exit__(None, None, None)
    assert steps_in(out) == ["step-00000002"]  # complete, and nothing half written beside it
    run_training(config_of(folder, out), Silent(), resume=True)
    assert metrics_of(out) == metrics_of(tmp_path / "straight")


def test_a_loss_that_is_no_number_ends_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss must stay finite; a smaller train.learning_rate helps; got (nan|inf) at step"):
        run_training(config_of(folder, tmp_path / "out", "train.learning_rate=1e20", "train.clip=1e30"), Silent())


def test_a_context_beyond_the_text_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.context must not be above the tokens of the \w+ text \(\d+\).*; got 100000"):
        run_training(config_of(folder, tmp_path / "out", "train.context=100000"), Silent())
    assert not (tmp_path / "out" / CHECKPOINTS).exists()
