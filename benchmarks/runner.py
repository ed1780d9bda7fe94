"""Runs cases and makes records: peers in turn, correctness first, and a reason in every row that has no number."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding import decode_peers, run_decode_case
from benchmarks.estimating import HyperCase, run_hyper_case
from benchmarks.inference import InferenceCase, inference_peers, run_inference_case
from benchmarks.peer import Peer, Prepared
from benchmarks.peers import CPU_PEERS, S2Attn, make_peers
from benchmarks.selecting import SelectCase, beside_dense, run_select_case
from benchmarks.stack import StackCase
from benchmarks.stacks import run_stack_case, stack_peers
from s2attn.layout import build_layout, dense_pairs
from s2attn.tuning.cases import AttentionCase, LayoutCase
from s2attn.tuning.clock import Armed, Meter, Timing, peak_bytes, time_in_turn
from s2attn.tuning.compare import Error, Inputs, Oracle
from s2attn.tuning.host import host_facts
from s2attn.tuning.journal import SCHEMA, Journal, Record, Row, write_record
from s2attn.tuning.paged import DecodeCase
from s2attn.tuning.rows import Effort, Skip, compared, one_line, refuse_wrong, still_there

__all__ = ["Effort", "Entrant", "meter_for", "run_case", "run_layout_case", "run_suite", "write_record"]
Note = Callable[[str], None]
OTHERS: dict[type, tuple[Callable[..., list[Row]], Callable[[Any, str], list[str]]]] = {
    StackCase: (run_stack_case, stack_peers),
    DecodeCase: (run_decode_case, decode_peers),
    InferenceCase: (run_inference_case, inference_peers),
    SelectCase: (run_select_case, beside_dense),
    HyperCase: (run_hyper_case, beside_dense),
}
"""For cases that bring their own peers: what runs one, and who has a row in it."""
AnyCase = AttentionCase | LayoutCase | StackCase | DecodeCase | SelectCase | HyperCase


class Arranged:
    """A case's inputs in both orders of axes, each made once and shared by all peers."""

    def __init__(self, case: AttentionCase, inputs: Inputs):
        self.case, self.inputs = case, inputs
        self._made: dict[bool, tuple[Tensor, ...]] = {}

    def get(self, heads_first: bool) -> tuple[Tensor, ...]:
        """q, k, v, dout; q, k, v of a backward case want gradients."""
        if heads_first not in self._made:
            parts = (self.inputs.q, self.inputs.k, self.inputs.v, self.inputs.dout)
            made = tuple(axes(x, heads_first) for x in parts)
            for x in made[:3]:
                x.requires_grad_(self.case.backward)
            self._made[heads_first] = made
        return self._made[heads_first]


@dataclass
class Entrant:
    """A peer in one case, with the inputs in its own order of axes."""

    name: str
    prepared: Prepared
    case: AttentionCase
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dense: bool = False
    first_s: float = 0.0
    error: Error = field(default_factory=lambda: Error(float("nan"), 0.0))
    out: Tensor | None = None

    @classmethod
    def of(cls, peer: Peer, case: AttentionCase, arranged: Arranged) -> Entrant:
        prepared = peer.prepare(case)
        return cls(peer.name, prepared, case, *arranged.get(prepared.heads_first), dense=peer.dense)

    def start(self) -> None:
        """What has to be there before a call: for a backward case the forward pass, which is not timed."""
        self.out = None
        if self.case.op == "backward":
            self.out = self.prepared.attend(self.q, self.k, self.v)

    def run(self) -> list[Tensor]:
        """What is timed: out, and for a backward case dq, dk, dv; in the peer's own order of axes."""
        if self.out is not None:
            return list(torch.autograd.grad(self.out, (self.q, self.k, self.v), self.dout, retain_graph=True))
        return self.whole(self.dout)

    def whole(self, dout: Tensor) -> list[Tensor]:
        """out, and for a backward case dq, dk, dv for an output gradient."""
        with torch.set_grad_enabled(self.case.backward):
            out = self.prepared.attend(self.q, self.k, self.v)
        if not self.case.backward:
            return [out]
        grads = torch.autograd.grad(out, (self.q, self.k, self.v), dout)
        return [out.detach(), *grads]

    def check(self, oracle: Oracle, meter: Meter) -> None:
        """The first call, timed, and compared to the oracle."""
        dout = axes(oracle.dout(), self.prepared.heads_first)
        results: list[Tensor] = []
        self.first_s = meter.first_seconds(lambda: results.extend(self.whole(dout)))
        plain = [x.transpose(1, 2) if self.prepared.heads_first else x for x in results]
        self.error = oracle.check(self.prepared.pattern, plain)
        refuse_wrong(self.error)


