"""Training: it learns, it resumes, runs take turns on the same data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.data import Windows
from experiments.model import LanguageModel, ModelConfig
from experiments.train import Run, TrainConfig, steps_that_fit, train_in_turn
from s2attn import Dense, Local, Recipe, Stride

SPARSE = Recipe(Local(2, block=16) | Stride(2, block=16), dense_layers=[0])
MODEL = ModelConfig(layers=2, width=32, heads=2, kv_heads=2, head_dim=16, hidden=48, recipe=SPARSE)
TRAIN = TrainConfig(steps=8, batch=2, context=64, warmup=2, learning_rate=1e-2, eval_every=4, eval_windows=2)
TEXT = torch.tensor(list(b"for i in range(10):\n    print(i)\n" * 60), dtype=torch.uint8)
FEED = Windows(TEXT, TEXT, batch=2, context=64, windows=2)


def run_of(name: str = "s2", recipe: Recipe = SPARSE, config: TrainConfig = TRAIN) -> Run:
    return Run(name, LanguageModel(MODEL.with_recipe(recipe)), config)


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.history if "loss" in entry]


def test_the_loss_falls_far_below_that_of_knowing_nothing() -> None:
    run = run_of(config=TrainConfig(steps=30, batch=2, context=64, warmup=2, learning_rate=1e-2))
    for _ in range(30):
        run.advance(FEED)
    assert losses(run)[0] == pytest.approx(math.log(256), rel=0.1)
    assert losses(run)[-1] < 0.5 * losses(run)[0]


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    straight = run_of()
    for _ in range(6):
        straight.advance(FEED)
    stopped = run_of()
    for _ in range(3):
        stopped.advance(FEED)
    stopped.save(tmp_path)
    resumed = Run.resume(tmp_path, "s2", TRAIN)
    for _ in range(3):
        resumed.advance(FEED)
    assert resumed.step == straight.step == 6
    assert losses(resumed) == losses(straight)
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_runs_take_turns_and_are_validated_together() -> None:
    entries: list[dict[str, Any]] = []
    runs = [run_of("dense", Recipe(Dense())), run_of("s2")]
    train_in_turn(runs, FEED, entries.append)
    assert [entry["run"] for entry in entries[:4]] == ["dense", "s2", "s2", "dense"]
    assert [(entry["run"], entry["step"]) for entry in entries if "validation_loss" in entry] == [
        ("dense", 4),
        ("s2", 4),
        ("dense", 8),
        ("s2", 8),
    ]
    assert all(run.step == TRAIN.steps for run in runs)
    dense, sparse = (run.summary() for run in runs)
    assert dense["bytes_read"] == sparse["bytes_read"] == 8 * 2 * 64
    assert dense["parameters"] == sparse["parameters"]
    assert sparse["bits_per_byte"] == pytest.approx(sparse["validation_loss"] / math.log(2))


def test_patterns_that_see_everything_train_like_dense_ones() -> None:
    everything = Recipe(Local(4, block=16))  # four blocks of 16: all of the context of 64
    a, b = run_of("dense", Recipe(Dense())), run_of("local", everything)
    train_in_turn([a, b], FEED, lambda entry: None)
    assert losses(a) == pytest.approx(losses(b), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 0}, "steps must be an integer >= 1; got 0"), ({"learning_rate": 0.0}, "learning_rate must be positive; got 0.0")],
)
def test_bad_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_training_that_does_not_fit_into_its_time_ends_sooner() -> None:
    config = TrainConfig(steps=200, batch=1, context=16, eval_every=100, eval_windows=1)
    runs = [run_of("dense", Recipe(Dense()), config), run_of("s2", config=config)]
    train_in_turn(runs, FEED, lambda entry: None, seconds=1e-6)
    assert [run.step for run in runs] == [11, 11]
    assert all("validation_loss" in run.history[-1] for run in runs)


def test_the_end_moves_with_the_speed_of_the_last_steps() -> None:
    run = run_of()
    run.step = 20
    run.history = [{"step": i + 1, "loss": 1.0, "seconds": 9.0 if i < 10 else 2.0} for i in range(20)]
    assert steps_that_fit([run], planned=100, left=1000.0) == 100
    assert steps_that_fit([run], planned=100, left=40.0) == 40
    run.history[-1]["seconds"] = 500.0  # one hiccup
    assert steps_that_fit([run], planned=100, left=40.0) == 40
    assert steps_that_fit([run], planned=100, left=-5.0) == 21
