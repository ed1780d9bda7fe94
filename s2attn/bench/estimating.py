"""The suite `hyper`: HyperAttention, its stages apart, against dense attention; a row says how far the estimate is from the truth."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2attn.bench.cases import DTYPES, SHORT, AttentionCase, tokens
from s2attn.bench.clock import Meter
from s2attn.bench.compare import Error, Group, bound_of, eager, errors, exact, sample_rows, worst_of
from s2attn.bench.journal import Journal, Row
from s2attn.bench.peers import Sdpa, make_peers
from s2attn.bench.rows import Effort, Skip, compared, refuse_wrong
from s2attn.bench.selecting import beside_dense
from s2attn.bench.turns import Ready, Turns, error_facts
from s2attn.core import bad_value
from s2attn.patterns import Dense
from s2attn.selectors import hyper_attention
from s2attn.selectors.stages import HYPER_STAGES, heard_by

OURS, LISTENED = "s2attn", "stages"
PIECE = 8  # stretches of keys in the piece that is checked against float64
NOISE = 0.1


@dataclass(frozen=True)
class HyperCase:
    """Self-attention by `hyper_attention` on q and k of a few themes: on plain noise no bucket is worth more than another.

    Attributes:
        backward: the gradients of q, k and v as well, in the same call.
        block, samples, min_seqlen: as in `hyper_attention`.
    """

    name: str
    seqlen: int
    causal: bool
    backward: bool
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    block: int = 256
    samples: int = 256
    min_seqlen: int = 4096
    op: str = "hyper"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise bad_value("dtype", f"must be one of {', '.join(DTYPES)}", repr(self.dtype))
        for field in ("block", "seqlen"):
            number = getattr(self, field)
            if number < 16 or number & (number - 1):
                raise bad_value(field, "must be a power of two, at least 16", number)
        if self.seqlen < PIECE * self.block:
            raise bad_value("seqlen", f"must be at least {PIECE} blocks of {self.block}", self.seqlen)

    @property
    def pairs_dense(self) -> int:
        """(query, key) pairs of dense attention, all heads."""
        return self.heads * (self.seqlen * (self.seqlen + 1) // 2 if self.causal else self.seqlen**2)

    @property
    def pairs(self) -> int:
        """(query, key) pairs whose products the estimate takes, all heads."""
        return self.heads * (self._causal_pairs(self.seqlen) if self.causal else self._square_pairs(self.seqlen, self.min_seqlen))

    def _causal_pairs(self, length: int) -> int:
        if length <= max(self.min_seqlen, self.block):
            return length * (length + 1) // 2
        return 2 * self._causal_pairs(length // 2) + self._square_pairs(length // 2)

    def _square_pairs(self, length: int, exact_to: int = 0) -> int:
        if length <= max(exact_to, self.block) or length - self.block <= self.samples:
            return length**2
        return length * (self.block + self.samples)

    def facts(self) -> dict[str, Any]:
        """The case as plain values for a record."""
        names = ("seqlen", "causal", "backward", "heads", "kv_heads", "head_dim", "dtype", "block", "samples", "min_seqlen")
        return {"case": self.name, "op": self.op, "pattern": "HyperAttention", "batch": 1, **{name: getattr(self, name) for name in names}}


def hyper_suite(op: str = "hyper", size: str = "full") -> list[HyperCase]:
    """The cases of the suite, the most valuable first.

    Args:
        size: ``"full"`` for a graphics card; ``"small"`` for a CPU; ``"tiny"``, whose numbers mean nothing.
    """
    shapes: dict[str, dict[str, Any]] = {
        "full": {},
        "small": {"heads": 2, "kv_heads": 1, "head_dim": 64, "dtype": "float32"},
        "tiny": {"heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": "float32", "block": 32, "samples": 16, "min_seqlen": 64},
    }
    lengths = {"full": (131072, 32768, 65536), "small": (32768,), "tiny": (512,)}[size]
    first = "tiny " if size == "tiny" else ""
    kinds = [(causal, backward) for causal in (True, False) for backward in (True, False)]
    made = []
    for causal, backward in kinds:
        kind = f"{'causal' if causal else 'not causal'} {SHORT['forward_backward' if backward else 'forward']}"
        made += [HyperCase(f"{first}{tokens(n)} {kind}", n, causal, backward, **shapes[size]) for n in lengths]
    return made


@dataclass(frozen=True, eq=False)
class Tokens:
    """q, dout ``(1, S, H, D)``, k, v ``(1, S, G, D)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def noise(cls, case: HyperCase, length: int, heads: tuple[int, int], generator: torch.Generator) -> Tokens:
        shape = {"generator": generator, "device": generator.device}
        made = (torch.randn(1, length, n, case.head_dim, **shape) for n in (heads[0], heads[1], heads[1], heads[0]))
        return cls(*(x.to(getattr(torch, case.dtype)) for x in made))

    @classmethod
    def themed(cls, case: HyperCase, generator: torch.Generator) -> Tokens:
        """Every token of every head has one of as many themes as there are stretches; queries look at the keys and values of theirs."""
        group, shape = case.heads // case.kv_heads, {"generator": generator, "device": generator.device}
        plain = cls.noise(case, case.seqlen, (case.heads, case.kv_heads), generator)
        themes = torch.randn(2, case.seqlen // case.block, case.kv_heads, case.head_dim, **shape).to(plain.q.dtype)
        head = torch.arange(case.kv_heads, device=generator.device)
        own, theirs = (torch.randint(themes.shape[1], (case.seqlen, case.kv_heads), **shape) for _ in range(2))
        q = themes[0][own, head].repeat_interleave(group, 1) + NOISE * plain.q
        return cls(q, themes[0][theirs, head] + NOISE * plain.k, themes[1][theirs, head] + plain.v, plain.dout)

    def to(self, dtype: torch.dtype) -> Tokens:
        return Tokens(*(x.to(dtype) for x in (self.q, self.k, self.v, self.dout)))


class Stopwatch:
    """Seconds of each stage of a call, without those of stages inside of it; waits for the device at every edge."""

    def __init__(self, sync: Callable[[], None]):
        self.sync, self.seconds, self._open, self._since = sync, defaultdict[str, float](float), list[str](), 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        self.sync()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class Estimating:
    """One case on one device."""

    def __init__(self, case: HyperCase, meter: Meter, seed: int, backend: str | None):
        self.case, self.meter, self.seed = case, meter, seed
        self.backend = backend or ("triton" if meter.device == "cuda" else "torch")
        self.generator = torch.Generator(meter.device).manual_seed(seed)
        self.tokens = Tokens.themed(case, self.generator)
        self.heard: list[dict[str, float]] = []

    def attend(self, x: Tokens, **other: Any) -> tuple[list[Tensor], Tensor]:
        """The leaves and the result, whose gradients are then to be asked for; ``other`` replaces what the case says."""
        case = self.case
        numbers: dict[str, Any] = {"block": case.block, "samples": case.samples, "min_seqlen": case.min_seqlen, "backend": self.backend}
        leaves = [part.detach().requires_grad_(case.backward) for part in (x.q, x.k, x.v)]
        with torch.set_grad_enabled(case.backward):
            return leaves, hyper_attention(leaves[0], leaves[1], leaves[2], causal=case.causal, seed=self.seed, **{**numbers, **other})

    def whole(self, x: Tokens, **other: Any) -> list[Tensor]:
        """out, and for a case with gradients dq, dk, dv."""
        leaves, out = self.attend(x, **other)
        return [out.detach(), *(torch.autograd.grad(out, leaves, x.dout) if self.case.backward else ())]

    def listened(self) -> None:
        """The whole call under a stopwatch."""
        watch, began = Stopwatch(self.meter.sync), time.perf_counter()
        with heard_by(watch):
            leaves, out = self.attend(self.tokens)
        self.meter.sync()
        forward = time.perf_counter()
        found = {name: watch.seconds[name] for name in HYPER_STAGES}
        found["other"] = forward - began - sum(found.values())
        if self.case.backward:
            torch.autograd.grad(out, leaves, self.tokens.dout)
            self.meter.sync()
            found["backward"] = time.perf_counter() - forward
        self.heard.append(found)

    def stages(self) -> Row:
        """The median seconds of each stage, as columns."""
        return {f"{name}_s": statistics.median(found[name] for found in self.heard) for name in (self.heard[0] if self.heard else ())}

    def check(self) -> Error:
        """A piece of one KV head in which nothing is estimated, against dense attention in float64; and one with samples, against itself.

        Raises:
            ArithmeticError: another estimate than float64 makes of the same tokens and the same seed.
        """
        case, group = self.case, self.case.heads // self.case.kv_heads
        x = Tokens.noise(case, PIECE * case.block, (group, 1), self.generator)
        sampled, plain = self.whole(x, min_seqlen=0), self.whole(x.to(torch.float64), min_seqlen=0, backend="torch")
        allowed = 4 * torch.finfo(x.q.dtype).eps + 64 * torch.finfo(torch.float32).eps
        far = max(_distance(own, truth) for own, truth in zip(sampled, plain, strict=True))
        if not far <= allowed:
            raise ArithmeticError(f"wrong estimate: {far:.2e} from what float64 makes of the same samples, where {allowed:.2e} is allowed")
        return self._check_exact(x, self.whole(x, min_seqlen=0, samples=x.q.shape[1]))

    def _check_exact(self, x: Tokens, results: list[Tensor]) -> Error:
        case, length, group = self.case, x.q.shape[1], x.q.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.q.device)
        mask = (mask.tril() if case.causal else mask).expand(group, -1, -1)
        piece = Group(x.q, x.k[:, :, 0], x.v[:, :, 0], x.dout, mask, case.head_dim**-0.5, case.backward)
        truth = exact(piece)
        bounds = [bound_of(error, x.q.dtype) for error in errors(eager(piece), truth)]
        own = [*results[:2], *(result[:, :, 0] for result in results[2:])]
        # Each halving rounds once more where it joins results.
        steps = (length // case.block).bit_length()
        return worst_of([Error(error, steps * bound) for error, bound in zip(errors(own, truth), bounds, strict=True)])

    def distance(self, out: Tensor) -> float:
        """How far ``out (1, S, H, D)`` is from dense attention in float64: the root of squared errors over that of squares, some rows.

        Raises:
            ArithmeticError: it is worse than zeros would be.
        """
        case, x = self.case, self.tokens
        rows = sample_rows(case.seqlen, seed=self.seed).to(x.q.device)
        seen = torch.arange(case.seqlen, device=rows.device) <= (rows[:, None] if case.causal else case.seqlen)
        heads, own, truth = sorted({0, case.heads // 2, case.heads - 1}), list[Tensor](), list[Tensor]()
        for head in heads:
            kv_head, some = head * case.kv_heads // case.heads, x.q[:, rows, head : head + 1]
            mask = seen.expand(1, len(rows), -1)
            own.append(out[:, rows, head : head + 1])
            truth += exact(Group(some, x.k[:, :, kv_head], x.v[:, :, kv_head], some, mask, case.head_dim**-0.5, False)).values
        far = _distance(torch.cat(own), torch.cat(truth))
        if not far < 1:
            raise ArithmeticError(f"wrong estimate: {far:.2f} from dense attention, where zeros would be 1 from it")
        return far

    def ours(self) -> Ready:
        """The whole call, checked."""
        case, results = self.case, list[Tensor]()
        first_s = self.meter.first_seconds(lambda: results.extend(self.whole(self.tokens)))
        error = self.check()
        refuse_wrong(error)
        facts: Row = {
            "dense": False,
            "density": case.pairs / case.pairs_dense,
            "pairs": case.pairs,
            "from_dense": self.distance(results[0]),
        }
        results.clear()
        call = lambda: self.whole(self.tokens)  # noqa: E731
        measured = {"peak_bytes": self.meter.peak_bytes(call), "first_s": first_s, "backend": self.backend}
        return Ready(call, {**facts, **measured, **error_facts(error)}, graph=False)

    def dense(self, name: str) -> Ready:
        """torch's dense attention of one kind; its distance from float64 is measured like ours."""
        case, x = self.case, self.tokens
        (peer,) = make_peers([name], self.meter.device)
        assert isinstance(peer, Sdpa)
        peer.causal = case.causal
        absence = peer.absence()
        if absence is not None:
            raise Skip(absence)
        shape = AttentionCase(case.name, "forward", Dense(), case.seqlen, case.heads, case.kv_heads, case.head_dim, dtype=case.dtype)
        prepared = peer.prepare(shape)
        q, k, v, dout = (part.transpose(1, 2).contiguous() for part in (x.q, x.k, x.v, x.dout))
        for leaf in (q, k, v):
            leaf.requires_grad_(case.backward)

        def call() -> list[Tensor]:
            with torch.set_grad_enabled(case.backward):
                out = prepared.attend(q, k, v)
            return [out.detach(), *(torch.autograd.grad(out, (q, k, v), dout) if case.backward else ())]

        far, allowed = self.distance(call()[0].transpose(1, 2)), 4 * torch.finfo(q.dtype).eps + 64 * torch.finfo(torch.float32).eps
        refuse_wrong(Error(far, allowed))
        facts: Row = {"dense": True, "density": 1.0, "pairs": case.pairs_dense, "from_dense": far, **prepared.facts}
        return Ready(call, {**facts, "peak_bytes": self.meter.peak_bytes(call)}, graph=False)


def _distance(own: Tensor, truth: Tensor) -> float:
    return float((own.double() - truth).norm() / truth.norm())


def run_hyper_case(
    case: HyperCase,
    effort: Effort,
    seed: int = 0,
    *,
    backend: str | None = None,
    meter: Meter | None = None,
    journal: Journal | None = None,
    deadline: float = float("inf"),
) -> list[Row]:
    """Our row with its stages, beside dense attention: time behind a passed check, and the distance of the estimate from the truth."""
    meter = meter or Meter()
    turns, run = Turns(case.name, meter, journal or Journal(), deadline), Estimating(case, meter, seed, backend)
    names = beside_dense(case, meter.device)
    makers: dict[str, Callable[[], Ready]] = {name: (lambda name=name: run.dense(name)) for name in names if name != OURS}
    for name, make in {OURS: run.ours, **makers}.items():
        turns.enter(name, make)
    if OURS in turns.ready:
        turns.enter(LISTENED, lambda: Ready(run.listened, {}, graph=False))
    timings = turns.time(effort)
    rows = compared(turns.rows(names, case.facts(), timings))
    if rows[0]["status"] == "ok":
        rows[0] |= run.stages()
    return rows
