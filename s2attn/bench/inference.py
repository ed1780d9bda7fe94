"""The suite `inference`: prefill, then decoding, of a whole layer stack: S2 over a `SparseCache` against dense attention, in one run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from s2attn.bench.clock import Meter, Timing
from s2attn.bench.compare import worst_of
from s2attn.bench.journal import Journal, Row
from s2attn.bench.rows import Effort, Skip, compared, one_line, refuse_wrong
from s2attn.bench.stack import Contiguous, Stack, StackCase, Step
from s2attn.bench.stacks import FLASH, OURS, SDPA, DenseStack, Ours, check_chunks, kinds_of
from s2attn.bench.turns import LATE, Ready, Turns, error_facts
from s2attn.cache import CacheFull, SparseCache, pages_needed
from s2attn.core import check_int
from s2attn.patterns import Dense, Local, Recipe, Stride

MARGIN = 0.97  # of free memory: an allocator cannot use the last of it
TRIES = 3
FULL_STEPS = 8  # tokens that every sequence of the largest batch gets


@dataclass(frozen=True)
class InferenceCase(StackCase):
    """A stack that takes a prompt of ``seqlen`` tokens in chunks, and then ``new_tokens`` one by one.

    Attributes:
        free_bytes: what the largest batch may take for keys and values on a CPU; on a graphics card it is what is free there.
    """

    new_tokens: int = 32
    free_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("new_tokens", self.new_tokens, 1)
        check_int("free_bytes", self.free_bytes, 1)

    @property
    def room(self) -> int:
        return self.seqlen + self.new_tokens

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "new_tokens": self.new_tokens}


def inference_suite(op: str = "inference", size: str = "full") -> list[InferenceCase]:
    """The cases of the suite, the most valuable first; tiny ones for a CPU with ``size="tiny"``."""
    if size == "tiny":
        tiny = {"layers": 2, "model_layers": 2, "width": 32, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "block": 16}
        recipe = Recipe(Local(2, 16) | Stride(4, block=16), dense_every=2)
        more: dict[str, Any] = {**tiny, "dtype": "float32", "chunk": 80, "new_tokens": 5, "free_bytes": 1 << 18}
        return [InferenceCase("tiny inference", op, recipe, 192, **more)]
    seven: dict[str, Any] = {"layers": 32, "model_layers": 32, "width": 4096, "hidden": 11008, "heads": 32, "kv_heads": 32}
    grouped: dict[str, Any] = {**seven, "hidden": 14336, "kv_heads": 8}
    hybrid, narrow = Recipe(Local(16) | Stride(32), dense_every=8), Recipe(Local(16) | Stride(8), dense_every=8)
    return [
        InferenceCase("inference 7B, 128k", op, hybrid, 131072, **seven),
        InferenceCase("inference 7B, 32k", op, hybrid, 32768, **seven),
        InferenceCase("inference 8B, 128k", op, narrow, 131072, **grouped),
    ]


class Kept(ABC):
    """Where the keys and values of a batch of sequences are."""

    @abstractmethod
    def step(self, layer: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `s2attn.bench.stack.Step`."""

    @abstractmethod
    def fill(self, k: Tensor, v: Tensor, count: int, note: Callable[[], object]) -> None:
        """Give every layer of every sequence ``count`` tokens, those of ``k, v (1, chunk, G, D)`` again and again; no query attends.

        ``note`` is called now and then, and may raise.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all tokens, and begin with empty sequences."""

    @abstractmethod
    def most_bytes(self) -> int:
        """The most that was held for keys and values so far."""

    @abstractmethod
    def pool_bytes(self) -> int:
        """What was taken for keys and values, in use or not."""


