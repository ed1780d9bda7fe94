"""Ablation: recipes compared at equal tokens and equal listed pairs, over several seeds, in runs that can be stopped and go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from experiments.ablate_match import Matched
from experiments.ablate_settings import AblateSettings, Record, Scored
from experiments.data import Corpus, Windows, read_corpus
from experiments.folder import NO_GAUGE, Gauge, Job, Surroundings, Watch, run_jobs
from experiments.model import LanguageModel, ModelConfig
from experiments.partial import Partial
from experiments.place import Place, place_of
from experiments.progress import Show
from experiments.tasks import Stretch, learn, score_task, task_named
from experiments.train import Run, TrainConfig, train_in_turn
from s2attn.analysis.describe import describe
from s2attn.core import StrPath, as_path, bad_value


@dataclass(frozen=True)
class Outcome:
    """What an ablation left: the finished runs, those still open as (recipe, seed), and the recipes with their pairs."""

    settings: AblateSettings
    recipes: Sequence[Matched]
    runs: Mapping[tuple[str, int], Record]

    @property
    def open(self) -> list[tuple[str, int]]:
        return [(name, seed) for seed in self.settings.seeds for name in self.settings.recipes if (name, seed) not in self.runs]


def run_ablation(settings: AblateSettings, out: StrPath, show: Show, gauge: Gauge = NO_GAUGE, limit: float | None = None) -> Outcome:
    """Run what is still open of an ablation; each finished run is a file ``runs/RECIPE-seedN.json`` in ``out``.

    A run that was stopped goes on from its last checkpoint, in ``partial/RECIPE-seedN``, with the results of a run that never stopped;
    finished ones are never repeated. All recipes of a seed come before the next seed, so that what an early end leaves can be compared.

    Args:
        gauge: measures memory, and tells on which machine.
        limit: seconds; the run that is under way when they are over is stopped.

    Raises:
        ValueError: ``out`` holds runs of other settings, the device is not there, or several processes were started.
    """
    out = as_path("out", out)
    with place_of(settings.device) as place:
        if place.ranks > 1:
            raise bad_value("WORLD_SIZE", "must be 1: an ablation is one process", place.ranks)
        return _run_open(settings, out, Surroundings(show, Watch(limit), gauge, place))


def _run_open(settings: AblateSettings, out: Path, around: Surroundings) -> Outcome:
    recipes = settings.matched()
    # Read when the first run begins: an ablation that is finished needs no text.
    corpus = cache(partial(read_corpus, max_files=settings.max_files))
    jobs = {(one.name, seed): _job(settings, one, seed, corpus, out, around) for seed in settings.seeds for one in recipes}
    return Outcome(settings, recipes, run_jobs(jobs, out, around))


def _job(settings: AblateSettings, one: Matched, seed: int, corpus: Callable[[], Corpus], out: Path, around: Surroundings) -> Job:
    name, recipe = f"{one.name}-seed{seed}", json.loads(one.recipe.to_json())
    opened = cache(lambda: Partial(out / "partial" / name, {**settings.facts(), "recipe": recipe}, around.watch))

    def work() -> Record:
        return one_run(settings, one, seed, corpus(), opened(), around)

    return Job(name, f"{one.name}, seed {seed}", settings.facts(), recipe, work, lambda: opened().remove())


def one_run(settings: AblateSettings, recipe: Matched, seed: int, corpus: Corpus, so_far: Partial, around: Surroundings) -> Record:
    """Train a language model on text and another one on the tasks, from the same start; everything that is reported of them."""
    config, tasks = settings.model.with_recipe(recipe.recipe), settings.tasks
    record: Record = {"name": recipe.name, "seed": seed, "made_with": settings.facts(), "recipe": json.loads(recipe.recipe.to_json())}
    record["host"] = around.gauge.host()
    record["text"] = record["tasks"] = None
    if settings.reads_text:
        record["text"] = so_far.once("text", lambda: _learn_text(settings, config, seed, corpus, so_far, around))
    record["memory"] = so_far.once("memory", lambda: memory_of(settings, config, seed, corpus, around))
    if tasks.names:
        record["tasks"] = so_far.once("tasks", lambda: _learn_tasks(tasks, config, seed, so_far, around))
    record["seconds"] = so_far.seconds
    return record


def _feed(settings: AblateSettings, corpus: Corpus, seed: int) -> Windows:
    text = settings.text
    return Windows(corpus.train, corpus.validation, text.batch, text.context, seed, text.eval_windows)


def _learner(name: str, config: ModelConfig, how: TrainConfig, so_far: Partial, place: Place) -> Run:
    return so_far.learner(name, lambda: Run(name, LanguageModel(config, seed=how.seed), how, place=place), how, place)


def _learn_text(settings: AblateSettings, config: ModelConfig, seed: int, corpus: Corpus, so_far: Partial, around: Surroundings) -> Record:
    show = around.show
    run = _learner("text", config, replace(settings.text, seed=seed), so_far, around.place)

    def log(entry: Record) -> None:
        if "loss" in entry:
            show.advance(f"loss {entry['loss']:.2f}")

    show.begin(settings.text.steps - run.step, "steps of text")
    # A checkpoint belongs behind the validation of its step, which would be left out otherwise.
    train_in_turn([run], _feed(settings, corpus, seed), log, after=lambda: so_far.tick("text", run))
    show.end()
    curve = [[entry["step"], entry["validation_loss"]] for entry in run.history if "validation_loss" in entry]
    found = {**run.summary(), "validation": curve}
    show.note(f"validation loss {found['validation_loss']:.3f} nats/byte, {found['bytes_per_second']:,.0f} tokens/s")
    return found


def _learn_tasks(tasks: Scored, config: ModelConfig, seed: int, so_far: Partial, around: Surroundings) -> Record:
    show = around.show
    run = _learner("learner", config, replace(tasks.train, seed=seed), so_far, around.place)
    kinds = [task_named(name) for name in tasks.names]

    def log(entry: Record) -> None:
        show.advance(f"{entry['task']} at {entry['length']}: loss {entry['loss']:.2f}")
        so_far.tick("learner", run)

    show.begin(tasks.train.steps - run.step, "steps of tasks")
    learn(run, kinds, tasks.curriculum, log)
    show.end()
    stretch = None if tasks.stretch is None else Stretch(tasks.curriculum.end, tasks.stretch)
    found = []
    for kind in kinds:
        so_far.tick("learner", run)
        # All recipes and seeds answer the same questions, which no training asks.
        asked = score_task(run.model, kind, lengths=tasks.lengths, depths=tasks.depths, samples=tasks.samples, stretch=stretch)
        found.append(asked.to_dict())
        show.note(f"{kind.name}: {100 * asked.mean:.0f} % exact answers over all depths and lengths")
    losses = [[entry["step"], entry["task"], entry["length"], entry["loss"]] for entry in run.history]
    return {"scores": found, "losses": losses, "tokens": tasks.tokens}


def memory_of(settings: AblateSettings, config: ModelConfig, seed: int, corpus: Corpus, around: Surroundings) -> Record:
    """What a recipe costs in memory: by how much it rises in a training step, and the KV cache of a server after eviction.

    Returns:
        ``step_bytes``: of forward and backward, None where nobody measures. ``cache_bytes``: keys and values of one sequence of the text's
        length that a server keeps (None where that cannot be known), and ``dense_cache_bytes`` all of them.
    """
    run = Run("memory", LanguageModel(config, seed=seed), settings.text, place=around.place)
    batch = _feed(settings, corpus, seed).train(0).to(around.place.device)

    def step() -> None:
        run.loss(batch).backward()

    # The first one also builds layouts and gradients, which stay.
    step()
    report = describe(
        config.recipe, config.heads, config.kv_heads, settings.text.context, layers=config.layers, head_dim=config.head_dim, dtype_bytes=4
    )
    cache = {"cache_bytes": report.cache_bytes, "dense_cache_bytes": report.dense_cache_bytes}
    return {"step_bytes": around.gauge.peak_bytes(step), **cache}