def axes(x: Tensor, heads_first: bool) -> Tensor:
    """A contiguous copy in one order of axes or the other."""
    return (x.transpose(1, 2) if heads_first else x).detach().clone(memory_format=torch.contiguous_format)


def meter_for(device: str) -> Meter:
    """What measures on a device."""
    if device != "cuda":
        return Meter()
    from s2attn.tuning.cuda import CudaMeter

    return CudaMeter()


@dataclass
class Field:
    """The peers of one case: those that are ready, and why the others are not."""

    case: AttentionCase
    meter: Meter
    journal: Journal
    entrants: dict[str, Entrant] = field(default_factory=dict)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)

    def enter(self, peer: Peer, oracle: Oracle, arranged: Arranged, deadline: float) -> None:
        """Prepare a peer and check its result; a peer that breaks must not take the others' numbers with it."""
        crash, absence = self.journal.crash_of(self.case.name, peer.name), peer.absence()
        try:
            if crash is not None:
                self.missing[peer.name] = ("failed", crash)
                return
            if absence is not None:
                raise Skip(absence)
            if time.perf_counter() > deadline:
                raise Skip("the time for all timings was over")
            if peer.slow and not self.case.all_peers:
                raise Skip("takes long to prepare, and is in the cases for all peers only")
            self.journal.mark(self.case.name, peer.name)
            entrant = Entrant.of(peer, self.case, arranged)
            entrant.check(oracle, self.meter)
        except Skip as why:
            self.missing[peer.name] = ("skipped", str(why))
        except Exception as error:
            self.missing[peer.name] = ("failed", one_line(error))
        else:
            self.entrants[peer.name] = entrant
            return
        still_there(self.meter, self.journal, self.case.name, peer.name, self.missing[peer.name][1])
        self.meter.tidy()

    def arm(self, name: str) -> tuple[Armed, Row] | None:
        """Make an entrant ready to be timed, and measure what is not its time; None, with a reason, when that breaks."""
        entrant = self.entrants[name]
        try:
            self.meter.begin(entrant.start)
            measured = {"peak_bytes": self.meter.peak_bytes(entrant.run), "host_s": self.meter.host_seconds(entrant.run)}
            return self.meter.arm(entrant.run, entrant.start), measured
        except Exception as error:
            self.missing[name] = ("failed", one_line(error))
        still_there(self.meter, self.journal, self.case.name, name, self.missing[name][1])
        return None


def run_case(
    case: AttentionCase,
    peers: Sequence[Peer],
    effort: Effort,
    seed: int = 0,
    *,
    meter: Meter | None = None,
    journal: Journal | None = None,
    deadline: float = float("inf"),
) -> list[Row]:
    """One row per peer: a time behind a passed check, or the reason why there is none.

    Args:
        deadline: no peer begins after it, in seconds of ``time.perf_counter``.
    """
    meter, journal = meter or Meter(), journal or Journal()
    inputs = Inputs.of(case, seed, meter.device)
    oracle, arranged, taking_part = Oracle(case, inputs), Arranged(case, inputs), Field(case, meter, journal)
    for peer in peers:
        taking_part.enter(peer, oracle, arranged, deadline)
    del oracle
    armed: dict[str, Armed] = {}
    measured: dict[str, Row] = {}
    for name in taking_part.entrants:
        journal.mark(case.name, name)
        ready = taking_part.arm(name)
        if ready is not None:
            armed[name], measured[name] = ready
    journal.mark(case.name, "")
    calls = {name: ready.call for name, ready in armed.items()}
    rounds, least, budget = effort.rounds, effort.min_rounds, effort.budget_s
    timings = time_in_turn(calls, rounds=rounds, min_rounds=least, budget_s=budget, measure=meter.seconds)
    rows: list[Row] = []
    for peer in peers:
        facts: Row = {**case.facts(), "peer": peer.name}
        if peer.name in taking_part.missing:
            status, why = taking_part.missing[peer.name]
            rows.append({**facts, "status": status, "why": why})
            continue
        entrant = taking_part.entrants[peer.name]
        numbers = numbers_of(entrant, timings[peer.name], armed[peer.name])
        rows.append({**facts, "status": "ok", **numbers, **measured[peer.name], **timings[peer.name].facts()})
    return compared(rows)