class Whole(Kept):
    """Every key and value, one after another."""

    def __init__(self, case: InferenceCase, batch: int, peer: DenseStack, device: str):
        shape = (case.layers, 2, batch, case.room, case.kv_heads, case.head_dim)
        self.cache = torch.empty(shape, dtype=getattr(torch, case.dtype), device=device)
        self._step: Step = Contiguous(self.cache, peer.attend)

    def step(self, layer: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._step(layer, start, q, k, v)

    def fill(self, k: Tensor, v: Tensor, count: int, note: Callable[[], object]) -> None:
        for start in range(0, count, k.shape[1]):
            note()
            size = min(k.shape[1], count - start)
            self.cache[:, 0, :, start : start + size], self.cache[:, 1, :, start : start + size] = k[:, :size], v[:, :size]

    def reset(self) -> None:
        pass  # what comes is written over what was

    def most_bytes(self) -> int:
        return self.pool_bytes()

    def pool_bytes(self) -> int:
        return self.cache.numel() * self.cache.element_size()


class Sparse(Kept):
    """A `SparseCache`, which gives back what no later query reads.

    Args:
        pages: of its pool; room for any way to fill it when None.
    """

    def __init__(self, case: InferenceCase, batch: int, device: str, backend: str, pages: int | None = None):
        shape: dict[str, Any] = {"num_kv_heads": case.kv_heads, "num_heads": case.heads, "num_layers": case.layers, "page_size": case.block}
        self.pages = pages or batch * pages_needed(case.recipe, tokens=case.room, chunk=min(case.chunk, case.room), **shape)
        more: dict[str, Any] = {"max_tokens": case.room, "dtype": getattr(torch, case.dtype), "device": device, **shape}
        self.cache = SparseCache(case.recipe, head_dim=case.head_dim, num_pages=self.pages, **more)
        self.sequences, self.backend, self.layers = [self.cache.open() for _ in range(batch)], backend, case.layers
        self._most = 0

    def step(self, layer: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.cache.attend(self.sequences, layer, q, k, v, backend=self.backend)
        self._most = max(self._most, self.cache.bytes_used)
        return out

    def fill(self, k: Tensor, v: Tensor, count: int, note: Callable[[], object]) -> None:
        for sequence in self.sequences:  # one after another, so that what only a chunk's own queries need is held once
            for start in range(0, count, k.shape[1]):
                note()
                size = min(k.shape[1], count - start)
                for layer in range(self.layers):
                    self.cache.append([sequence], layer, k[:, :size], v[:, :size])
                    self.cache.trim(sequence, layer)
        self._most = max(self._most, self.cache.bytes_used)

    def reset(self) -> None:
        for sequence in self.sequences:
            self.cache.free(sequence)
        self.sequences = [self.cache.open() for _ in self.sequences]

    def most_bytes(self) -> int:
        return self._most

    def pool_bytes(self) -> int:
        return self.pages * self.cache.page_bytes


class Serving:
    """One case on one device: the stack, its inputs, and the ways to keep keys and values."""

    def __init__(self, case: InferenceCase, meter: Meter, journal: Journal, seed: int, backend: str | None):
        self.case, self.meter, self.journal, self.seed = case, meter, journal, seed
        self.backend = backend or ("triton" if meter.device == "cuda" else "torch")
        self.stack = Stack(case, meter.device, seed)
        generator = torch.Generator(meter.device).manual_seed(seed)
        shape, dtype = (1, case.room, case.width), getattr(torch, case.dtype)
        self.x = torch.randn(shape, generator=generator, device=meter.device, dtype=dtype)
        self.kept: dict[str, Kept] = {}
        self.phases: dict[str, list[tuple[float, float]]] = {}

    def open(self, name: str, batch: int = 1, pages: int | None = None) -> Kept:
        case, device = self.case, self.meter.device
        if name == OURS:
            return Sparse(case, batch, device, self.backend, pages)
        return Whole(case, batch, DenseStack(name, case.heads != case.kv_heads), device)

    def decode(self, kept: Kept, batch: int, steps: int, start: int) -> None:
        """Give every sequence ``steps`` new tokens, one after another, from position ``start`` on."""
        for at in range(start, start + steps):
            self.stack.advance(self.x[:, at : at + 1].expand(batch, -1, -1), at, kept.step)

    def run(self, name: str) -> None:
        """A whole inference of one sequence, whose two phases are timed apart: what is timed."""
        kept, times = self.kept[name], [time.perf_counter()]
        kept.reset()
        self.stack.prefill(self.x[:, : self.case.seqlen], kept.step)
        for then in (lambda: None, lambda: self.decode(kept, 1, self.case.new_tokens, self.case.seqlen)):
            then()
            self.meter.sync()
            times.append(time.perf_counter())
        self.phases.setdefault(name, []).append((times[1] - times[0], times[2] - times[1]))

    def ready(self, name: str) -> Ready:
        """Check a way to serve, and run it once, of which the memory is measured."""
        case, meter, ours = self.case, self.meter, name == OURS
        pattern = case.recipe.pattern if ours else lambda layer: Dense()
        check = lambda layer: check_chunks(case, pattern(layer), layer, self.open(name).step, meter.device, self.seed)  # noqa: E731
        error = worst_of([check(layer) for layer in kinds_of(case, pattern)])
        refuse_wrong(error)
        meter.tidy()
        held, opened = meter.allocated_bytes(), list[float]()
        others = sum(kept.pool_bytes() for kept in self.kept.values())

        def once() -> None:
            opened.append(meter.first_seconds(lambda: self.kept.update({name: self.open(name)})))
            self.run(name)

        rise = meter.peak_bytes(once)
        self.phases[name].clear()  # the first run also compiles
        kept, dense = self.kept[name], case.layers * 2 * case.room * case.kv_heads * case.head_dim * self.x.element_size()
        density = Ours(case, meter.device, self.backend).density if ours else 1.0
        facts: Row = {"dense": not ours, "density": density, "metadata_s": opened[0], "cache_bytes": kept.most_bytes()}
        facts |= {
            "pool_bytes": kept.pool_bytes(),
            "cache_dense_bytes": dense,
            "peak_bytes": rise,
            "total_peak_bytes": None if held is None or rise is None else held - others + rise,
        }
        facts |= {"backend": self.backend} if ours else {}
        return Ready(lambda: self.run(name), {**facts, **error_facts(error)}, graph=False, worth=lambda timing: self.worth(name))

    def worth(self, name: str) -> Row:
        prefill, decode = (Timing.of([pair[i] for pair in self.phases[name]]) for i in (0, 1))
        speeds = {"prefill_tokens_per_s": self.case.seqlen / prefill.median_s, "tokens_per_s": self.case.new_tokens / decode.median_s}
        return {"prefill_s": prefill.median_s, "decode_s": decode.median_s, **speeds}

    def largest_batch(self, name: str, facts: Row, deadline: float) -> Row:
        """How many sequences fit, worked out from bytes per sequence and free memory, then tried, and how fast all of them decode."""
        self.meter.tidy()
        free = self.meter.free_bytes()
        other = 0 if free is None else max(0, (facts["peak_bytes"] or 0) - facts["pool_bytes"])
        free = self.case.free_bytes if free is None else round(MARGIN * free)
        one, spare = facts["cache_bytes"], self._spare_bytes(name)
        computed = max(0, (free - other - spare) // one)
        found: Row = {"free_bytes": free, "batch_computed": computed}

        def note() -> None:
            if time.perf_counter() > deadline:
                raise Skip(LATE)
            self.journal.mark(self.case.name, name)

        for batch in range(computed, max(0, computed - TRIES), -1):
            try:
                note()
                return {**found, "batch_largest": batch, "batch_tokens_per_s": self._try(name, batch, batch * one + spare, note)}
            except Skip as why:
                return {**found, "batch_why": str(why)}
            except (torch.OutOfMemoryError, MemoryError, CacheFull) as error:
                found["batch_why"] = f"{batch} did not fit: {one_line(error)}"
            self.meter.tidy()
        return found

    def _try(self, name: str, batch: int, size: int, note: Callable[[], object]) -> float:
        """Tokens per second of a full batch, filled with random keys and values: to prefill each sequence would take too long."""
        case = self.case
        page = 2 * case.block * case.head_dim * self.x.element_size()
        kept = self.open(name, batch, size // page)
        shape = (1, min(case.chunk, case.seqlen), case.kv_heads, case.head_dim)
        k, v = (torch.randn(shape, device=self.meter.device, dtype=self.x.dtype) for _ in range(2))
        steps = min(FULL_STEPS, case.new_tokens)
        kept.fill(k, v, case.seqlen, note)
        self.meter.sync()
        seconds = self.meter.first_seconds(lambda: self.decode(kept, batch, steps, case.seqlen))
        return batch * steps / seconds

    def _spare_bytes(self, name: str) -> int:
        """What a chunk of one layer holds until its own queries are through; every key of dense attention is held for good."""
        case = self.case
        pages = (min(case.chunk, case.seqlen) // case.block + 2) * case.kv_heads
        return pages * 2 * case.block * case.head_dim * self.x.element_size() if name == OURS else 0


def inference_peers(case: InferenceCase, device: str) -> list[str]:
    """Who takes part: on a graphics card FlashAttention-2, elsewhere what torch chooses."""
    return [OURS, FLASH if device == "cuda" else SDPA]


def run_inference_case(
    case: InferenceCase,
    effort: Effort,
    seed: int = 0,
    *,
    backend: str | None = None,
    meter: Meter | None = None,
    journal: Journal | None = None,
    deadline: float = float("inf"),
) -> list[Row]:
    """One row per way to serve: seconds of both phases, memory, and the largest batch, behind a passed check, or why there are none."""
    meter, journal = meter or Meter(), journal or Journal()
    turns, serving = Turns(case.name, meter, journal, deadline), Serving(case, meter, journal, seed, backend)
    names: Sequence[str] = inference_peers(case, meter.device)
    for name in names:
        turns.enter(name, lambda name=name: serving.ready(name))
    timings = turns.time(replace(effort, min_rounds=min(2, effort.min_rounds)), meter.first_seconds)
    serving.kept.clear()
    for name in turns.ready:
        turns.ready[name].facts |= serving.largest_batch(name, turns.ready[name].facts, deadline)
    return compared(turns.rows(names, case.facts(), timings))
