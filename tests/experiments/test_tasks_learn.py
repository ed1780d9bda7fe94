"""Learning and scoring tasks: equal tokens per step, exact resume, scores that greedy decoding confirms, rotary scaling, heat maps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.generate import generate
from experiments.model import LanguageModel, ModelConfig
from experiments.tasks import Copy, Curriculum, Passkey, Recall, Scores, Stretch, heat_map, learn, right_answers, score_task, stretched
from experiments.tasks.learn import IGNORED, Questions
from experiments.tasks.rope import stretched_config
from experiments.train import Run, TrainConfig
from s2attn import Dense, Local, Recipe
from s2attn.nn.rotary import rotations
from s2attn.nn.sampling import Sampling

MODEL = ModelConfig(layers=2, width=32, heads=2, kv_heads=2, head_dim=16, hidden=48)
LENGTHS = Curriculum(32, 64, step_tokens=256)
TASK = Passkey(digits=1)
DENSE = Recipe(Dense())


def run_of(steps: int, recipe: Recipe = DENSE) -> Run:
    config = TrainConfig(steps=steps, warmup=5, learning_rate=1e-2, weight_decay=0.01)
    return Run("dense", LanguageModel(MODEL.with_recipe(recipe)), config)


@pytest.fixture(scope="module")
def learned() -> Run:
    run = run_of(120)
    learn(run, [TASK], LENGTHS)
    return run


@pytest.fixture(scope="module")
def near() -> Run:
    """One block of 16 in each of two layers: what stands at the start of 64 tokens is out of reach."""
    run = run_of(120, Recipe(Local(1, block=16)))
    learn(run, [TASK], LENGTHS)
    return run


def test_a_model_learns_what_its_pattern_reaches_and_nothing_beyond(learned: Run, near: Run) -> None:
    assert score_task(learned.model, TASK, lengths=[64], depths=[0.0, 1.0], samples=16).mean > 0.9
    far_off, close_by = score_task(near.model, TASK, lengths=[64], depths=[0.0, 1.0], samples=16).exact[0]
    assert far_off < 0.5 < close_by


def test_every_step_reads_equally_many_tokens_and_lengths_double() -> None:
    lengths = Curriculum(32, 128, step_tokens=256)
    batches = [lengths.batch([Passkey(), Recall(pairs=2, queries=1)], step, steps=6, seed=0) for step in range(6)]
    assert [tuple(batch.inputs.shape) for batch in batches] == [(8, 32), (8, 32), (4, 64), (4, 64), (2, 128), (2, 128)]
    assert ["#" in batch.text(0) for batch in batches] == [True, False] * 3


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(tmp_path: Path, learned: Run) -> None:
    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 7:
            raise KeyboardInterrupt

    run = run_of(120)
    with pytest.raises(KeyboardInterrupt):
        learn(run, [TASK], LENGTHS, stop)
    run.save(tmp_path)
    resumed = Run.resume(tmp_path, "dense", run.config)
    with pytest.raises(KeyboardInterrupt):
        learn(resumed, [TASK], LENGTHS, lambda entry: stop({"step": entry["step"] - 4}))
    assert resumed.step == 11
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in learned.history[:11]]


def test_only_the_answer_teaches() -> None:
    entries: list[dict[str, Any]] = []
    run = run_of(1)
    batch = LENGTHS.batch([TASK], 0, steps=1, seed=0)
    with torch.no_grad():
        chances = run.model(batch.inputs)[:, -1].log_softmax(-1)
    answers = batch.tokens[:, -1]
    learn(run, [TASK], LENGTHS, entries.append)
    assert entries[0]["loss"] == pytest.approx(-chances.gather(1, answers[:, None]).mean().item(), rel=1e-5)
    assert entries[0]["loss"] == pytest.approx(math.log(256), rel=0.2)
    assert (entries[0]["task"], entries[0]["length"]) == ("passkey", 32)
    assert run.history == entries


def test_a_run_on_tasks_is_judged_on_questions_that_no_step_asks() -> None:
    feed = Questions((TASK, Recall(pairs=2, queries=1)), LENGTHS, steps=4)
    (first, second) = feed.validation()
    assert first.inputs.shape == second.inputs.shape == (4, 64)
    assert all(not torch.equal(first.inputs, feed.train(step).inputs) for step in range(4))
    assert int((first.targets != IGNORED).sum()) == 4 and int((second.targets != IGNORED).sum()) == 8


def test_an_exact_answer_is_what_greedy_decoding_writes(near: Run) -> None:
    batch = TASK.batch(64, 24, seed=11)
    greedy = [generate(near.model, batch.text(row)[:-1].encode(), Sampling(1, temperature=0.0)).text for row in range(24)]
    written = [text == batch.answer(row) for row, text in enumerate(greedy)]
    assert (right_answers(near.model, batch) == 1).tolist() == written
    assert 0 < sum(written) < 24, "a model that does not see everything shows both outcomes"


def test_longer_answers_are_judged_as_greedy_decoding_writes_them(near: Run) -> None:
    # Its own continuation is put where the answer stands, then changed at one place.
    task = Passkey(digits=3)
    batch = task.batch(64, 3, seed=11)
    for row in range(3):
        text = generate(near.model, batch.text(row)[:-3].encode(), Sampling(3, temperature=0.0)).new
        batch.tokens[row, -3:] = torch.tensor(list(text))
    assert right_answers(near.model, batch).tolist() == [1.0] * 3
    batch.tokens[:, -1] = ord("!")
    assert right_answers(near.model, batch).tolist() == pytest.approx([2 / 3] * 3)


def test_a_copy_is_scored_at_its_depth_alone() -> None:
    class Half(torch.nn.Module):
        """Says the right letter in the first half of the copy and nothing right in the second."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            said = torch.zeros(*tokens.shape, 256)
            known = batch.targets.clone()
            known[:, 75:] = 0
            return said.scatter(2, known[:, :, None], 1.0)

    found = []
    for depth in (0.0, 1.0):
        batch = Copy(span=4).batch(101, 3, seed=0, depth=depth)
        found.append(right_answers(Half(), batch).tolist())
    assert found == [[1.0] * 3, [0.0] * 3]


