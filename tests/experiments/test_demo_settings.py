"""The demo's settings: seeds and steps where they belong, and training that fits into the time it may take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import demo
from experiments.data import read_corpus
from experiments.demo import DemoSettings, choose_prompt, fit_steps


def test_the_full_demo_keeps_what_it_promises() -> None:
    settings = DemoSettings()
    assert settings.train.context >= 2048 and settings.lengths == (4096, 8192, 16384)
    assert settings.dense.pattern(1) != settings.sparse.pattern(1) and settings.dense.pattern(0) == settings.sparse.pattern(0)
    assert settings.flex and not settings.is_quick


def test_options_reach_the_training() -> None:
    settings = DemoSettings().with_options(seed=7, steps=60, flex=False)
    assert (settings.seed, settings.train.seed, settings.train.steps, settings.train.eval_every) == (7, 7, 60, 10)
    assert settings.train_seconds is None and not settings.flex
    assert DemoSettings().with_options(seed=7).train_seconds == DemoSettings().train_seconds


@pytest.mark.parametrize(("seconds", "steps"), [(1e-9, demo.FEWEST_STEPS), (1e9, demo.MOST_STEPS)])
def test_steps_fit_into_the_time_within_bounds(seconds: float, steps: int) -> None:
    settings = replace(DemoSettings.quick(), train_seconds=seconds)
    fitted = fit_steps(settings, read_corpus(max_files=4))
    assert fitted.train.steps == steps and fitted.train_seconds is None


def test_a_fixed_number_of_steps_is_left_alone() -> None:
    settings = DemoSettings.quick()
    assert fit_steps(settings, read_corpus(max_files=4)) is settings


def test_a_prompt_ends_with_the_head_of_a_function() -> None:
    text = b"x = 1\n" * 40 + b"class A:\n    def run(self):\n        pass\n" + b"y = 2\n" * 40
    prompt = choose_prompt(text, 100)
    assert len(prompt) == 100 and prompt.endswith(b"    def run(self):\n")
    assert choose_prompt(b"z" * 120, 100) == b"z" * 100
    with pytest.raises(ValueError, match="text must have 100 bytes for a prompt; got 5"):
        choose_prompt(b"12345", 100)
