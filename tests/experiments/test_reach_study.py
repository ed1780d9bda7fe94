"""The study of reach: hops against brute force and real models, data, runs that go on, and a report whose numbers are those of its runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.folder import Gauge, Surroundings, Watch, finished, write_json
from experiments.model import LanguageModel, ModelConfig
from experiments.progress import Silent
from experiments.reach_study import Digits, Outcome, _job, one_run, right_counts, run_reach
from experiments.reach_study_hops import NEVER, hops
from experiments.reach_study_report import hops_table, result_table, summary, totals, totals_table, write_report
from experiments.reach_study_settings import Case, ReachSettings
from experiments.tasks import Curriculum
from experiments.tasks.learn import IGNORED
from s2attn.analysis.reach import reach
from s2attn.patterns import Dense, Dilated, Local, Pattern, Power, Recipe, Sink, Stride, Window
from tests.support import dense_mask
from tests.support.strategies import patterns

TINY = replace(ReachSettings.of("tiny"), patterns=("window", "dense"))
HOST = {"processor": "abacus", "cores": 1, "torch": "2", "s2attn": "0"}
QUIET = Surroundings(Silent(), Watch(), Gauge())


class Stages(Silent):
    """Keeps titles and notes, and may stop at a stage as a killed process would."""

    def __init__(self, stop_at: int | None = None):
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.stop_at = stop_at

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, text: str = "") -> None:
        if len(self.stages) == self.stop_at:
            raise KeyboardInterrupt


def model_of(layers: list[Pattern], heads: tuple[int, int] = (2, 2), look_back: int = 0) -> ModelConfig:
    recipe = Recipe(Dense(), layers=dict(enumerate(layers)))
    return ModelConfig(len(layers), 16, *heads, head_dim=8, hidden=16, vocabulary=128, look_back=look_back, recipe=recipe)


def walked(config: ModelConfig, seqlen: int, question: int) -> dict[int, int]:
    """Every token that a question can know, with its hops: all paths, walked down from the last layer, over masks made token by token."""
    at = {question: 0}
    for layer in reversed(range(config.layers)):
        seen = dense_mask(config.recipe.pattern(layer), config.heads, config.kv_heads, seqlen, seqlen, layer=layer).any(0)
        below = dict(at)
        for position, moves in at.items():
            for key in seen[position].nonzero().flatten().tolist():
                below[key] = min(below.get(key, moves + 1), moves + 1)
        at = below
    known: dict[int, int] = {}
    for position, moves in at.items():
        for token in range(max(0, position - config.look_back), position + 1):
            known[token] = min(known.get(token, moves), moves)
    return known


@settings(deadline=None, max_examples=40)
@given(st.lists(patterns(), min_size=1, max_size=3), st.sampled_from([(1, 1), (4, 2), (4, 4)]), st.integers(1, 90), st.integers(0, 3))
def test_hops_are_those_of_walking_every_path(layers: list[Pattern], heads: tuple[int, int], seqlen: int, look_back: int) -> None:
    config = model_of(layers, heads, look_back)
    questions = sorted({0, seqlen // 3, seqlen - 1})
    found = hops(config, seqlen, questions, range(seqlen))
    for row, question in zip(found, questions, strict=True):
        known = walked(config, seqlen, question)
        assert row.tolist() == [known.get(place, NEVER) for place in range(seqlen)]


@pytest.mark.parametrize(
    "layers",
    [
        [Window(9)] * 3,
        [Local(1, block=16) | Stride(3, block=16), Window(5), Dilated(2, block=16)],
        [Sink(16) | Power(block=16)] * 2,
        [Dilated(2, block=16)] * 3,
        [Window(4), Dense()],
        [Dense(), Window(4)],
    ],
)
@pytest.mark.parametrize("look_back", [0, 2])
def test_a_models_output_depends_on_a_token_exactly_where_there_is_a_path(layers: list[Pattern], look_back: int) -> None:
    seqlen, question = 75, 70
    config = model_of(layers, look_back=look_back)
    model = LanguageModel(config, seed=3).double()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(97, 123, (1, seqlen)))
    changed = tokens.repeat(seqlen, 1)
    changed[torch.arange(seqlen), torch.arange(seqlen)] = ord("5")
    with torch.no_grad():
        differ = (model(changed)[:, question] - model(tokens)[:, question]).abs().amax(1)
    could = hops(config, seqlen, [question], range(seqlen))[0] != NEVER
    assert (differ.numpy() > 1e-14).tolist() == could.tolist()
    assert not could[question + 1 :].any() and could[question]


@pytest.mark.parametrize("pattern", [Sink(16) | Power(block=16), Local(2, block=16) | Stride(4, 0, block=16), Dilated(2, 6, block=16)])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_token_reaches_as_many_blocks_as_reach_says(pattern: Pattern, layers: int) -> None:
    found = hops(model_of([pattern] * layers, (1, 1)), 256, [255], range(7, 256, 16))
    assert int((found != NEVER).sum()) == reach(pattern, seqlen=256, layers=layers, block=16).blocks[-1]


def test_a_window_reaches_its_width_per_layer() -> None:
    found = hops(model_of([Window(8)] * 3), 64, [63], range(64))[0]
    assert (
        found[::-1].tolist() == [0 if d == 0 else -(-d // 7) if d <= 21 else NEVER for d in range(64)] or found[-1] == 0 or found[-1] == 1
    )
    assert [int((found == count).sum()) for count in (1, 2, 3)] == [7, 7, 7]


def test_every_token_from_the_digit_on_is_asked_and_none_before() -> None:
    feed = Digits(replace(TINY, curriculum=Curriculum(32, 128, 512)), seed=5)
    for step, length in ((0, 32), (3, 128)):
        batch = feed.train(step)
        assert batch.inputs.shape == (512 // length, length)
        is_digit = batch.inputs < ord("a")
        assert (is_digit.sum(1) == 1).all()
        asked = batch.targets != IGNORED
        assert torch.equal(asked, is_digit.cumsum(1) > 0)
        assert torch.equal(batch.targets.masked_fill(~asked, 0).amax(1), batch.inputs.masked_fill(~is_digit, 0).amax(1))
    assert torch.equal(feed.train(1).inputs, feed.train(1).inputs) and not torch.equal(feed.train(0).inputs, feed.train(1).inputs)
    assert not torch.equal(feed.train(0).inputs, Digits(feed.settings, seed=6).train(0).inputs)


class Reader(nn.Module):
    """Says the digit at every token that is less than ``far`` tokens behind it, and a 3 elsewhere."""

    def __init__(self, far: int):
        super().__init__()
        self.far = far

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        at = (tokens < ord("a")).int().argmax(1, keepdim=True)
        behind = torch.arange(tokens.shape[1]) - at
        said = torch.where((behind >= 0) & (behind < self.far), tokens.gather(1, at), ord("3"))
        return nn.functional.one_hot(said, 128).float()


def test_answers_are_counted_per_question_and_place() -> None:
    found = right_counts(Reader(40), TINY, QUIET)
    behind = np.array(TINY.questions)[:, None] - np.array(TINY.places)
    assert found.tolist() == np.where((behind >= 0) & (behind < 40), 10, 1).tolist()


def test_what_is_in_reach_is_learned_and_what_is_not_stays_a_guess() -> None:
    model = replace(ReachSettings.of("small").model, heads=2, kv_heads=2, width=32, hidden=32)
    train = replace(ReachSettings.of("small").train, steps=100, warmup=5, learning_rate=1e-2)
    made = replace(TINY, model=model, train=train, curriculum=Curriculum(32, 128, 512), place_every=8, question_every=4, samples=20)
    run = one_run(made, Case("window", 1, 1), QUIET)
    found = totals([run])
    assert found["reachable"]["asked"] > 20 and found["reachable"]["learned"] == found["reachable"]["asked"]
    assert found["unreachable"]["learned"] == 0 and found["unreachable"]["exact"] < 0.2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    out = tmp_path_factory.mktemp("whole")
    return run_reach(TINY, out, Silent(), Gauge(host=lambda: HOST)), out


def test_every_run_is_a_file(whole: tuple[Outcome, Path]) -> None:
    outcome, out = whole
    assert [case.name for case in outcome.runs] == ["window-layers1-seed0", "window-layers2-seed0", "dense-layers1-seed0"]
    assert outcome.open == [] and len(list((out / "runs").iterdir())) == 3
    for case, run in outcome.runs.items():
        assert json.loads((out / "runs" / f"{case.name}.json").read_text()) == run
        assert run["tokens"] == 4 * 128 and [len(row) for row in run["hops"]] == [len(row) for row in run["right"]] == [1, 2, 2, 3, 4]


def test_a_killed_study_goes_on_where_it_stopped(whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_reach(TINY, tmp_path, Stages(stop_at=2))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert [path.name for path in files] == ["window-layers1-seed0.json"]
    show = Stages()
    outcome = run_reach(TINY, tmp_path, show)
    assert show.stages == ["window, 2 layers, seed 0 (2 of 3)", "dense, 1 layer, seed 0 (3 of 3)"]
    assert {path: path.stat().st_mtime_ns for path in files} == files, "finished runs are left alone"
    for case, run in outcome.runs.items():
        assert (run["right"], run["loss"]) == (whole[0].runs[case]["right"], whole[0].runs[case]["loss"])


def test_a_budget_that_is_spent_begins_nothing(tmp_path: Path) -> None:
    show = Stages()
    assert run_reach(TINY, tmp_path, show, limit=1e-9).open == TINY.cases
    assert show.stages == [] and show.notes == ["stopped: 0 s are left"]


def test_more_seeds_may_join_later_and_other_settings_are_refused(whole: tuple[Outcome, Path]) -> None:
    other = replace(TINY, patterns=("dense",), seeds=(0, 1), size="small")
    jobs = [_job(other, case, QUIET) for case in other.cases]
    assert [finished(job, whole[1]) is None for job in jobs] == [False, True]
    with pytest.raises(ValueError, match=r"out must be a folder of the same settings; train differ"):
        run_reach(TINY.with_steps(9), whole[1], Silent())
    with pytest.raises(ValueError, match=r"out must be a folder of the same settings; block, recipe differ"):
        run_reach(replace(TINY, block=32, patterns=("window", "dilated")), _renamed(whole[1]), Silent())


def _renamed(out: Path) -> Path:
    """A folder in which a window's run has the name of another pattern."""
    other = out.parent / f"{out.name}-renamed"
    (other / "runs").mkdir(parents=True)
    (other / "runs" / "dilated-layers1-seed0.json").write_text((out / "runs" / "window-layers1-seed0.json").read_text())
    return other


