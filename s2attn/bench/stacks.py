"""The suites `train` and `prefill`: a layer stack with a recipe against the same stack with dense attention, in turn, in one run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2attn.bench.cases import AttentionCase
from s2attn.bench.clock import Call, Meter, time_in_turn
from s2attn.bench.compare import Error, Inputs, Oracle, sample_rows
from s2attn.bench.journal import Journal, Row
from s2attn.bench.peers import sdpa_context
from s2attn.bench.rows import Effort, compared, one_line, refuse_wrong, still_there
from s2attn.bench.stack import Stack, StackCase
from s2attn.layout import HeadRange, Layout, build_layout, layout_heads
from s2attn.ops import attention
from s2attn.patterns import Dense, Head, Local, Pattern, Recipe, Stride

FLASH, CUDNN, SDPA = "flash", "cudnn", "sdpa"
KINDS = {FLASH: "FLASH_ATTENTION", CUDNN: "CUDNN_ATTENTION", SDPA: None}


def stack_suite(op: str, size: str = "full") -> list[StackCase]:
    """The cases of suite ``op`` (``"train"`` or ``"prefill"``), the most valuable first; tiny ones for a CPU with ``size="tiny"``."""
    if size == "tiny":
        tiny = {"layers": 2, "model_layers": 4, "width": 32, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "block": 16}
        recipe = Recipe(Local(2, 16) | Stride(4, block=16), dense_every=2)
        return [StackCase(f"tiny {op}", op, recipe, 192, **{**tiny, "dtype": "float32", "chunk": 80})]
    small: dict[str, Any] = {"layers": 6, "model_layers": 24, "width": 2048, "hidden": 5504, "heads": 16, "kv_heads": 16}
    seven: dict[str, Any] = {"layers": 8, "model_layers": 32, "width": 4096, "hidden": 11008, "heads": 32, "kv_heads": 32}
    grouped: dict[str, Any] = {**seven, "hidden": 14336, "kv_heads": 8}
    if op == "train":
        six = Recipe(Local(16) | Stride(16), dense_every=6)
        four: dict[str, Any] = {**seven, "layers": 4}
        return [
            StackCase("train 1.3B, 128k", "train", six, 131072, **small),
            StackCase("train 1.3B, 32k", "train", six, 32768, **small),
            StackCase("train 7B, 128k", "train", Recipe(Local(16) | Stride(32), dense_every=4), 131072, **four),
        ]
    wide, narrow = Local(16) | Stride(32), Local(16) | Stride(8)
    return [
        StackCase("prefill 7B, 128k", "prefill", Recipe(wide, dense_every=8), 131072, **seven),
        StackCase("prefill 7B, 128k, no dense layer", "prefill", Recipe(wide), 131072, **seven),
        StackCase("prefill 8B, 128k", "prefill", Recipe(narrow, dense_every=8), 131072, **grouped),
        StackCase("prefill 8B, 32k", "prefill", Recipe(narrow, dense_every=8), 32768, **grouped),
    ]


class StackPeer(ABC):
    """A way to attend in every layer and every chunk of a stack."""

    dense = True
    density = 1.0
    metadata_s = 0.0

    def __init__(self, name: str):
        self.name = name
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `s2attn.bench.stack.Attention`."""

    @abstractmethod
    def pattern(self, layer: int) -> Pattern:
        """What the peer computes in a layer."""


class Ours(StackPeer):
    """The recipe through this library; every layer's and chunk's layout is built once, before anything is timed."""

    dense = False

    def __init__(self, case: StackCase, device: str, backend: str | None):
        super().__init__("s2attn")
        self.case, self.backend = case, backend or ("triton" if device == "cuda" else "portable")
        self.facts = {"backend": self.backend}
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        began = time.perf_counter()
        self._keys = [self._key(layer) for layer in range(case.layers)]
        listed = 0
        for layer in range(case.layers):
            for start, end in case.chunks:
                layout = self._layout(layer, start, end, device)
                listed += int(layout.pairs.sum()) * case.heads // layout.heads
        self.metadata_s = time.perf_counter() - began
        self.density = listed / (case.layers * case.heads * case.seqlen * (case.seqlen + 1) // 2)

    def _layout(self, layer: int, start: int, end: int, device: str) -> Layout:
        case, key = self.case, (self._keys[layer], end - start, end)
        if key not in self._layouts:
            sizes = (case.heads, case.kv_heads, end - start, end)
            self._layouts[key] = build_layout(self.pattern(layer), *sizes, block=case.block, layer=layer, device=device)
            if case.op == "train":
                _ = self._layouts[key].columns
        return self._layouts[key]

    def _key(self, layer: int) -> tuple[Pattern, ...]:
        heads = HeadRange(0, self.case.heads, self.case.heads, self.case.kv_heads)
        return layout_heads(self.pattern(layer), heads, self.case.kv_heads, layer)

    def pattern(self, layer: int) -> Pattern:
        return self.case.recipe.pattern(layer)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self._layouts[self._keys[layer], q.shape[1], k.shape[1]], backend=self.backend)


class DenseStack(StackPeer):
    """torch's dense attention in every layer, forced to one kind or chosen by torch."""

    def __init__(self, name: str, grouped: bool):
        super().__init__(name)
        self.grouped, self.kind = grouped, KINDS[name]

    def pattern(self, layer: int) -> Pattern:
        return Dense()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        more: dict[str, Any] = {"is_causal": True}
        if q.shape[2] != k.shape[2]:
            from torch.nn.attention.bias import causal_lower_right

            more = {"attn_mask": causal_lower_right(q.shape[2], k.shape[2])}
        with sdpa_context(self.kind):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped, **more).transpose(1, 2)


