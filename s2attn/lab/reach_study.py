"""Does a model learn to recall over a distance exactly when its pattern reaches that far through its layers? Runs that can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np
import torch

from s2attn.core import StrPath, as_path
from s2attn.lab.data import Batch, Feed
from s2attn.lab.folder import NO_GAUGE, Gauge, Job, Record, Surroundings, Watch, run_jobs
from s2attn.lab.model import LanguageModel
from s2attn.lab.progress import Show
from s2attn.lab.reach_study_hops import hops
from s2attn.lab.reach_study_settings import DIGITS, Case, ReachSettings
from s2attn.lab.tasks.learn import IGNORED
from s2attn.lab.train import Run
from s2attn.patterns.runs import Array

TRAINED, ASKED = 2, 3
"""The first numbers of seeds: no sequence that is asked was trained on."""


@dataclass(frozen=True)
class Outcome:
    """What a study left: the finished runs of its cases."""

    settings: ReachSettings
    runs: Mapping[Case, Record]

    @property
    def open(self) -> list[Case]:
        return [case for case in self.settings.cases if case not in self.runs]


def run_reach(settings: ReachSettings, out: StrPath, show: Show, gauge: Gauge = NO_GAUGE, limit: float | None = None) -> Outcome:
    """Run what is still open of a study; each finished run is a file ``runs/PATTERN-layersL-seedN.json`` in ``out``.

    A run that was stopped leaves no file and begins anew; finished ones are never repeated.

    Args:
        gauge: tells on which machine.
        limit: seconds; no run begins that would take longer than is left, as judged by the finished ones.

    Raises:
        ValueError: ``out`` holds runs of other settings.
    """
    out = as_path("out", out)
    around = Surroundings(show, Watch(limit), gauge)
    return Outcome(settings, run_jobs({case: _job(settings, case, around) for case in settings.cases}, out, around))


def _job(settings: ReachSettings, case: Case, around: Surroundings) -> Job:
    def work() -> Record:
        return one_run(settings, case, around)

    title = f"{case.pattern}, {case.layers} layer{'s' if case.layers > 1 else ''}, seed {case.seed}"
    return Job(case.name, title, settings.facts(), json.loads(settings.config(case).recipe.to_json()), work)


def sequences(rng: np.random.Generator, digits: Array, places: Array, length: int) -> Array:
    """Lower-case letters at random with one digit at a place, int64 ``(B, length)``.

    >>> made = sequences(np.random.default_rng(0), np.array([7]), np.array([2]), 6)
    >>> "".join(chr(one) if chr(one).isdigit() else "." for one in made[0])
    '..7...'
    """
    made = rng.integers(ord("a"), ord("z") + 1, (len(digits), length))
    made[np.arange(len(digits)), places] = ord("0") + digits
    return made


@dataclass(frozen=True)
class Digits(Feed):
    """The data of a run: every token from the digit on is asked which digit it was; what is asked is never among the inputs.

    So one sequence teaches all distances, near ones first. Places are drawn towards the start, where more distances follow.
    """

    settings: ReachSettings
    seed: int

    def train(self, step: int) -> Batch:
        curriculum = self.settings.curriculum
        length = curriculum.length(step, self.settings.train.steps)
        rng = np.random.default_rng((TRAINED, self.seed, step))
        count = curriculum.count(length)
        places = (rng.random(count) ** 2 * length).astype(np.int64)
        digits = rng.integers(0, DIGITS, count)
        tokens = sequences(rng, digits, places, length)
        asked = np.arange(length) >= places[:, None]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(np.where(asked, ord("0") + digits[:, None], IGNORED)))

    def validation(self) -> list[Batch]:
        """None: a run is judged by its answers, see `right_counts`."""
        return []


def one_run(settings: ReachSettings, case: Case, around: Surroundings) -> Record:
    """Predict, train and ask one model; everything that is reported of it.

    ``hops`` and ``right`` have a row per question, with an entry per place before it: the prediction (`NEVER` is -1), and how many of the
    ``samples`` answers are right.
    """
    began = time.perf_counter()
    config = settings.config(case)
    predicted = hops(config, settings.length, settings.questions, settings.places)
    run = Run(case.name, LanguageModel(config, seed=case.seed), replace(settings.train, seed=case.seed), place=around.place)
    _learn(run, Digits(settings, case.seed), around)
    right = right_counts(run.model, settings, around)
    record: Record = {"pattern": case.pattern, "layers": case.layers, "seed": case.seed, "made_with": settings.facts()}
    record["recipe"] = json.loads(config.recipe.to_json())
    record["host"] = around.gauge.host()
    losses = [entry["loss"] for entry in run.history]
    record.update(parameters=run.model.num_parameters, tokens=settings.train.steps * settings.curriculum.step_tokens)
    record.update(loss=mean(losses[-20:]), train_seconds=sum(entry["seconds"] for entry in run.history))
    record.update(questions=list(settings.questions), places=list(settings.places))
    record.update(hops=_rows(predicted, settings), right=_rows(right, settings))
    record["seconds"] = time.perf_counter() - began
    last = right[-1] / settings.samples
    around.show.note(f"{100 * last.mean():.0f} % exact answers of the last token over all distances, {record['seconds']:.0f} s")
    return record


def _learn(run: Run, feed: Digits, around: Surroundings) -> None:
    show, steps = around.show, run.config.steps
    show.begin(steps, "steps")
    while run.step < steps:
        entry = run.advance(feed)
        around.watch.check()
        show.advance(f"length {feed.settings.curriculum.length(entry['step'] - 1, steps)}: loss {entry['loss']:.2f}")
    show.end()


@torch.no_grad()
def right_counts(model: LanguageModel, settings: ReachSettings, around: Surroundings) -> Array:
    """How many answers are right, int64 ``(questions, places)``; all models answer the same sequences, which no training has.

    Each digit is the piece equally often, so whoever knows nothing of it is right exactly ``samples / 10`` times where it says always
    the same.
    """
    model.eval()
    questions = torch.tensor(settings.questions)
    digits = np.arange(settings.samples) % DIGITS
    found = []
    for place in settings.places:
        around.watch.check()
        rng = np.random.default_rng((ASKED, place))
        tokens = sequences(rng, digits, np.full(settings.samples, place), settings.length)
        said = model(torch.from_numpy(tokens))[:, questions].argmax(-1)
        found.append((said == torch.from_numpy(ord("0") + digits)[:, None]).sum(0).numpy())
    return np.stack(found, axis=1)


def _rows(values: Array, settings: ReachSettings) -> list[Sequence[int]]:
    behind = [sum(place < question for place in settings.places) for question in settings.questions]
    return [row[:count].tolist() for row, count in zip(values, behind, strict=True)]
