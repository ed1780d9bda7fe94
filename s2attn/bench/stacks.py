"""The suites `train` and `prefill`: a layer stack with a recipe against the same stack with dense attention, in turn, in one run.

Prefill over pages is one more way to attend in `prefill` and no suite of its own: its time says something only beside the contiguous stack,
with the same weights, the same chunks, and in the same turns.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2attn.bench.cases import AttentionCase
from s2attn.bench.clock import Call, Meter
from s2attn.bench.compare import Error, Inputs, Oracle, sample_rows, worst_of
from s2attn.bench.journal import Journal, Row
from s2attn.bench.paged import unchecked
from s2attn.bench.peers import sdpa_context
from s2attn.bench.rows import Effort, compared, refuse_wrong
from s2attn.bench.stack import Contiguous, Stack, StackCase, Step
from s2attn.bench.turns import Ready, Turns, error_facts
from s2attn.layout import HeadRange, Layout, build_layout, layout_heads
from s2attn.ops import attention
from s2attn.ops.decode import decode
from s2attn.ops.store import store_kv
from s2attn.patterns import Dense, Head, Local, Pattern, Recipe, Stride

OURS, PAGED, FLASH, CUDNN, SDPA = "s2attn", "s2attn-paged", "flash", "cudnn", "sdpa"
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
        StackCase("prefill 8B, 32k, chunks of 2k", "prefill", Recipe(narrow, dense_every=8), 32768, **grouped, chunk=2048),
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

    def open(self, cache: Tensor) -> Step:
        """A way to take the tokens of new sequences chunk by chunk; ``cache`` is as in `Contiguous`, and need not be used."""
        return Contiguous(cache, self.attend)


class Ours(StackPeer):
    """The recipe through this library; every layer's and chunk's layout is built once, before anything is timed."""

    dense = False

    def __init__(self, case: StackCase, device: str, backend: str | None):
        super().__init__(OURS)
        self.case, self.backend = case, backend or ("triton" if device == "cuda" else "torch")
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


class PagedStack(Ours):
    """The recipe through `s2attn.decode` over pages in random order, into which every chunk is stored first."""

    def __init__(self, case: StackCase, device: str, backend: str | None, seed: int = 0):
        super().__init__(case, device, backend)
        self.name = PAGED
        count = -(-case.seqlen // case.block)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        self.table = order.int()[None].to(device)
        self.slots = (order[:, None] * case.block + torch.arange(case.block)).flatten()[: case.seqlen].to(device)
        self.lengths = {end: torch.tensor([end], dtype=torch.int32, device=device) for _, end in case.chunks}
        shape = (case.layers, 2, count, case.block, case.kv_heads, case.head_dim)
        self.pages = torch.zeros(shape, dtype=getattr(torch, case.dtype), device=device)
        self.facts = {**self.facts, "page_size": case.block}

    def open(self, cache: Tensor) -> Step:
        return self.step

    def step(self, layer: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end, (k_pages, v_pages) = start + k.shape[1], self.pages[layer]
        store_kv(k[0], v[0], k_pages, v_pages, self.slots[start:end], **unchecked(store_kv))
        where: dict[str, Any] = {"block_table": self.table, "seq_lens": self.lengths[end], "layer": layer, "backend": self.backend}
        return decode(q, k_pages, v_pages, self.pattern(layer), **where, **unchecked(decode))


class DenseStack(StackPeer):
    """torch's dense attention in every layer, forced to one kind or chosen by torch."""

    def __init__(self, name: str, grouped: bool):
        super().__init__(name)
        self.grouped, self.kind = grouped, KINDS[name]

    def pattern(self, layer: int) -> Pattern:
        return Dense()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        more: dict[str, Any] = {"is_causal": q.shape[2] > 1}
        if 1 < q.shape[2] != k.shape[2]:
            from torch.nn.attention.bias import causal_lower_right

            more = {"attn_mask": causal_lower_right(q.shape[2], k.shape[2])}
        with sdpa_context(self.kind):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped, **more).transpose(1, 2)


