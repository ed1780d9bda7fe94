"""Ablations: equal tokens, one file per run, a stopped one goes on, a time budget holds, other settings are refused, the report is true."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from experiments import ablate
from experiments.ablate import Outcome, run_ablation
from experiments.ablate_record import outcome_of, record_of
from experiments.ablate_report import mean_scores, plan_table, result_table, summary, write_report
from experiments.ablate_settings import AblateSettings
from experiments.data import Windows, read_corpus
from experiments.evidence import evidence_page
from experiments.folder import Gauge, Watch
from experiments.model import Block, LanguageModel
from experiments.partial import Partial
from experiments.place import Place
from experiments.progress import Show
from experiments.tasks import Scores
from experiments.train import Run
from s2attn import Recipe

TINY = replace(AblateSettings.of("tiny").with_steps(3, 2), recipes=("dense", "s2", "s2+1"))


class Silent(Show):
    """Keeps titles of stages, notes and steps, and may stop at a stage, or at a step of this process, as a killed process would."""

    def __init__(self, stop_at: int | None = None, kill_at: int | None = None):
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.steps: list[str] = []
        self.stop_at, self.kill_at = stop_at, kill_at

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, total: int, unit: str) -> None: ...

    def advance(self, text: str = "") -> None:
        self.steps.append(text)
        if len(self.stages) == self.stop_at or len(self.steps) == self.kill_at:
            raise KeyboardInterrupt

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    out = tmp_path_factory.mktemp("whole")
    host = {"processor": "abacus", "cores": 1, "torch": "2", "s2attn": "0"}
    return run_ablation(TINY, out, Silent(), Gauge(lambda call: 5 << 20, lambda: host)), out


def losses(outcome: Outcome) -> dict[tuple[str, int], Any]:
    return {key: (run["text"]["validation"], run["tasks"]["scores"], run["tasks"]["losses"]) for key, run in outcome.runs.items()}


def test_every_run_is_a_file_and_reads_the_same_tokens(whole: tuple[Outcome, Path]) -> None:
    outcome, out = whole
    assert sorted(path.name for path in (out / "runs").iterdir()) == sorted(
        f"{name}-seed{seed}.json" for name in TINY.recipes for seed in (0, 1)
    )
    assert outcome.open == [] and len(outcome.runs) == 6
    assert {run["text"]["bytes_read"] for run in outcome.runs.values()} == {3 * 256}
    assert {run["tasks"]["tokens"] for run in outcome.runs.values()} == {2 * 256}
    assert {run["text"]["parameters"] for run in outcome.runs.values()} == {LanguageModel(TINY.model).num_parameters}
    for (name, seed), run in outcome.runs.items():
        assert json.loads((out / "runs" / f"{name}-seed{seed}.json").read_text()) == run
        assert Recipe.from_json(json.dumps(run["recipe"])) == next(one.recipe for one in outcome.recipes if one.name == name)


def test_a_run_is_what_plain_training_gives(whole: tuple[Outcome, Path]) -> None:
    outcome, _ = whole
    recipe = next(one.recipe for one in outcome.recipes if one.name == "s2")
    run = Run("plain", LanguageModel(TINY.model.with_recipe(recipe), seed=1), replace(TINY.text, seed=1))
    corpus = read_corpus(max_files=TINY.max_files)
    feed = Windows(corpus.train, corpus.validation, TINY.text.batch, TINY.text.context, seed=1, windows=TINY.text.eval_windows)
    for _ in range(3):
        run.advance(feed)
    assert outcome.runs["s2", 1]["text"]["validation_loss"] == run.evaluate(feed)["validation_loss"]


def test_recipes_and_seeds_make_a_difference(whole: tuple[Outcome, Path]) -> None:
    found = [run["text"]["validation_loss"] for run in whole[0].runs.values()]
    assert len(set(found)) == 6


def test_a_killed_ablation_goes_on_where_it_stopped(whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_ablation(TINY, tmp_path, Silent(stop_at=3))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert sorted(path.name for path in files) == ["dense-seed0.json", "s2-seed0.json"]
    rest = Silent()
    outcome = run_ablation(TINY, tmp_path, rest)
    assert [title.partition(" (")[0] for title in rest.stages] == ["s2+1, seed 0", "dense, seed 1", "s2, seed 1", "s2+1, seed 1"]
    assert {path: path.stat().st_mtime_ns for path in files} == files, "finished runs are left alone"
    assert losses(outcome) == losses(whole[0])


def test_a_finished_ablation_runs_nothing(whole: tuple[Outcome, Path]) -> None:
    again = Silent()
    assert losses(run_ablation(TINY, whole[1], again)) == losses(whole[0])
    assert again.stages == []


def test_more_recipes_and_seeds_may_join_later(whole: tuple[Outcome, Path]) -> None:
    fewer = replace(TINY, recipes=("s2",), seeds=(1,), size="small")
    assert list(run_ablation(fewer, whole[1], Silent()).runs) == [("s2", 1)]


@pytest.mark.parametrize("ticks", range(6))
def test_a_run_that_the_time_budget_stops_goes_on_later(
    whole: tuple[Outcome, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ticks: int
) -> None:
    settings, show = replace(TINY, recipes=("s2",), seeds=(1,)), Silent()
    with monkeypatch.context() as patched:
        left = iter([9.0] * (ticks + 1) + [-1.0])  # it is asked before the run, and after every step and task
        patched.setattr(Watch, "left", property(lambda self: next(left)))
        outcome = run_ablation(settings, tmp_path, show, limit=9.0)
    assert outcome.runs == {} and not (tmp_path / "runs").exists()
    assert len(show.stages) == 1 and "will go on from here" in show.notes[-1]
    steps = Silent()
    assert losses(run_ablation(settings, tmp_path, steps))["s2", 1] == losses(whole[0])["s2", 1]
    assert len(steps.steps) == 5 - min(5, ticks + 1), "no step is taken twice"
    assert not (tmp_path / "partial").exists()


def test_a_killed_run_goes_on_from_its_checkpoint(whole: tuple[Outcome, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Partial, "every", 0.0)
    settings = replace(TINY, recipes=("s2",), seeds=(1,))
    for kill_at in (2, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            run_ablation(settings, tmp_path, Silent(kill_at=kill_at))
    assert losses(run_ablation(settings, tmp_path, Silent()))["s2", 1] == losses(whole[0])["s2", 1]


def test_an_unfinished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings = replace(TINY, recipes=("s2",), seeds=(1,))
    with pytest.raises(KeyboardInterrupt):
        run_ablation(settings, tmp_path, Silent(kill_at=2))
    with pytest.raises(ValueError, match=r"out must be a folder of the same settings; text differ; got .*s2-seed1"):
        run_ablation(settings.with_steps(text=9), tmp_path, Silent())
    (tmp_path / "partial" / "s2-seed1" / "made_with.json").write_text("{")
    with pytest.raises(ValueError, match=r"out must hold readable files.* to begin that run anew"):
        run_ablation(settings, tmp_path, Silent())


def test_a_budget_that_is_spent_begins_nothing(tmp_path: Path) -> None:
    show = Silent()
    assert run_ablation(TINY, tmp_path, show, limit=1e-9).runs == {}
    assert show.stages == [] and show.notes == ["stopped: 0 s are left"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (replace(TINY, budget=0.5), "budget"),
        (TINY.with_steps(text=9), "text"),
        (TINY.with_steps(tasks=9), "tasks"),
        (replace(TINY, model=replace(TINY.model, width=48)), "model"),
    ],
)
def test_runs_of_other_settings_are_refused(whole: tuple[Outcome, Path], other: AblateSettings, named: str) -> None:
    with pytest.raises(ValueError, match=rf"out must be a folder of the same settings; {named} differ"):
        run_ablation(other, whole[1], Silent())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "dense"}'])
def test_a_broken_file_is_named_and_not_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs" / "dense-seed0.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"out must hold readable runs .*dense-seed0.json"):
        run_ablation(TINY, tmp_path, Silent())
    assert path.read_text() == text


def test_the_summary_is_that_of_the_runs(whole: tuple[Outcome, Path]) -> None:
    outcome, _ = whole
    found = {one["name"]: one for one in summary(outcome)}
    values = [outcome.runs["s2", seed]["text"]["validation_loss"] for seed in (0, 1)]
    dense = [outcome.runs["dense", seed]["text"]["validation_loss"] for seed in (0, 1)]
    assert found["s2"]["validation_loss"] == {"mean": mean(values), "sd": stdev(values), "values": values}
    assert found["s2"]["vs_dense"]["values"] == pytest.approx([a / b - 1 for a, b in zip(values, dense, strict=True)])
    assert found["dense"]["vs_dense"]["mean"] == 0
    assert found["s2"]["equal_pairs"] and not found["dense"]["equal_pairs"] and found["s2"]["step_bytes"] == 5 << 20
    exact = [Scores.from_dict(outcome.runs["s2", seed]["tasks"]["scores"][0]).mean for seed in (0, 1)]
    assert found["s2"]["tasks"]["passkey"]["mean"] == mean(exact)


def test_scores_of_seeds_are_averaged_cell_by_cell() -> None:
    a = Scores("copy", (64, 128), (0.0, 1.0), 4, ((1.0, 0.5), (0.0, 0.0)), ((1.0, 1.0), (1.0, 1.0)))
    b = replace(a, exact=((0.0, 0.5), (1.0, 0.5)))
    assert mean_scores([a, b]).exact == ((0.5, 0.5), (0.5, 0.25))
    assert mean_scores([a, b]).samples == 8


def test_the_report_shows_everything_and_says_what_is_tiny(whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    outcome, _ = whole
    page = write_report(outcome, tmp_path, "python -m experiments ablate").read_text()
    assert "none of its numbers means anything" in page and "abacus" in page and "Not finished" not in page
    pictures = ["losses.png", "tasks.png", "heat-dense.png", "heat-s2.png", "heat-s2+1.png"]
    assert all(f"]({name})" in page and (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    for cell in [*result_table(summary(outcome))[1], *plan_table(outcome.recipes, TINY.tolerance)[1]]:
        assert cell.replace("|", "\\|") in page
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["kind"], record["command"], len(record["runs"])) == ("ablation", "python -m experiments ablate", 6)


def test_the_report_of_an_unfinished_ablation_names_what_is_open(whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    some = replace(whole[0], runs={("s2", 0): whole[0].runs["s2", 0]})
    page = write_report(some, tmp_path, "python -m experiments ablate").read_text()
    assert "Not finished: 5 of 6 runs are open: dense (seed 0), s2+1 (seed 0)" in page
    (line,) = result_table(summary(some))[1:]
    assert line[:2] == ["s2", "60.1 %"] and "±" not in "".join(line) and line[4] == "-"
    none = replace(some, runs={})
    assert "## Results" not in write_report(none, tmp_path, "python -m experiments ablate").read_text()


def test_precision_reaches_both_trainings(whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    settings = replace(TINY, recipes=("s2",), seeds=(1,)).with_precision("bfloat16")
    (half,) = run_ablation(settings, tmp_path, Silent()).runs.values()
    full = whole[0].runs["s2", 1]
    for a, b in ((half["text"]["validation"], full["text"]["validation"]), (half["tasks"]["losses"], full["tasks"]["losses"])):
        assert a != b and [row[-1] for row in a] == pytest.approx([row[-1] for row in b], rel=0.02)


def test_an_ablation_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def two(device: str) -> Iterator[Place]:
        yield Place(rank=1, ranks=2)

    monkeypatch.setattr(ablate, "place_of", two)
    with pytest.raises(ValueError, match="WORLD_SIZE must be 1: an ablation is one process; got 2"):
        run_ablation(TINY, tmp_path, Silent())


def test_pairs_that_are_not_equal_are_marked(tmp_path: Path) -> None:
    settings = replace(TINY.with_steps(1), recipes=("s2+2",), seeds=(0,), budget=0.4, tasks=replace(TINY.tasks, names=()))
    outcome = run_ablation(settings, tmp_path, Silent())
    (line,) = result_table(summary(outcome))[1:]
    assert line[1].endswith("(!)")
    (planned,) = plan_table(outcome.recipes, settings.tolerance)[1:]
    assert planned[4] == "no" and outcome.runs["s2+2", 0]["tasks"] is None


def test_an_ablation_of_the_tasks_alone(whole: tuple[Outcome, Path], tmp_path: Path) -> None:
    settings = replace(TINY.with_steps(text=0), recipes=("dense", "s2"), seeds=(1,))
    outcome = run_ablation(settings, tmp_path, Silent())
    for key, run in outcome.runs.items():
        assert run["text"] is None and run["tasks"] == whole[0].runs[key]["tasks"]
    page = write_report(outcome, tmp_path, "python -m experiments ablate").read_text()
    assert not (tmp_path / "losses.png").exists() and "losses.png" not in page and "tasks.png" in page and "tokens of text" not in page
    assert [line[3] for line in result_table(summary(outcome))[1:]] == ["-", "-"]
    record = json.loads((tmp_path / "record.json").read_text())
    assert outcome_of(record).settings == settings and record_of(outcome_of(record), "python -m experiments ablate") == record
    found = evidence_page({"tasks": record})
    assert "Every model learns passkey and recall from 512 tokens" in found and "loss +" not in found and "passkey +" in found
    with pytest.raises(ValueError, match="out must be a folder of the same settings; reads_text differ"):
        run_ablation(settings, whole[1], Silent())
    with pytest.raises(ValueError, match="steps and tasks must not leave out both"):
        replace(settings, tasks=replace(settings.tasks, names=()))


def test_large_is_what_the_targets_ask_of_a_graphics_card() -> None:
    large = AblateSettings.of("large")
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Block(large.model, 0).parameters()) * large.model.layers > 50e6
    assert large.text.steps * large.text.batch * large.text.context > 100e6 and large.device == "cuda"
    assert large.tasks.curriculum.start == 4096 and max(large.tasks.lengths) == 131072
    assert all(one.within(large.tolerance) for one in replace(large, recipes=("window", "s2", "s2+1", "s2+4")).matched())


def test_small_is_a_whole_ablation() -> None:
    small = AblateSettings.of("small")
    plain = {"dense", "window", "sink_window", "homogeneous", "s2", "stripes", "ranges", "power", "dilated", "longnet"}
    assert set(small.recipes) == plain | {"s2+1", "s2+2"}
    assert all(one.within(small.tolerance) for one in small.matched())
    assert len(small.seeds) == 3 and small.tasks.curriculum.step_tokens * small.tasks.train.steps == small.tasks.tokens


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AblateSettings.of("huge"), r"size must be one of tiny, small, large; got 'huge'"),
        (lambda: replace(TINY, recipes=("chess",)), r"recipes must be among dense, .*; got 'chess'"),
        (lambda: replace(TINY, recipes=()), r"recipes and seeds must not be empty"),
        (lambda: replace(TINY, seeds=(1, 1)), r"seeds must not repeat; got \(1, 1\)"),
        (lambda: replace(TINY.tasks, names=("chess",)), r"task must be one of passkey"),
        (lambda: replace(TINY.tasks, lengths=(32,), names=("recall",)), r"task lengths must be at least 60 for recall"),
        (lambda: replace(TINY.tasks, stretch="yarn"), r"Stretch method must be one of interpolation, ntk"),
        (lambda: TINY.with_steps(text=-1), r"steps must be an integer >= 0; got -1"),
        (lambda: Watch(-1.0), r"limit must be a positive number of seconds; got -1.0"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
