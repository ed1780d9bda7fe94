"""Timing the suite `decode`: this library over pages against dense attention over whole keys and values, and against a copy."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2attn.bench.cases import AttentionCase
from s2attn.bench.clock import Call, Meter, Timing
from s2attn.bench.compare import Error, Group, bound_of, eager, errors, exact, worst_of
from s2attn.bench.flex import mask_function, torch_flex
from s2attn.bench.journal import Journal, Row
from s2attn.bench.paged import Batch, DecodeCase, listed_in, unchecked, uniform_twin
from s2attn.bench.peers import NO_CUDA, sdpa_context
from s2attn.bench.rows import Effort, Skip, compared, refuse_wrong
from s2attn.bench.turns import Ready, Turns, error_facts
from s2attn.ops.decode import decode
from s2attn.patterns import Dense, Head, Pattern, Shape

OURS, COPY, TWIN = "s2attn", "a copy", "uniform"
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
UNCHECKED: Mapping[str, Any] = unchecked(decode)


class DecodePeer(ABC):
    """A way to compute a case on one batch."""

    dense = True

    def __init__(self, batch: Batch, device: str, backend: str):
        self.batch, self.case, self.device, self.backend = batch, batch.case, device, backend

    @property
    def pattern(self) -> Pattern:
        """What it computes, and is checked against."""
        return Dense()

    @abstractmethod
    def prepare(self) -> tuple[Callable[[], Tensor], Row]:
        """What is timed, which returns out ``(B, T, H, D)``, and facts for the row; raises `Skip` where it cannot serve the case."""


class Paged(DecodePeer):
    """This library with the case's pattern over the pages."""

    dense = False

    @property
    def pattern(self) -> Pattern:
        return self.case.pattern

    def prepare(self) -> tuple[Callable[[], Tensor], Row]:
        facts: Row = {"backend": self.backend}
        if self.device == "cuda" and not UNCHECKED:
            facts["note"] = "this decode looks at numbers on the device, so no CUDA graph captures it, and host time is in it"
        return lambda: self.attend(self.batch.seq_lens), facts

    def attend(self, seq_lens: Tensor) -> Tensor:
        """One step with these lengths."""
        batch = self.batch
        where: dict[str, Any] = {"block_table": batch.block_table, "seq_lens": seq_lens, "backend": self.backend, **UNCHECKED}
        return decode(batch.q, batch.k_pages, batch.v_pages, self.pattern, **where)

    def metadata_s(self, meter: Meter) -> float:
        """What a step with lengths that were never seen takes beyond one with known lengths: a server has new ones at every step."""
        fewer = (self.batch.seq_lens - 1).clamp(min=1)
        known, new = (meter.first_seconds(lambda lens=lens: self.attend(lens)) for lens in (self.batch.seq_lens, fewer))
        return max(0.0, new - known)


class PagedDense(Paged):
    """This library with every key over the same pages."""

    dense = True

    @property
    def pattern(self) -> Pattern:
        return Dense()

    def prepare(self) -> tuple[Callable[[], Tensor], Row]:
        if self.case.pattern == Dense():
            raise Skip("is s2attn itself where the pattern is dense")
        return super().prepare()


class Whole(DecodePeer):
    """torch's dense attention of the kind that torch chooses, over keys and values one after another; shorter sequences are padded."""

    kind: str | None = None

    def prepare(self) -> tuple[Callable[[], Tensor], Row]:
        case, batch = self.case, self.batch
        if self.kind is not None and self.device != "cuda":
            raise Skip(NO_CUDA)
        if self.kind == "FLASH_ATTENTION" and case.ragged:
            raise Skip("takes no mask, so no padding")
        q, k, v = batch.whole
        more: dict[str, Any] = {"attn_mask": self.mask(), "enable_gqa": case.heads != case.kv_heads}

        def attend() -> Tensor:
            with sdpa_context(self.kind):
                return F.scaled_dot_product_attention(q, k, v, **more).transpose(1, 2)

        facts: Row = {"executed_density": case.batch * case.context / sum(case.lengths)}
        return attend, {**facts, "sdpa_backend": self.kind} if self.kind is not None else facts

    def mask(self) -> Any:
        """None where every query sees every key; for queries that follow one another torch's own kind; a table where keys are padding."""
        case = self.case
        if case.ragged:
            key, row = (torch.arange(n, device=self.device) for n in (case.context, case.q_len))
            seen = (key <= row[:, None] + case.context - case.q_len) & (key >= case.context - self.batch.seq_lens[:, None, None])
            return seen[:, None]
        if case.q_len == 1:
            return None
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(case.q_len, case.context)