class Measuring:
    """One case on one device: the stack, its inputs, and the ways to attend."""

    def __init__(self, case: StackCase, meter: Meter, seed: int, backend: str | None):
        self.case, self.meter, self.seed, self.backend = case, meter, seed, backend
        device, dtype = meter.device, getattr(torch, case.dtype)
        self.stack = Stack(case, device, seed)
        generator = torch.Generator(device).manual_seed(seed)
        shape = (1, case.seqlen, case.width)
        self.x, self.dout = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
        shape = (case.layers, 2, 1, case.seqlen, case.kv_heads, case.head_dim)
        self.cache = torch.empty(shape, device=device, dtype=dtype) if case.op == "prefill" else self.x.new_empty(0)

    def peer(self, name: str) -> StackPeer:
        case, device = self.case, self.meter.device
        if name == OURS:
            return Ours(case, device, self.backend)
        return PagedStack(case, device, self.backend, self.seed) if name == PAGED else DenseStack(name, case.heads != case.kv_heads)

    def call(self, peer: StackPeer) -> Call:
        if self.case.op == "train":
            return lambda: self.stack.train_step(self.x, self.dout, peer.attend)
        step = peer.open(self.cache)
        return lambda: self.stack.prefill(self.x, step)

    def ready(self, name: str) -> Ready:
        """Prepare a way to attend, check it, and run a step of it, of which the memory is measured."""
        meter, peer = self.meter, self.peer(name)
        error = self.check(peer)
        refuse_wrong(error)
        meter.tidy()
        held, call = meter.allocated_bytes(), self.call(peer)
        rise = meter.peak_bytes(call)
        total = None if held is None or rise is None else held + rise
        facts = {"dense": peer.dense, "density": peer.density, "metadata_s": peer.metadata_s, "peak_bytes": rise, "total_peak_bytes": total}
        speed = lambda timing: {"tokens_per_s": self.case.seqlen / timing.median_s}  # noqa: E731
        return Ready(call, {**facts, **error_facts(error), **peer.facts}, graph=False, worth=speed)

    def check(self, peer: StackPeer) -> Error:
        """The attention of every kind of layer against float64, in a prefill that of the last chunk; the worst of them."""
        return worst_of([self._check_layer(peer, layer) for layer in kinds_of(self.case, peer.pattern)])

    def _check_layer(self, peer: StackPeer, layer: int) -> Error:
        if self.case.op == "prefill":
            return check_chunks(self.case, peer.pattern(layer), layer, peer.open(self.cache), self.meter.device, self.seed)
        one, inputs = check_inputs(self.case, "forward_backward", peer.pattern(layer), self.case.seqlen, self.meter.device, self.seed)
        oracle = Oracle(one, inputs, layer=layer)
        q, k, v = (x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        with torch.enable_grad():
            out = peer.attend(layer, q, k, v)
        return oracle.check(one.pattern, [out.detach(), *torch.autograd.grad(out, (q, k, v), oracle.dout())])


def kinds_of(case: StackCase, pattern: Callable[[int], Pattern]) -> list[int]:
    """The first layer of each kind."""
    return list({pattern(n).at(Head(0, case.heads, case.kv_heads, n)): n for n in reversed(range(case.layers))}.values())


def check_inputs(case: StackCase, op: str, pattern: Pattern, seqlen: int, device: str, seed: int) -> tuple[AttentionCase, Inputs]:
    """One layer's attention as a case of its own, and random inputs for it."""
    one = AttentionCase(case.name, op, pattern, seqlen, case.heads, case.kv_heads, case.head_dim, 1, case.block, case.dtype)
    return one, Inputs.of(one, seed, device)


def check_chunks(case: StackCase, pattern: Pattern, layer: int, step: Step, device: str, seed: int) -> Error:
    """A layer's attention chunk by chunk, and token by token behind the last chunk, against float64 from the last chunk on."""
    chunks = [*case.chunks, *((at, at + 1) for at in range(case.seqlen, case.room))]
    one, inputs = check_inputs(case, "forward", pattern, case.room, device, seed)
    out, (first, _) = torch.zeros_like(inputs.q), case.chunks[-1]
    with torch.no_grad():
        for start, end in chunks:
            out[:, start:end] = step(layer, start, *(x[:, start:end] for x in (inputs.q, inputs.k, inputs.v)))
    return Oracle(one, inputs, sample_rows(case.room, first=first), layer=layer).check(pattern, [out])


def stack_peers(case: StackCase, device: str) -> list[str]:
    """Who takes part: on a graphics card FlashAttention-2, in training cuDNN as well; elsewhere what torch chooses."""
    ours = [OURS, PAGED] if case.op == "prefill" else [OURS]
    if device != "cuda":
        return [*ours, SDPA]
    return [*ours, FLASH, CUDNN] if case.op == "train" else [*ours, FLASH]


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
    meter = meter or Meter()
    turns, run = Turns(case.name, meter, journal or Journal(), deadline), Measuring(case, meter, seed, backend)
    names = stack_peers(case, meter.device)
    for name in names:
        turns.enter(name, lambda name=name: run.ready(name))
    timings = turns.time(replace(effort, min_rounds=min(2, effort.min_rounds)))
    return compared(turns.rows(names, case.facts(), timings))
