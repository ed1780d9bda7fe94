"""A run from its configuration to its last checkpoint: what ``python -m experiments train`` does."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.files import write_file
from experiments.model import LanguageModel
from experiments.place import Place, place_of
from experiments.progress import Metrics, Record, Show
from experiments.train import Run, train_in_turn
from experiments.training.config import DataConfig, JobConfig
from experiments.training.documents import Documents, read_documents
from experiments.training.packing import Packed, Rows
from experiments.training.store import Store
from experiments.training.tokens import FILE, BytePairs, Bytes, Tokenizer, Tokens
from s2attn.core import bad_value

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, eq=False)
class Material:
    """What a run reads.

    Attributes:
        facts: counts for the report.
    """

    tokenizer: Tokenizer
    feed: Packed
    facts: Record

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens."""
        return f"{self.feed.tokens.fingerprint}-{self.feed.unseen.fingerprint}"


def run_training(config: JobConfig, show: Show, *, resume: bool = False) -> Record:
    """Train, and leave ``metrics.jsonl``, ``results.json`` and checkpoints in ``config.run.out``.

    Under torchrun every process calls this; the first one reports and writes.

    Args:
        resume: go on from the newest checkpoint there, if there is one; the losses are those of a run that never stopped.

    Returns:
        the summary that ``results.json`` holds.

    Raises:
        ValueError: text, rows, recipe, folder or checkpoint do not fit; nothing was changed.
        OSError: something could not be written; the checkpoints so far are as they were.
    """
    with place_of(config.run.device) as place:
        out = Path(config.run.out)
        store = Store(out / CHECKPOINTS, config.run.keep)
        newest = store.newest()
        if newest is not None:
            if not resume:
                raise bad_value("run.out", "must be a folder without checkpoints, or be resumed (--resume)", newest)
            store.check(newest, config.facts())
        place.first_does(store.clear_partial)
        show.stage("Text")
        material = read_material(config, place, newest or out)
        words = "{train_tokens:,} tokens of {train_files} files to train on, {validation_tokens:,} of {validation_files} to judge on"
        words += ", split by {split}"
        show.note(words.format(**material.facts))
        if newest is not None:
            store.check(newest, config.facts(), material.fingerprint)
        run = start(config, material, place, newest)
        return Job(config, material, run, store, show).work(newest)


def read_material(config: JobConfig, place: Place, folder: Path) -> Material:
    """Documents, tokens and rows; a tokenizer is learned once and then read from ``folder``."""
    data, train = config.data, config.train
    found = read_documents(data.source, include=data.include, split=data.split, percent=data.percent, max_files=data.max_files)
    tokenizer = tokenizer_for(data, found, place, folder)
    tokens, unseen = Tokens.of(found.train, tokenizer), Tokens.of(found.validation, tokenizer)
    rows = Rows(train.batch, train.context, train.eval_windows, train.seed, data.packed)
    facts = {
        "train_files": len(found.train),
        "validation_files": len(found.validation),
        "left_out_files": found.left_out,
        "split": found.split,
        "train_tokens": tokens.total,
        "validation_tokens": unseen.total,
        "bytes_per_token": unseen.text_bytes / unseen.total,
        "vocabulary": tokenizer.size,
    }
    return Material(tokenizer, Packed(tokens, unseen, rows, place), facts)


def tokenizer_for(data: DataConfig, found: Documents, place: Place, folder: Path) -> Tokenizer:
    """The tokenizer that the configuration asks for."""
    if data.tokenizer == "bytes":
        return Bytes()

    def learn() -> None:
        if folder.name.startswith("step-"):  # a checkpoint brings its own
            return
        folder.mkdir(parents=True, exist_ok=True)
        BytePairs.train(found.train, data.vocabulary).save(folder)

    place.first_does(learn)
    return BytePairs.load(folder / FILE)


def start(config: JobConfig, material: Material, place: Place, newest: Path | None) -> Run:
    """A new run, or the one of a checkpoint."""
    if newest is not None:
        return Run.resume(newest, "train", config.train, place)
    config = config.with_vocabulary(material.tokenizer.size)
    check_memory(config, place)
    model = LanguageModel(config.model, seed=config.train.seed)
    return Run("train", model, config.train, place=place)


def check_memory(config: JobConfig, place: Place) -> None:
    """Refuse what this machine cannot hold, before anything is allocated.

    The count is a lower bound: float32 weights, and on a CPU their gradients, Adam's two moments and the logits of a step.

    Raises:
        ValueError: the bound is above the machine's memory.
    """
    if not hasattr(os, "sysconf"):
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    model, train = config.model, config.train
    weights, rows = 4 * model.num_parameters, 0
    if place.device.type == "cpu":
        weights *= 1 if place.ranks > 1 else 4
        rows = 4 * -(-train.batch // place.ranks) * train.context * model.vocabulary
    if weights + rows > there:
        counts = f"{weights / 2**30:,.1f} GiB for the model and {rows / 2**30:,.1f} GiB for the logits of a step"
        rule = f"must fit into the memory of this machine, {there / 2**30:,.1f} GiB"
        raise bad_value("model and train.batch * train.context", rule, f"{counts}, and more")


@dataclass(eq=False)
class Job:
    """The steps of a run, reported and saved."""

    config: JobConfig
    material: Material
    run: Run
    store: Store
    show: Show

    def work(self, newest: Path | None) -> Record:
        """Take all steps that are left, and sum up."""
        run, show, out = self.run, self.show, Path(self.config.run.out)
        first = run.place.is_first
        metrics = Metrics(out / "metrics.jsonl", after=None if newest is None else run.step) if first else None
        left = self.config.train.steps - run.step
        show.stage(f"Training {run.model.num_parameters:,} weights on {run.place.ranks} x {run.place.device.type}, {left} steps")
        if newest is not None:
            show.note(f"goes on from {newest}")
        show.begin(left, "steps")

        def log(entry: Record) -> None:
            loss = entry.get("loss", entry.get("validation_loss"))
            if metrics is not None:
                metrics.write({name: value for name, value in entry.items() if name != "run"})
            if not math.isfinite(loss):
                raise bad_value("loss", "must stay finite; a smaller train.learning_rate helps", f"{loss} at step {entry['step']}")
            if "loss" in entry:
                show.advance(f"loss {loss:.3f}")
            else:
                show.note(f"step {entry['step']:>6}   validation loss {loss:.4f}")

        try:
            train_in_turn([run], self.material.feed, log, after=self._save)
        finally:
            show.end()
        results = self._results()
        if first:
            write_file(out / "results.json", json.dumps(results, indent=1) + "\n")
        return results

    def _save(self) -> None:
        if self.run.step % self.config.run.save_every == 0 or self.run.step == self.config.train.steps:
            self.store.save(self.run, self.material.tokenizer, settings=self.config.facts(), data=self.material.fingerprint)

    def _results(self) -> dict[str, Any]:
        summary = self.run.summary()
        per_token = summary["bits_per_byte"]
        return {
            "settings": self.config.facts(),
            "data": self.material.facts,
            "parameters": summary["parameters"],
            "steps": summary["steps"],
            "tokens_read": summary["bytes_read"],
            "validation_loss": summary["validation_loss"],
            "bits_per_byte": per_token / self.material.facts["bytes_per_token"],
            "tokens_per_second": summary["bytes_per_second"],
            "train_seconds": summary["train_seconds"],
            "checkpoint": str(self.store.newest()),
        }
