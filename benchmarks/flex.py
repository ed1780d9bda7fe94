"""torch's FlexAttention as a peer: the same mask, written by hand as its user would, compiled, and on a graphics card tuned."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer import NO_CUDA, Attend, Peer, Prepared, case_layout, listed_pairs
from s2attn.layout import Layout, to_block_mask
from s2attn.patterns import And, Dense, Head, Local, Or, Pattern, PerHead, Power, Random, Shape, Sink, Stride, Window
from s2attn.tuning.cases import AttentionCase
from s2attn.tuning.rows import Skip

DEFAULT_BLOCK = 128  # FlexAttention's own, which its default kernels on graphics cards need
MaskFunction = Callable[[Any, Any, Any, Any], Any]


class Flex(Peer):
    """FlexAttention, compiled, with the same mask.

    On a CPU at the case's block, and its mask is built by a compiled function too: without compilation the mask of 16k tokens and 8 heads
    alone takes 21 GB. On a CUDA device at FlexAttention's own block of 128 or the case's larger one, with its default options, and its
    lists are made from ours, so that their seconds are not those of FlexAttention's own tool.
    """

    name = "flex"

    def prepare(self, case: AttentionCase) -> Prepared:
        if self.device == "cuda":
            return prepared(case, max(DEFAULT_BLOCK, case.block), {}, self.device)
        if case.backward:
            raise Skip("FlexAttention has no backward on CPUs")
        create_block_mask = torch_flex().create_block_mask
        mask = mask_function(case.pattern, case)
        began = time.perf_counter()
        build = create_block_mask if case.seqlen <= 2048 else torch.compile(create_block_mask)
        block_mask = build(mask, None, case.heads, case.seqlen, case.seqlen, device="cpu", BLOCK_SIZE=case.block)
        seconds = time.perf_counter() - began
        pairs, executed = listed_pairs(case, case_layout(case, "cpu"))
        return Prepared(_attend(case, block_mask, {}), True, seconds, _bytes_of(block_mask), case.pattern, pairs, executed)


class FlexTuned(Peer):
    """FlexAttention with the best of a few choices of its documented kernel options and blocks, each timed once on random inputs."""

    name = "flex-tuned"
    slow = True

    def absence(self) -> str | None:
        return None if self.device == "cuda" else NO_CUDA

    def prepare(self, case: AttentionCase) -> Prepared:
        found, reasons = [], []
        for block, options in choices(case):
            try:
                made = prepared(case, block, options, self.device)
                found.append((_seconds(made.attend, case), made))
            except Exception as error:  # a choice that does not fit the device is not the best one
                reasons.append(f"{options}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:120])
        if not found:
            raise Skip("no choice of kernel options works here: " + "; ".join(reasons))
        best = min(found, key=lambda pair: pair[0])[1]
        return replace(best, facts={**best.facts, "choices": len(found), "choices_failed": reasons})


def choices(case: AttentionCase) -> list[tuple[int, dict[str, int]]]:
    """Blocks of the mask and kernel options that are tried: none above the block, since a mask's block must be a multiple of a kernel's."""
    fine, coarse = case.block, max(DEFAULT_BLOCK, case.block)
    if not case.backward:
        sizes = [(fine, 64, 64, 4, 3), (coarse, 128, 64, 8, 3), (coarse, 128, 128, 8, 2), (coarse, 128, 64, 4, 3)]
        fitting = [(block, min(m, block), min(n, block), warps, stages) for block, m, n, warps, stages in sizes]
        return [(block, {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}) for block, m, n, warps, stages in fitting]
    sizes = [
        (fine, 64, 64, 64, 64, 4, 3),
        (coarse, 64, 128, 128, 64, 8, 3),
        (coarse, 64, 64, 64, 64, 4, 3),
        (coarse, 32, 128, 128, 32, 4, 3),
    ]
    names = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
    made = []
    for block, *blocks, warps, stages in sizes:
        options = {name: min(size, block) for name, size in zip(names, blocks, strict=True)}
        forward = {"fwd_BLOCK_M": min(64, block), "fwd_BLOCK_N": min(64, block), "fwd_num_warps": 4, "fwd_num_stages": 3}
        made.append((block, {**options, **forward, "bwd_num_warps": warps, "bwd_num_stages": stages}))
    return made


def prepared(case: AttentionCase, block: int, options: dict[str, int], device: str) -> Prepared:
    """FlexAttention at one block and with some kernel options; its lists come from ours, its token mask is written by hand."""
    began = time.perf_counter()
    layout = case_layout(case, device, block)
    block_mask = mask_from(case, layout)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    facts = {"mask_block": block, "kernel_options": options, "metadata": "lists made by s2attn"}
    pairs, executed = listed_pairs(case, layout)
    return Prepared(_attend(case, block_mask, options), True, seconds, _bytes_of(block_mask), case.pattern, pairs, executed, facts)


def mask_from(case: AttentionCase, layout: Layout) -> Any:
    """A `BlockMask` with the blocks of a layout of the case and the token mask that is written by hand."""
    mask, ours = mask_function(case.pattern, case, str(layout.device)), to_block_mask(layout, case.heads)
    lists = (ours.kv_num_blocks, ours.kv_indices, ours.full_kv_num_blocks, ours.full_kv_indices)
    lengths = (case.seqlen, case.seqlen)
    return torch_flex().BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=layout.block, mask_mod=mask, seq_lengths=lengths)


def torch_flex() -> Any:
    """torch's module; raises `Skip` where it has none."""
    try:
        from torch.nn.attention import flex_attention
    except ImportError:
        raise Skip(f"torch {torch.__version__} has no FlexAttention") from None
    return flex_attention