def test_scores_count_lengths_depths_and_samples(learned: Run) -> None:
    scores = score_task(learned.model, TASK, lengths=[32, 64], depths=[0.0, 0.5, 1.0], samples=5, batch=2)
    assert len(scores.exact) == 2 and all(len(row) == 3 for row in scores.exact)
    assert all(round(5 * share, 4).is_integer() for row in scores.exact for share in row)
    assert all(
        token >= exact for row, rows in zip(scores.tokens, scores.exact, strict=True) for token, exact in zip(row, rows, strict=True)
    )
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
    assert scores.mean == pytest.approx(sum(map(sum, scores.exact)) / 6)
    whole = score_task(learned.model, TASK, lengths=[32, 64], depths=[0.0, 0.5, 1.0], samples=5, batch=2)
    assert whole == scores


def test_interpolated_positions_stand_where_shorter_ones_stood() -> None:
    place = torch.arange(64)[None]
    long = rotations(place, stretched_config(MODEL, 4.0, "interpolation").turns())
    short = rotations(place, MODEL.turns())
    for stretched_angles, angles in zip(long, short, strict=True):
        torch.testing.assert_close(stretched_angles[:, ::4], angles[:, :16])


def test_ntk_slows_the_last_angle_by_the_factor_and_leaves_the_first() -> None:
    plain, slowed = MODEL.turns(), stretched_config(MODEL, 8.0, "ntk").turns()
    assert float(plain[0] / slowed[0]) == pytest.approx(1.0)
    assert float(plain[-1] / slowed[-1]) == pytest.approx(8.0, rel=1e-4)


def test_a_stretched_model_keeps_its_weights_and_its_source(learned: Run) -> None:
    tokens = torch.arange(20)[None] + 97
    before = learned.model(tokens)
    assert torch.equal(stretched(learned.model, 1.0)(tokens), before)
    for method in ("interpolation", "ntk"):
        other = stretched(learned.model, 4.0, method)
        assert not torch.allclose(other(tokens), before)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), learned.model.parameters(), strict=True))
    assert torch.equal(learned.model(tokens), before)
    stretch = Stretch(64)
    assert stretch.model(learned.model, 64) is learned.model
    assert stretch.model(learned.model, 256).config == stretched_config(MODEL, 4.0)


def test_heat_maps_show_every_task(tmp_path: Path) -> None:
    scores = Scores("passkey", (64, 128), (0.0, 1.0), 4, ((1.0, 0.5), (0.25, 0.0)), ((1.0, 0.5), (0.25, 0.0)))
    path = heat_map([scores, scores], tmp_path / "maps" / "heat.png", title="dense")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curriculum(64, 200, 800), r"Curriculum end must be start \(64\) doubled some times; got 200"),
        (lambda: Curriculum(64, 128, 100), r"Curriculum step_tokens must be a multiple of end \(128\); got 100"),
        (lambda: learn(run_of(1), [], LENGTHS), r"tasks must name one task at least; got none"),
        (lambda: learn(run_of(1), [Recall()], LENGTHS), r"Curriculum start must be at least 60 for recall; got 32"),
        (lambda: stretched_config(MODEL, 0.5), r"factor must be 1 or more; got 0.5"),
        (lambda: stretched_config(MODEL, 2.0, "yarn"), r"method must be one of interpolation, ntk; got 'yarn'"),
        (lambda: Stretch(64, "yarn"), r"Stretch method must be one of interpolation, ntk; got 'yarn'"),
        (lambda: ModelConfig(rope_factor=0.0), r"rope_factor must be positive; got 0.0"),
        (lambda: score_task(LanguageModel(MODEL), TASK, lengths=[]), r"lengths and depths must not be empty"),
        (lambda: heat_map([], Path("none.png")), r"found must hold one score at least; got none"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