class Measuring:
    """One case on one device: the stack, its inputs, and what was found out about each way to attend."""

    def __init__(self, case: StackCase, meter: Meter, seed: int, backend: str | None):
        self.case, self.meter, self.seed, self.backend = case, meter, seed, backend
        device, dtype = meter.device, getattr(torch, case.dtype)
        self.stack = Stack(case, device, seed)
        generator = torch.Generator(device).manual_seed(seed)
        shape = (1, case.seqlen, case.width)
        self.x, self.dout = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
        shape = (case.layers, 2, 1, case.seqlen, case.kv_heads, case.head_dim)
        self.cache = torch.empty(shape, device=device, dtype=dtype) if case.op == "prefill" else self.x.new_empty(0)
        self.peers: dict[str, StackPeer] = {}
        self.facts: dict[str, Row] = {}

    def call(self, peer: StackPeer) -> Call:
        if self.case.op == "train":
            return lambda: self.stack.train_step(self.x, self.dout, peer.attend)
        return lambda: self.stack.prefill(self.x, self.cache, peer.attend)

    def enter(self, name: str) -> None:
        """Prepare a way to attend, check it, and run a step of it, of which the memory is measured."""
        case, meter = self.case, self.meter
        peer = Ours(case, meter.device, self.backend) if name == "s2attn" else DenseStack(name, case.heads != case.kv_heads)
        error = self.check(peer)
        refuse_wrong(error)
        meter.tidy()
        held = meter.allocated_bytes()
        rise = meter.peak_bytes(self.call(peer))
        total = None if held is None or rise is None else held + rise
        facts = {"dense": peer.dense, "density": peer.density, "metadata_s": peer.metadata_s, "peak_bytes": rise, "total_peak_bytes": total}
        self.facts[name] = {**facts, "error": error.error, "error_bound": error.bound, **peer.facts}
        self.peers[name] = peer

    def check(self, peer: StackPeer) -> Error:
        """The attention of every kind of layer against float64, in a prefill that of the last chunk; the worst of them."""
        case = self.case
        layers = {peer.pattern(layer).at(Head(0, case.heads, case.kv_heads, layer)): layer for layer in reversed(range(case.layers))}
        found = [self._check_layer(peer, layer) for layer in layers.values()]
        return max(found, key=lambda error: error.error / error.bound if error.error == error.error else float("inf"))

    def _check_layer(self, peer: StackPeer, layer: int) -> Error:
        case, (start, end) = self.case, self.case.chunks[-1]
        op = "forward_backward" if case.op == "train" else "forward"
        shape = (case.heads, case.kv_heads, case.head_dim, 1, case.block, case.dtype)
        one = AttentionCase(case.name, op, peer.pattern(layer), end, *shape)
        inputs = Inputs.of(one, self.seed, self.meter.device)
        oracle = Oracle(one, inputs, sample_rows(end, first=start), layer=layer)
        q, k, v = (x.clone().requires_grad_(one.backward) for x in (inputs.q[:, start:end], inputs.k, inputs.v))
        with torch.set_grad_enabled(one.backward):
            out = peer.attend(layer, q, k, v)
        results = [torch.zeros_like(inputs.q)]
        results[0][:, start:end] = out.detach()
        if one.backward:
            results += torch.autograd.grad(out, (q, k, v), oracle.dout())
        return oracle.check(one.pattern, results)


def stack_peers(case: StackCase, device: str) -> list[str]:
    """Who takes part: on a graphics card FlashAttention-2, in training cuDNN as well; elsewhere what torch chooses."""
    if device != "cuda":
        return ["s2attn", SDPA]
    return ["s2attn", FLASH, CUDNN] if case.op == "train" else ["s2attn", FLASH]


def run_stack_case(
    case: StackCase,
    effort: Effort,
    seed: int = 0,
    *,
    backend: str | None = None,
    meter: Meter | None = None,
    journal: Journal | None = None,
    deadline: float = float("inf"),
) -> list[Row]:
    """One row per way to attend: tokens per second and peak memory behind a passed check, or the reason why there are none."""
    meter, journal = meter or Meter(), journal or Journal()
    run, missing = Measuring(case, meter, seed, backend), dict[str, tuple[str, str]]()
    names = stack_peers(case, meter.device)
    for name in names:
        crash = journal.crash_of(case.name, name)
        if crash is not None:
            missing[name] = ("failed", crash)
        elif time.perf_counter() > deadline:
            missing[name] = ("skipped", "the time for all timings was over")
        else:
            journal.mark(case.name, name)
            try:
                run.enter(name)
            except Exception as error:  # one that breaks must not take the others' numbers with it
                missing[name] = ("failed", one_line(error))
            if name in missing:
                still_there(meter, journal, case.name, name, missing[name][1])
                meter.tidy()
    journal.mark(case.name, "")
    calls = {name: run.call(peer) for name, peer in run.peers.items()}
    rounds, least = effort.rounds, min(2, effort.min_rounds)
    timings = time_in_turn(calls, rounds=rounds, min_rounds=least, budget_s=effort.budget_s, measure=meter.seconds)
    rows: list[Row] = []
    for name in names:
        facts: Row = {**case.facts(), "peer": name}
        if name in missing:
            rows.append({**facts, "status": missing[name][0], "why": missing[name][1]})
        else:
            speed = {"tokens_per_s": case.seqlen / timings[name].median_s}
            rows.append({**facts, "status": "ok", **run.facts[name], **speed, **timings[name].facts()})
    return compared(rows)