class WholeFlash(Whole):
    """FlashAttention-2, as torch ships it."""

    kind = "FLASH_ATTENTION"


class WholeCudnn(Whole):
    """cuDNN's attention, as torch calls it."""

    kind = "CUDNN_ATTENTION"


class WholeFlex(Whole):
    """FlexAttention, compiled, with the same mask; torch takes its decoding kernel where all heads of the mask are equal."""

    dense = False

    @property
    def pattern(self) -> Pattern:
        return self.case.pattern

    def prepare(self) -> tuple[Callable[[], Tensor], Row]:
        case, batch = self.case, self.batch
        if self.device != "cuda":
            raise Skip(f"{NO_CUDA}: on a CPU it is compiled for a minute")
        if not case.all_peers:
            raise Skip("takes long to prepare, and is in the cases for all peers only")
        kernel, began = torch.compile(torch_flex().flex_attention, dynamic=False), time.perf_counter()
        sizes = (case.batch if case.ragged else None, self.mask_heads(), case.q_len, case.context)
        block_mask = torch_flex().create_block_mask(self.seen(), *sizes, device=self.device)
        torch.cuda.synchronize()
        facts = {"metadata_s": time.perf_counter() - began, "decoding_kernel": sizes[1] is None or case.heads == case.kv_heads}
        q, k, v = batch.whole
        more: dict[str, Any] = {"block_mask": block_mask, "enable_gqa": case.heads != case.kv_heads}
        return lambda: kernel(q, k, v, **more).transpose(1, 2), facts

    def mask_heads(self) -> int | None:
        """Heads that the mask tells apart; None where all are equal."""
        heads = {self.pattern.at(Head(h, self.case.heads, self.case.kv_heads)) for h in range(self.case.heads)}
        return self.case.heads if len(heads) > 1 else None

    def seen(self) -> Callable[[Any, Any, Any, Any], Any]:
        """FlexAttention's ``mask_mod`` over padded keys: positions count from a sequence's own first key."""
        case = self.case
        shape = AttentionCase(case.name, "forward", case.pattern, case.context, case.heads, case.kv_heads)
        inner, lengths = mask_function(case.pattern, shape, self.device), self.batch.seq_lens

        def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
            before = case.context - (lengths[b] if case.ragged else case.context)
            return inner(b, h, q + case.context - case.q_len - before, k - before) & (k >= before)

        return seen


PEERS: dict[str, type[DecodePeer]] = {
    OURS: Paged,
    "s2attn-dense": PagedDense,
    "sdpa": Whole,
    "flash": WholeFlash,
    "cudnn": WholeCudnn,
    "flex": WholeFlex,
}


def decode_peers(case: DecodeCase, device: str) -> list[str]:
    """Who has a row in a case."""
    return list(PEERS)


class DecodeOracle:
    """Truth in float64 of a few sequences of a batch, the longest and the shortest among them; one KV head of one at a time."""

    def __init__(self, batch: Batch, count: int = 4):
        lengths = batch.case.lengths
        by_length = sorted(range(len(lengths)), key=lambda b: lengths[b])
        self.batch, self.sequences = (
            batch,
            sorted({0, by_length[0], by_length[-1], len(lengths) - 1, *range(count)} & {*range(len(lengths))}),
        )
        self._bounds: dict[tuple[Pattern, int, int], float] = {}

    def check(self, pattern: Pattern, out: Tensor) -> Error:
        """Compare ``out (B, T, H, D)``; the bound is that of `s2attn.bench.compare.Oracle`, and what adding up a long row may cost."""
        case, found = self.batch.case, []
        group = case.heads // case.kv_heads
        for sequence in self.sequences:
            k, v = (self.batch.tokens_of(pages, sequence) for pages in (self.batch.k_pages, self.batch.v_pages))
            for kv_head in range(case.kv_heads):
                heads, key = slice(kv_head * group, (kv_head + 1) * group), (pattern, sequence, kv_head)
                q = self.batch.q[sequence : sequence + 1, :, heads]
                mask = self._mask(pattern, range(heads.start, heads.stop), len(k))
                part = Group(q, k[None, :, kv_head], v[None, :, kv_head], q, mask, case.head_dim**-0.5, False)
                truth = exact(part)
                if key not in self._bounds:
                    # One long row may be added up key by key: its roundings then grow with the root of their number.
                    added = len(k) ** 0.5 * torch.finfo(torch.float32).eps
                    self._bounds[key] = bound_of(errors(eager(part), truth)[0], q.dtype) + added
                found.append(Error(errors([out[sequence : sequence + 1, :, heads]], truth)[0], self._bounds[key]))
        return worst_of(found)

    def _mask(self, pattern: Pattern, heads: range, length: int) -> Tensor:
        case = self.batch.case
        rows, keys = torch.arange(length - case.q_len, length).numpy()[:, None], torch.arange(length).numpy()[None]
        made = [torch.from_numpy(pattern.at(Head(h, case.heads, case.kv_heads)).allowed(rows, keys, Shape(length))) for h in heads]
        return torch.stack(made).to(self.batch.q.device)