def _bytes_of(block_mask: Any) -> int:
    return sum(part.numel() * part.element_size() for part in block_mask.as_tuple() if isinstance(part, Tensor))


def _attend(case: AttentionCase, block_mask: Any, options: dict[str, int]) -> Attend:
    kernel, gqa = torch.compile(torch_flex().flex_attention, dynamic=False), case.heads != case.kv_heads
    more = {"kernel_options": options} if options else {}
    return lambda q, k, v: kernel(q, k, v, block_mask=block_mask, enable_gqa=gqa, **more)


def _seconds(attend: Attend, case: AttentionCase) -> float:
    """The second call's seconds on random inputs; the first compiles."""
    from s2attn.tuning.cuda import CudaMeter

    dtype, meter = getattr(torch, case.dtype), CudaMeter()
    shapes = [(case.batch, n, case.seqlen, case.head_dim) for n in (case.heads, case.kv_heads, case.kv_heads)]
    q, k, v = (torch.randn(shape, dtype=dtype, device="cuda", requires_grad=case.backward) for shape in shapes)
    if not case.backward:
        with torch.no_grad():  # as it will be called: another grad mode would compile again
            attend(q, k, v)
            return meter.seconds(lambda: attend(q, k, v))
    out = attend(q, k, v)
    dout = torch.randn_like(out)
    torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    return meter.seconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))


def mask_function(pattern: Pattern, case: AttentionCase, device: str = "cpu") -> MaskFunction:
    """A FlexAttention ``mask_mod(b, h, q, k)`` for the causal form of ``pattern``, written by hand as its user would.

    Raises:
        Skip: for a kind of pattern that has none here.
    """
    inner = _mask(pattern, case, device)
    return lambda b, h, q, k: (k <= q) & inner(b, h, q, k)


def _mask(pattern: Pattern, case: AttentionCase, device: str) -> MaskFunction:
    if isinstance(pattern, (Or, And)):
        return _joined([_mask(part, case, device) for part in pattern.parts], either=isinstance(pattern, Or))
    match pattern:
        case Dense():
            return lambda b, h, q, k: q >= 0
        case Window(n=n):
            return lambda b, h, q, k: q - k < n
        case Sink(n=n):
            return lambda b, h, q, k: k < n
        case Local(n=n, block=size):
            return lambda b, h, q, k: q // size - k // size < n
        case Power(base=2, block=size):
            return lambda b, h, q, k: ((q // size - k // size) & (q // size - k // size - 1)) == 0
        case Stride():
            return _stride_mask(pattern, case)
        case Random():
            return _table_mask(pattern, case, device)
        case PerHead():
            return _per_head_mask(pattern, case, device)
    raise Skip(f"no FlexAttention mask is written for {type(pattern).__name__}")


def _joined(masks: list[MaskFunction], *, either: bool) -> MaskFunction:
    def joined(b: Any, h: Any, q: Any, k: Any) -> Any:
        total = masks[0](b, h, q, k)
        for mask in masks[1:]:
            total = total | mask(b, h, q, k) if either else total & mask(b, h, q, k)
        return total

    return joined


def _stride_mask(pattern: Stride, case: AttentionCase) -> MaskFunction:
    size, stride, shift = pattern.block, pattern.stride, pattern.shift
    if isinstance(pattern.offset, int):
        fixed = pattern.offset + shift
        return lambda b, h, q, k: (k // size + fixed) % stride == 0
    group = case.heads // case.kv_heads if pattern.heads == "kv" else 1
    return lambda b, h, q, k: (k // size + h // group + shift) % stride == 0


def _table_mask(pattern: Random, case: AttentionCase, device: str) -> MaskFunction:
    """Drawn blocks have no formula: they are looked up in a table ``(heads, query blocks, key blocks)``."""
    blocks, shape = torch.arange(-(-case.seqlen // pattern.block)).numpy(), Shape(case.seqlen)
    known: dict[Pattern, Tensor] = {}
    for h in range(case.heads):
        drawn = pattern.at(Head(h, case.heads, case.kv_heads))
        if drawn not in known:
            known[drawn] = torch.from_numpy(drawn.sees(blocks[:, None], blocks[None], shape))
    table = torch.stack([known[pattern.at(Head(h, case.heads, case.kv_heads))] for h in range(case.heads)]).to(device)
    size = pattern.block
    return lambda b, h, q, k: table[h, q // size, k // size]


def _per_head_mask(pattern: PerHead, case: AttentionCase, device: str) -> MaskFunction:
    """Each distinct part, and a table that says which heads it is for."""
    group = case.heads // case.kv_heads if pattern.heads == "kv" else 1
    parts = [dict(pattern.patterns).get(h // group, pattern.default) for h in range(case.heads)]
    masks = []
    for part in dict.fromkeys(parts):
        chosen = torch.tensor([own == part for own in parts], device=device)
        masks.append(_chosen(chosen, _mask(part, case, device)))
    return _joined(masks, either=True)


def _chosen(heads: Tensor, mask: MaskFunction) -> MaskFunction:
    return lambda b, h, q, k: heads[h] & mask(b, h, q, k)