def numbers_of(entrant: Entrant, timing: Timing, armed: Armed) -> Row:
    """What is worked out from a time. compile_s is what the first call took beyond the median: compilation, or a plan."""
    case, prepared = entrant.case, entrant.prepared
    notes = [note for note in (prepared.facts.get("note"), armed.note) if note]
    found = {
        "dense": entrant.dense,
        "pairs": prepared.pairs,
        "density": prepared.pairs / case.pairs_dense,
        "executed_density": None if prepared.executed is None else prepared.executed / case.pairs_dense,
        "metadata_s": prepared.metadata_s,
        "metadata_bytes": prepared.metadata_bytes,
        "first_s": entrant.first_s,
        "compile_s": max(0.0, entrant.first_s - timing.median_s),
        "effective_gflops": case.flops(prepared.pairs) / timing.median_s / 1e9,
        "error": entrant.error.error,
        "error_bound": entrant.error.bound,
        "timed_by": armed.how,
        **prepared.facts,
    }
    return {**found, "note": "; ".join(notes)} if notes else found


def run_layout_case(case: LayoutCase, rounds: int = 3) -> Row:
    """Seconds and bytes of building a layout."""
    facts = {**case.facts(), "peer": "s2attn"}

    def build() -> Any:
        return build_layout(case.pattern, case.heads, seqlen_q=case.seqlen, block=case.block)

    try:
        timing = time_in_turn({"build": build}, rounds=rounds, min_rounds=1)["build"]
        layout = build()
    except Exception as error:
        return {**facts, "status": "failed", "why": one_line(error)}
    pairs, dense = int(layout.pairs.sum()), layout.heads * dense_pairs(layout)
    facts.update(status="ok", density=pairs / dense, entries=layout.rows.entries, bytes=layout.nbytes)
    return {**facts, "bytes_per_entry": layout.nbytes / layout.rows.entries, "peak_bytes": peak_bytes(build), **timing.facts()}


def run_suite(
    name: str,
    cases: Sequence[AnyCase],
    *,
    peers: Sequence[str | Peer] = CPU_PEERS,
    effort: Effort | None = None,
    seed: int = 0,
    limit_s: float = float("inf"),
    note: Note | None = None,
    device: str = "cpu",
    journal: Journal | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Record:
    """Run ``cases`` and return the record: what it ran on, and a row per case and peer.

    Args:
        peers: names, or peers that are made already.
        limit_s: once so many seconds have passed, the cases that are left are skipped, and say so.
        note: called with the name of each case before it begins.
        device: ``"cpu"`` or ``"cuda"``.
        journal: takes the rows of each case as it ends, and knows those of earlier runs.
        facts: what it ran on; asked for when left out.
    """
    made = [one for peer in peers for one in ([peer] if isinstance(peer, Peer) else make_peers([peer], device))]
    began, journal, meter = time.perf_counter(), journal or Journal(), meter_for(device)
    host = dict(host_facts(device) if facts is None else facts)
    record: Record = {"schema": SCHEMA, "suite": name, "host": host, "device": device, "seed": seed, "complete": False, "seconds": 0.0}
    deadline = began + limit_s
    with compiling_anew(), what_is_there_stays():
        for case in cases:
            if journal.has(case.name):
                continue
            if note is not None:
                note(case.name)
            if time.perf_counter() > deadline:
                names = names_in(case, made, device)
                why = f"the {limit_s:.0f} seconds for all timings were over"
                rows = [{**case.facts(), "peer": peer, "status": "skipped", "why": why} for peer in names]
            elif isinstance(case, LayoutCase):
                rows = [run_layout_case(case)]
            elif isinstance(case, AttentionCase):
                rows = run_case(case, made, effort or Effort(), seed, meter=meter, journal=journal, deadline=deadline)
            else:
                run, backend = OTHERS[type(case)][0], next((peer.backend for peer in made if isinstance(peer, S2Attn)), None)
                rows = run(case, effort or Effort(), seed, backend=backend, meter=meter, journal=journal, deadline=deadline)
            record["seconds"] = time.perf_counter() - began
            journal.add(rows, record)
            torch._dynamo.reset()
            meter.tidy()
    return journal.write({**record, "complete": True, "seconds": time.perf_counter() - began})


def names_in(case: AnyCase, peers: Sequence[Peer], device: str) -> list[str]:
    """Who has a row in a case."""
    if isinstance(case, LayoutCase):
        return ["s2attn"]
    return [peer.name for peer in peers] if isinstance(case, AttentionCase) else OTHERS[type(case)][1](case, device)


@contextmanager
def what_is_there_stays() -> Iterator[None]:
    """Keep the garbage collector from walking through all of torch again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def compiling_anew() -> Iterator[None]:
    """Let torch.compile find nothing that an earlier run has left on disk, so that its seconds are those of a new machine.

    Compiled backward passes keep their buffers, so that one can be timed again and again behind one forward pass.
    """
    from torch._functorch import config as autograd

    known = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    keep = autograd.patch(donated_buffer=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, torch._dynamo.config.patch(recompile_limit=64), keep:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if known is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = known