def run_decode_case(
    case: DecodeCase,
    effort: Effort,
    seed: int = 0,
    *,
    backend: str | None = None,
    meter: Meter | None = None,
    journal: Journal | None = None,
    deadline: float = float("inf"),
) -> list[Row]:
    """One row per way to decode: time, listed bytes, their rate and its share of a copy's, behind a passed check, or why there is none.

    A copy is timed in turn with all others, and so is, beside a ragged batch, a uniform one in which the pattern lists as many bytes.
    """
    meter = meter or Meter()
    backend = backend or ("triton" if meter.device == "cuda" else "torch")
    turns = Turns(case.name, meter, journal or Journal(), deadline)
    batch = Batch.of(case, seed, meter.device)
    oracle = DecodeOracle(batch)
    names = decode_peers(case, meter.device)
    for name in names:
        turns.enter(name, lambda name=name: _ready(PEERS[name](batch, meter.device, backend), oracle, meter))
    twin = uniform_twin(case) if case.ragged and OURS in turns.ready else None
    if twin is not None:
        other = Batch.of(twin, seed, meter.device)
        turns.enter(TWIN, lambda: _ready(Paged(other, meter.device, backend), DecodeOracle(other), meter))
    turns.enter(COPY, lambda: Ready(_copy(meter.device), {}))
    timings = turns.time(effort)
    rows = turns.rows(names, case.facts(), timings)
    for row in rows:
        if row["status"] == "ok" and COPY in timings:
            row["copy_gbps"] = 2 * COPY_BYTES[meter.device] / timings[COPY].median_s / 1e9
            row["share_of_copy"] = row["gbps"] / row["copy_gbps"]
    ours = next(row for row in rows if row["peer"] == OURS)
    if twin is not None and ours["status"] == "ok":
        ours.update(_beside(case, twin, ours, timings.get(TWIN), turns.missing.get(TWIN)))
    return compared(rows)


def _ready(peer: DecodePeer, oracle: DecodeOracle, meter: Meter) -> Ready:
    """Prepare a way to decode, check its first result, and measure what is not its time."""
    case = peer.case
    attend, facts = peer.prepare()
    results: list[Tensor] = []
    first_s = meter.first_seconds(lambda: results.append(attend()))
    error = oracle.check(peer.pattern, results.pop())
    refuse_wrong(error)
    listed, dense = listed_in(case, peer.pattern, case.lengths), listed_in(case, Dense(), case.lengths)
    measured: Row = {"peak_bytes": meter.peak_bytes(attend), "host_s": meter.host_seconds(attend), "first_s": first_s}
    if isinstance(peer, Paged):
        measured["metadata_s"] = peer.metadata_s(meter)
    density = listed.keys / dense.keys
    sizes: Row = {"dense": peer.dense, "density": density, "pairs": listed.pairs, "listed_bytes": listed.bytes(case)}

    def worth(timing: Timing) -> Row:
        return {"gbps": listed.bytes(case) / timing.median_s / 1e9, "tokens_per_s": case.batch * case.q_len / timing.median_s}

    made: Row = {**sizes, "dense_bytes": dense.bytes(case), **measured, **error_facts(error), **facts}
    return Ready(attend, made, graph=not isinstance(peer, Paged) or bool(UNCHECKED), worth=worth)


def _copy(device: str) -> Call:
    source = torch.zeros(COPY_BYTES[device] // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _beside(case: DecodeCase, twin: DecodeCase, ours: Row, timing: Timing | None, missing: tuple[str, str] | None) -> Row:
    """A ragged batch beside a uniform one: the ratio of their times, each per listed byte."""
    if timing is None:
        return {"uniform_why": missing[1] if missing else "not timed"}
    size = listed_in(twin, case.pattern, twin.lengths).bytes(twin)
    ratio = (ours["median_s"] / ours["listed_bytes"]) / (timing.median_s / size)
    return {"uniform_s": timing.median_s, "uniform_context": twin.context, "uniform_bytes": size, "over_uniform": ratio}