def hand_made(pattern: str, layers: int, hops: list[list[int]], right: list[list[int]]) -> dict[str, Any]:
    facts = {"pattern": pattern, "layers": layers, "seed": 0, "made_with": TINY.facts(), "recipe": {}, "host": HOST}
    told = {"parameters": 7, "tokens": 9, "loss": 0.5, "seconds": 2.0, "train_seconds": 1.0}
    return {**facts, **told, "questions": [70, 90], "places": [16, 48, 80], "hops": hops, "right": right}


WINDOW = hand_made("window", 2, [[-1, 2], [-1, 2, 1]], [[1, 10], [2, 6, 9]])
OPEN = hand_made("dense", 1, [[1, 1], [1, 1, 1]], [[10, 10], [8, 10, 10]])
OUTCOME = Outcome(TINY, {Case("window", 2, 0): WINDOW, Case("dense", 1, 0): OPEN})


def test_totals_are_those_of_the_runs() -> None:
    made = totals([WINDOW, OPEN])
    assert made["reachable"] == {"asked": 8, "learned": 6, "exact": pytest.approx((1 + 0.6 + 0.9 + 1 + 1 + 0.8 + 1 + 1) / 8)}
    assert made["unreachable"] == {"asked": 2, "learned": 0, "exact": pytest.approx(0.15)}
    assert {count: (one["asked"], one["learned"]) for count, one in made["by_hops"].items()} == {"1": (6, 5), "2": (2, 1)}
    assert totals_table(made)[1:] == [["reachable", "6", "2", "91.2"], ["unreachable", "0", "2", "15.0"]]
    assert hops_table(made)[1:] == [["1", "6", "83 %", "95.0"], ["2", "2", "50 %", "80.0"]]


