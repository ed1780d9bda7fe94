"""The demo: train a dense and a sparse model on real text, save, load, generate, time attention, and tell what came out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from s2attn.cache import SparseCache
from s2attn.core import StrPath, as_path, bad_value, write_text
from s2attn.lab.data import Corpus, Windows, read_corpus
from s2attn.lab.describe import describe
from s2attn.lab.generate import cache_error, generate
from s2attn.lab.model import LanguageModel, ModelConfig
from s2attn.lab.progress import Metrics, Record, Show
from s2attn.lab.train import Run, TrainConfig, load_model, train_in_turn
from s2attn.nn.sampling import Sampling
from s2attn.patterns import Dense, Local, Pattern, Recipe, Stride

FEWEST_STEPS, MOST_STEPS = 30, 400
LOGIT_TOLERANCE = 1e-4
"""Logits with and without a cache may differ by rounding only: so much of the largest logit, in float32."""
PREFILL_CHUNK = 128
"""Bytes of the prompt that the cache is given at a time: what only they read is given back before the next ones come."""

MODEL = ModelConfig(layers=4, width=128, heads=4, kv_heads=2, head_dim=32, hidden=384)
DENSE, SPARSE = Recipe(Dense()), Recipe(Local(2) | Stride(4), dense_layers=[0])
TRAIN = TrainConfig(steps=300, batch=1)


@dataclass(frozen=True)
class DemoSettings:
    """Everything that the demo does, as values; :meth:`quick` is the version of a few seconds that tests run.

    Attributes:
        dense, sparse: recipes of the two models, which are alike in everything else.
        lengths: context lengths at which attention is timed.
        train_seconds: take as many steps as fit into this time here, in place of ``train.steps``; None takes these.
        timing_seconds: begin no new timing after so many.
        flex: time a compiled FlexAttention too.
    """

    model: ModelConfig = MODEL
    train: TrainConfig = TRAIN
    dense: Recipe = DENSE
    sparse: Recipe = SPARSE
    lengths: tuple[int, ...] = (4096, 8192, 16384)
    timed_pattern: Pattern = Local(16) | Stride(8)
    train_seconds: float | None = 120.0
    timing_seconds: float = 120.0
    flex: bool = True
    prompt_bytes: int = 1536
    new_bytes: int = 320
    seed: int = 0
    is_quick: bool = False
    max_files: int | None = None

    @classmethod
    def quick(cls) -> DemoSettings:
        """Tiny sizes: the same path in seconds, and no result that means anything."""
        pattern = Local(2, block=16) | Stride(2, block=16)
        return cls(
            model=ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64),
            train=TrainConfig(steps=6, batch=1, context=128, warmup=2, eval_every=3, eval_windows=2),
            sparse=Recipe(pattern, dense_layers=[0]),
            lengths=(256, 512),
            timed_pattern=Local(2) | Stride(2),
            train_seconds=None,
            flex=False,
            prompt_bytes=96,
            new_bytes=24,
            is_quick=True,
            max_files=4,
        )

    def with_options(self, *, seed: int = 0, steps: int | None = None, flex: bool = True) -> DemoSettings:
        """The same demo with another seed, with a fixed number of steps, or without FlexAttention."""
        made = replace(self, seed=seed, train=replace(self.train, seed=seed), flex=self.flex and flex)
        return made if steps is None else made.with_steps(steps)

    def with_steps(self, steps: int) -> DemoSettings:
        """The same demo with so many steps, warmed up and validated in proportion."""
        train = replace(self.train, steps=steps, warmup=steps // 15, eval_every=max(1, -(-steps // 6)))
        return replace(self, train=train, train_seconds=None)

    def facts(self) -> Record:
        """The settings as plain values."""
        return {
            "quick": self.is_quick,
            "seed": self.seed,
            "model": json.loads(self.model.to_json()),
            "train": asdict(self.train),
            "recipes": {"dense": repr(self.dense), "s2": repr(self.sparse)},
            "timed_pattern": repr(self.timed_pattern),
            "lengths": list(self.lengths),
            "train_seconds": self.train_seconds,
        }


def run_demo(settings: DemoSettings, out: StrPath, show: Show, time_attention: Callable[[DemoSettings, Show], Record]) -> Record:
    """Run the whole demo and write ``metrics.jsonl``, ``results.json`` and a checkpoint folder under ``out``.

    Args:
        time_attention: times attention at ``settings.lengths`` and returns a benchmark record.

    Raises:
        ArithmeticError: a check failed: the loaded model or the cached logits differ.
    """
    out = as_path("out", out)
    results: Record = {"settings": settings.facts(), "seconds": {}}
    metrics = Metrics(out / "metrics.jsonl")
    with _stage("Text", "text", show, results):
        corpus = read_corpus(max_files=settings.max_files)
        results["corpus"] = corpus.describe()
        show.note("{train_files} files to train on, {validation_files} to validate; split by file".format(**results["corpus"]))
    with _stage("Training a dense and an S2 model, a step of each in turn", "training", show, results):
        fitted = fit_steps(settings, corpus)
        results["settings"] = {**fitted.facts(), "train_seconds": settings.train_seconds}
        runs = train_pair(fitted, corpus, show, metrics, settings.train_seconds)
        results["runs"] = [run.summary() for run in runs]
        results["history"] = {run.name: run.history for run in runs}
    with _stage("Saving and loading the S2 model", "checkpoint", show, results):
        model, results["checkpoint"] = checkpoint(runs[-1], corpus, out / "checkpoint")
        show.note(f"loaded logits equal the saved model's, bit for bit; {results['checkpoint']['bytes'] / 1e6:.1f} MB of weights")
    with _stage("Writing with a KV cache", "generation", show, results):
        results["generation"] = write_continuation(model, corpus, settings, show)
    with _stage("Judging the pattern", "pattern", show, results):
        results["pattern"] = judge(settings)
        far = results["pattern"][-1]
        pairs, kept = 100 * far["density"], 100 * far["cache_bytes"] / far["dense_cache_bytes"]
        show.note(f"at {far['seqlen']:,} tokens: {pairs:.1f} % of the pairs, {kept:.1f} % of the KV cache after eviction")
    with _stage("Timing attention", "attention", show, results):
        results["attention"] = time_attention(settings, show)
        for row in results["attention"]["rows"]:
            metrics.write({"timing": row})
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def judge(settings: DemoSettings) -> list[Record]:
    """What `describe` says of the timed pattern at the longest timed length and at eight times that."""
    found = []
    for seqlen in (settings.lengths[-1], 8 * settings.lengths[-1]):
        report = describe(settings.timed_pattern, 8, seqlen=seqlen, head_dim=64)
        names = ("seqlen", "density", "ideal_speedup", "cache_bytes", "dense_cache_bytes", "layout_bytes", "mask_bytes", "complete")
        found.append({name: getattr(report, name) for name in names})
    return found


@contextmanager
def _stage(title: str, name: str, show: Show, results: Record) -> Iterator[None]:
    show.stage(title)
    began = time.perf_counter()
    yield
    results["seconds"][name] = time.perf_counter() - began


def new_runs(settings: DemoSettings) -> list[Run]:
    """The dense and the sparse model, the sparse one last, with equal weights and before their first step."""
    recipes = {"dense": settings.dense, "s2": settings.sparse}
    models = {name: LanguageModel(settings.model.with_recipe(recipe), seed=settings.seed) for name, recipe in recipes.items()}
    return [Run(name, model, settings.train) for name, model in models.items()]


def feed_of(settings: DemoSettings, corpus: Corpus) -> Windows:
    """What the runs read."""
    train = settings.train
    return Windows(corpus.train, corpus.validation, train.batch, train.context, train.seed, train.eval_windows)


def fit_steps(settings: DemoSettings, corpus: Corpus) -> DemoSettings:
    """As many steps as fit into ``settings.train_seconds`` on this machine, from a trial of a few steps that is thrown away."""
    if settings.train_seconds is None:
        return settings
    trial = new_runs(settings)
    feed = feed_of(settings, corpus)
    pairs = [sum(run.advance(feed)["seconds"] for run in trial) for _ in range(4)]
    # Six validations cost about as much as thirty steps.
    steps = int(settings.train_seconds / min(pairs)) - 30
    return settings.with_steps(max(FEWEST_STEPS, min(MOST_STEPS, steps)))


def train_pair(settings: DemoSettings, corpus: Corpus, show: Show, metrics: Metrics, seconds: float | None = None) -> list[Run]:
    """Train the dense and the sparse model from the same start on the same bytes; returns both runs, the sparse one last."""
    runs = new_runs(settings)
    latest: dict[str, float] = {}

    def log(entry: Record) -> None:
        metrics.write(entry)
        if "loss" in entry:
            latest[entry["run"]] = entry["loss"]
            show.advance("   ".join(f"{name} {loss:.2f}" for name, loss in sorted(latest.items())))
        elif entry["run"] == "s2":
            before = metrics.entries[-2]["validation_loss"]
            show.note(f"step {entry['step']:>4}   validation loss   dense {before:.3f}   S2 {entry['validation_loss']:.3f}")

    show.begin(settings.train.steps * len(runs), "steps")
    train_in_turn(runs, feed_of(settings, corpus), log, seconds=math.inf if seconds is None else 1.2 * seconds)
    show.end()
    return runs


def checkpoint(run: Run, corpus: Corpus, folder: StrPath) -> tuple[LanguageModel, Record]:
    """Save a run, load its model again, and check that the loaded one gives the same logits, bit for bit."""
    folder = as_path("folder", folder)
    run.save(folder)
    loaded = load_model(folder)
    sample = corpus.validation[: run.config.context].long()[None]
    with torch.no_grad():
        same = torch.equal(run.model.eval()(sample), loaded.eval()(sample))
    if not same:
        raise ArithmeticError("the loaded model gives other logits than the saved one")
    return loaded, {"bytes": (folder / "weights.pt").stat().st_size, "equal_logits": same}


def write_continuation(model: LanguageModel, corpus: Corpus, settings: DemoSettings, show: Show) -> Record:
    """Continue a piece of validation text with a cache that evicts, and check the logits against those without one."""
    text = bytes(corpus.validation[: 64 * settings.prompt_bytes].tolist())
    prompt = choose_prompt(text, settings.prompt_bytes)
    show.begin(settings.new_bytes, "bytes")
    cache = SparseCache.for_model(model, max_tokens=len(prompt) + settings.new_bytes, chunk=PREFILL_CHUNK)
    sampling = Sampling(settings.new_bytes, temperature=0.7, top_k=40, seed=settings.seed)
    made = generate(model, prompt, sampling, chunk=PREFILL_CHUNK, cache=cache, on_byte=show.advance)
    show.end()
    error = cache_error(model, made)
    if not error <= LOGIT_TOLERANCE:
        raise ArithmeticError(f"logits with a cache differ from those without by {error:.1e} of the largest, above {LOGIT_TOLERANCE:.0e}")
    show.note(f"logits with the cache equal those without it: largest difference {error:.0e} of the largest logit")
    most, dense = cache.bytes_most, cache.bytes_dense
    show.note(f"the cache never held more than {most / 1e3:.0f} kB; a dense one ends with {dense / 1e3:.0f} kB")
    return {
        "prompt_end": prompt[-160:].decode("utf-8", errors="replace"),
        "prompt_bytes": len(prompt),
        "text": made.text,
        "new_bytes": len(made.new),
        "prefill_seconds": made.prefill_seconds,
        "decode_seconds": made.decode_seconds,
        "cache_error": error,
        "cache_tolerance": LOGIT_TOLERANCE,
        "cache_most_bytes": most,
        "cache_dense_bytes": dense,
    }


def choose_prompt(text: bytes, length: int) -> bytes:
    """``length`` bytes of ``text`` that end after the head of a function, where there is one, so that something is there to go on with."""
    if len(text) < length:
        raise bad_value("text", f"must have {length} bytes for a prompt", len(text))
    at = text.find(b"\n    def ", length - 1)
    end = text.find(b"\n", at + 1) + 1 if at >= 0 else 0
    return text[end - length : end] if end >= length else text[:length]
