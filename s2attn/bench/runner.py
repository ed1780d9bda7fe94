"""Runs cases and writes records: peers in turn, correctness first, and a reason in every row that has no number."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2attn.bench.cases import AttentionCase, Case, LayoutCase
from s2attn.bench.clock import peak_bytes, seconds_of, time_in_turn
from s2attn.bench.compare import Error, Inputs, Oracle
from s2attn.bench.host import host_facts
from s2attn.bench.peers import PEERS, Peer, Prepared, Skip
from s2attn.layout import build_layout, dense_pairs

SCHEMA = 1
Row = dict[str, Any]
Record = dict[str, Any]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much time a case may take: rounds of the peers in turn, and seconds after which no new round begins."""

    rounds: int = 9
    min_rounds: int = 3
    budget_s: float = 8.0


@dataclass
class Entrant:
    """A peer in one case, with its own copies of the inputs in its own order of axes."""

    name: str
    prepared: Prepared
    case: AttentionCase
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    first_s: float = 0.0
    error: Error = field(default_factory=lambda: Error(float("nan"), 0.0))

    @classmethod
    def of(cls, peer: Peer, case: AttentionCase, inputs: Inputs) -> Entrant:
        prepared = peer.prepare(case)
        q, k, v, dout = (_axes(x, prepared.heads_first) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        for x in (q, k, v):
            x.requires_grad_(case.backward)
        return cls(peer.name, prepared, case, q, k, v, dout)

    def run(self, dout: Tensor | None = None) -> list[Tensor]:
        """What is timed: out, and for a backward case dq, dk, dv; in the peer's own order of axes."""
        with torch.set_grad_enabled(self.case.backward):
            out = self.prepared.attend(self.q, self.k, self.v)
        if not self.case.backward:
            return [out]
        grads = torch.autograd.grad(out, (self.q, self.k, self.v), self.dout if dout is None else dout)
        return [out.detach(), *grads]

    def check(self, oracle: Oracle) -> None:
        """The first call, timed, and compared to the oracle."""
        dout = _axes(oracle.dout(), self.prepared.heads_first)
        results: list[Tensor] = []
        self.first_s = seconds_of(lambda: results.extend(self.run(dout)))
        plain = [x.transpose(1, 2) if self.prepared.heads_first else x for x in results]
        self.error = oracle.check(self.prepared.pattern, plain)
        if not self.error.within:
            raise ArithmeticError(f"wrong result: error {self.error.error:.2e} where {self.error.bound:.2e} is allowed")


def _axes(x: Tensor, heads_first: bool) -> Tensor:
    return (x.transpose(1, 2) if heads_first else x).detach().clone(memory_format=torch.contiguous_format)


def run_case(case: AttentionCase, peers: Sequence[Peer], effort: Effort, seed: int = 0) -> list[Row]:
    """One row per peer: a time behind a passed check, or the reason why there is none."""
    inputs = Inputs.of(case, seed)
    oracle, entrants, missing = Oracle(case, inputs), {}, {}
    for peer in peers:
        try:
            entrant = Entrant.of(peer, case, inputs)
            entrant.check(oracle)
        except Skip as why:
            missing[peer.name] = ("skipped", str(why))
        except Exception as error:  # a peer that breaks must not take the others' numbers with it
            missing[peer.name] = ("failed", _one_line(error))
        else:
            entrants[peer.name] = entrant
    # The warm-up is where memory is measured.
    peaks = {name: peak_bytes(entrant.run) for name, entrant in entrants.items()}
    calls = {name: entrant.run for name, entrant in entrants.items()}
    timings = time_in_turn(calls, rounds=effort.rounds, min_rounds=effort.min_rounds, budget_s=effort.budget_s)
    rows: list[Row] = []
    for peer in peers:
        facts = {**case.facts(), "peer": peer.name}
        if peer.name in missing:
            status, why = missing[peer.name]
            rows.append({**facts, "status": status, "why": why})
            continue
        entrant, timing = entrants[peer.name], timings[peer.name]
        rows.append({**facts, "status": "ok", **_numbers(entrant, timing.median_s), "peak_bytes": peaks[peer.name], **timing.facts()})
    return _compared(rows)


def _numbers(entrant: Entrant, median_s: float) -> Row:
    # compile_s is what the first call took beyond the median: a peer's compilation, or the plan that s2attn makes of a layout.
    case, prepared = entrant.case, entrant.prepared
    return {
        "pairs": prepared.pairs,
        "density": prepared.pairs / case.pairs_dense,
        "metadata_s": prepared.metadata_s,
        "metadata_bytes": prepared.metadata_bytes,
        "compile_s": max(0.0, entrant.first_s - median_s),
        "effective_gflops": case.flops(prepared.pairs) / median_s / 1e9,
        "error": entrant.error.error,
        "error_bound": entrant.error.bound,
    }


def _compared(rows: list[Row]) -> list[Row]:
    """Add to every timed row its speed-up over each other one, and its efficiency: speed-up over dense times density."""
    timed = {row["peer"]: row["median_s"] for row in rows if row["status"] == "ok"}
    for row in rows:
        if row["status"] == "ok":
            row["speedup"] = {name: seconds / row["median_s"] for name, seconds in timed.items() if name != row["peer"]}
            if "sdpa" in row["speedup"]:
                row["efficiency"] = row["speedup"]["sdpa"] * row["density"]
    return rows


def run_layout_case(case: LayoutCase, rounds: int = 3) -> Row:
    """Seconds and bytes of building a layout."""
    facts = {**case.facts(), "peer": "s2attn"}

    def build() -> Any:
        return build_layout(case.pattern, case.heads, seqlen_q=case.seqlen, block=case.block)

    try:
        timing = time_in_turn({"build": build}, rounds=rounds, min_rounds=1)["build"]
        layout = build()
    except Exception as error:
        return {**facts, "status": "failed", "why": _one_line(error)}
    pairs, dense = int(layout.pairs.sum()), layout.heads * dense_pairs(layout)
    facts.update(status="ok", density=pairs / dense, entries=layout.rows.entries, bytes=layout.nbytes)
    return {**facts, "bytes_per_entry": layout.nbytes / layout.rows.entries, "peak_bytes": peak_bytes(build), **timing.facts()}


def run_suite(
    name: str,
    cases: Sequence[Case],
    *,
    peers: Sequence[str] = tuple(PEERS),
    effort: Effort | None = None,
    seed: int = 0,
    limit_s: float = float("inf"),
    note: Note | None = None,
) -> Record:
    """Run ``cases`` and return the record: what it ran on, and a row per case and peer.

    Args:
        peers: names from ``PEERS``.
        limit_s: once so many seconds have passed, the cases that are left are skipped, and say so.
        note: called with the name of each case before it begins.
    """
    made, rows, began = [PEERS[peer]() for peer in peers], [], time.perf_counter()
    with compiling_anew():
        for case in cases:
            if note is not None:
                note(case.name)
            if time.perf_counter() - began > limit_s:
                names = ["s2attn"] if isinstance(case, LayoutCase) else peers
                why = f"the {limit_s:.0f} seconds for all timings were over"
                rows += [{**case.facts(), "peer": peer, "status": "skipped", "why": why} for peer in names]
            elif isinstance(case, LayoutCase):
                rows.append(run_layout_case(case))
            else:
                rows += run_case(case, made, effort or Effort(), seed)
            gc.collect()
    return {"schema": SCHEMA, "suite": name, "host": host_facts(), "seed": seed, "seconds": time.perf_counter() - began, "rows": rows}


@contextmanager
def compiling_anew() -> Iterator[None]:
    """Let torch.compile find nothing that an earlier run has left on disk, so that its seconds are those of a new machine."""
    known = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, torch._dynamo.config.patch(recompile_limit=64):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if known is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = known


def write_record(record: Record, path: Path) -> Path:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _one_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