def test_the_summary_says_how_far_each_run_reaches_and_knows() -> None:
    window, dense = summary(OUTCOME)
    assert window["last"] == {"distance": [74, 42, 10], "hops": [-1, 2, 1], "exact": [0.2, 0.6, 0.9]}
    assert (window["reach"], window["learned"], dense["reach"], dense["learned"]) == (42, 10, 74, 42)
    assert result_table([window])[1] == ["window", "2", "0", "60 %", "67 %", "0 of 2", "15.0", "42", "10", "2"]
    assert result_table([dense])[1][3:7] == ["100 %", "80 %", "0 of 0", "-"]


def test_the_report_shows_everything(tmp_path: Path) -> None:
    page = write_report(OUTCOME, tmp_path, "python -m experiments reach").read_text()
    assert "none of its numbers means anything" in page and "abacus" in page
    assert "1 of 3 runs are open: window-layers1-seed0" in page
    assert "Of what can be reached, 75 % is learned." in page and "a bug in the prediction" not in page
    assert all(f"]({name})" in page and (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("distances.png", "hops.png"))
    found = json.loads((tmp_path / "record.json").read_text())
    assert found["kind"] == "reach" and found["settings"] == TINY.facts() and found["host"] == [HOST]
    assert found["summary"] == summary(OUTCOME) and found["totals"] == totals([WINDOW, OPEN])
    assert [(run["hops"], run["right"]) for run in found["runs"]] == [(run["hops"], run["right"]) for run in (WINDOW, OPEN)]


def test_the_report_cries_out_when_the_unreachable_is_learned(tmp_path: Path) -> None:
    wrong = {**WINDOW, "right": [[1, 10], [10, 6, 9]]}
    page = write_report(Outcome(TINY, {Case("window", 2, 0): wrong}), tmp_path, "python -m experiments reach").read_text()
    assert "1 unreachable ones are learned" in page


def test_a_report_of_no_run_has_no_results(tmp_path: Path) -> None:
    page = write_report(Outcome(TINY, {}), tmp_path, "python -m experiments reach").read_text()
    assert "3 of 3 runs are open" in page and "## Runs" not in page and not (tmp_path / "hops.png").exists()


def test_lists_of_numbers_are_written_on_one_line(tmp_path: Path) -> None:
    values = {"a": [1, -2.5, None], "b": [[1, 2], []], "c": ["x,\n 1"], "d": [True, {"e": [3]}]}
    text = write_json(values, tmp_path / "new" / "a.json").read_text()
    assert json.loads(text) == values and ' "a": [1, -2.5, null],\n' in text


def test_small_is_a_whole_study() -> None:
    small = ReachSettings.of("small")
    reached = {}
    for case in small.cases:
        found = hops(small.config(case), small.length, small.questions, small.places)
        before = np.array(small.places) < np.array(small.questions)[:, None]
        reached[case.pattern, case.layers] = ((found != NEVER) & before).sum() / before.sum()
    assert all(reached[pattern, layers] == 1 for pattern, layers in (("dense", 1), ("power", 4), ("s2", 2)))
    assert reached["dilated", 1] == reached["dilated", 4] < 0.6, "its holes stay, whatever the layers"
    assert reached["longnet", 1] < reached["longnet", 2] < reached["longnet", 4] < 0.6
    assert reached["window", 1] < reached["window", 2] < reached["window", 4] < reached["window", 6] < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReachSettings.of("huge"), r"size must be one of tiny, small; got 'huge'"),
        (lambda: replace(TINY, patterns=("chess",)), r"patterns must be among window, power, .*; got 'chess'"),
        (lambda: replace(TINY, patterns=()), r"patterns must be one or more, none twice; got \(\)"),
        (lambda: replace(TINY, seeds=(1, 1)), r"seeds must be one or more, none twice; got \(1, 1\)"),
        (lambda: replace(TINY, samples=12), r"samples must be a multiple of 10; got 12"),
        (lambda: replace(TINY, place_every=400), r"place_every must leave a question behind the first place in 128 tokens; got 400"),
        (lambda: TINY.with_steps(0), r"steps must be an integer >= 1; got 0"),
        (lambda: hops(model_of([Dense()]), 8, [8], [0]), r"questions must be positions in 0 .. 7, one at least; got \(8,\)"),
        (lambda: hops(model_of([Dense()]), 8, [7], []), r"places must be positions in 0 .. 7, one at least; got \(\)"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
