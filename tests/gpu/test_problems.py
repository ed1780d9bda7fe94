"""Compiled kernels against the float64 oracle on poisoned outputs, for everything that a layout, a width and a scoring can be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from s2attn import Dense, Local, Pattern, Power, Random, Sink, Stride, Window, build_layout
from tests.support import dense_mask
from tests.support.problems import check_backend, make_problem, random_problem


@dataclass(frozen=True)
class Case:
    """A pattern, lengths of queries and keys on a GPU and in the interpreter, heads, and the block of its layout."""

    pattern: Pattern
    lengths: tuple[int, int]
    tiny: tuple[int, int]
    heads: tuple[int, int]
    block: int
    widths: tuple[int, int] = (64, 64)
    causal: bool = True


CASES = {
    "groups": Case(Local(2) | Stride(3), (777, 777), (130, 130), (4, 2), 64),
    "no groups": Case(Sink(70) | Window(200), (1000, 1000), (100, 100), (4, 4), 64),
    "one KV head": Case(Local(2) | Stride(3), (512, 512), (80, 80), (8, 1), 64, (128, 128)),
    "block 16, four per tile": Case(Local(1, 16) | Stride(3, block=16), (500, 500), (100, 100), (4, 2), 16),
    "block 32, per query head": Case(Local(2, 32) | Stride(3, block=32, heads="query"), (333, 400), (70, 130), (4, 2), 32, (48, 32)),
    "per query head": Case(Local(2) | Stride(3, heads="query"), (700, 700), (130, 130), (4, 2), 64, (128, 128)),
    "block 128, own width of v": Case(Power(block=128) | Sink(5), (900, 900), (200, 200), (2, 1), 128, (64, 128)),
    "block 128, several tiles": Case(Local(2, 128) | Stride(2, block=128), (777, 777), (140, 140), (4, 2), 128, (128, 128)),
    "block 256": Case(Window(300), (1100, 1100), (270, 270), (2, 1), 256),
    "a chunk with a past": Case(Local(2) | Stride(3), (130, 1000), (30, 150), (4, 2), 64, (128, 128)),
    "one query": Case(Local(2) | Stride(3), (1, 777), (1, 70), (4, 2), 64),
    "rows that see nothing": Case(Stride(4, offset=1, block=16), (300, 310), (60, 70), (2, 2), 16, (32, 32)),
    "more queries than keys": Case(Dense(), (300, 120), (90, 40), (2, 1), 32),
    "not causal": Case(Window(30) | Random(1, block=16), (300, 400), (70, 90), (2, 2), 16, (64, 64), False),
    "dense": Case(Dense(), (640, 640), (100, 100), (4, 2), 64, (128, 128)),
}


def problem_of(case, device, sized, **scoring):
    (n, m), (heads, kv_heads) = sized(case.lengths, case.tiny), case.heads
    width, v_width = case.widths if device.type == "cuda" else (min(w, 32) for w in case.widths)
    layout = build_layout(case.pattern, heads, kv_heads, n, m, block=case.block, causal=case.causal)
    mask = dense_mask(case.pattern, heads, kv_heads, n, m, causal=case.causal)
    shape = {"heads": heads, "kv_heads": kv_heads, "batch": sized(2, 1), "width": width, "v_width": v_width}
    return make_problem(layout, mask, **shape, **scoring).on(device)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, dtype, device, sized, triton_backend, poisoned_empty):
    check_backend(triton_backend, problem_of(CASES[name], device, sized), dtype)


@pytest.mark.parametrize("name", ["groups", "block 32, per query head", "rows that see nothing", "block 128, several tiles"])
@pytest.mark.parametrize(("softcap", "sinks"), [(1.5, False), (None, True), (30.0, True)])
def test_soft_cap_and_sinks(name, softcap, sinks, dtype, device, sized, triton_backend, poisoned_empty):
    case = CASES[name]
    problem = problem_of(case, device, sized, softcap=softcap, sinks=torch.randn(case.heads[0]) if sinks else None)
    check_backend(triton_backend, problem, dtype)


@pytest.mark.parametrize("widths", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, (64, 128), (192, 128), (40, 256)], ids=str)
def test_head_widths(widths, dtype, device, sized, triton_backend, poisoned_empty):
    pattern, n = Local(2) | Stride(2), sized(300, 40)
    width, v_width = (widths, widths) if isinstance(widths, int) else widths
    mask = dense_mask(pattern, 2, 1, n, n)
    problem = make_problem(build_layout(pattern, 2, 1, n), mask, heads=2, kv_heads=1, width=width, v_width=v_width)
    check_backend(triton_backend, problem.on(device), dtype)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_any_mask(block, causal, dtype, device, sized, triton_backend, poisoned_empty):
    """Full, partial and absent blocks and rows of nothing, at random, no two heads alike."""
    n, m = sized((600, 650), (60, 70))
    problem = random_problem(4, 2, 4, n, m, block, causal=causal, width=sized(64, 16), batch=sized(2, 1))
    check_backend(triton_backend, problem.on(device), dtype)


@pytest.mark.parametrize("block", [16, 64])
def test_packed_sequences(block, dtype, device, sized, triton_backend, poisoned_empty):
    """Lengths of queries and keys of their own, an empty sequence among them, and one without keys."""
    pattern: Pattern = Local(1, 16) | Stride(2, block=16)
    lengths_q, lengths_k = sized(([400, 0, 75, 9], [500, 0, 75, 0]), ([40, 0, 25, 3], [60, 0, 25, 0]))
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    layout = build_layout(pattern, 4, 2, block=block, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    mask = torch.zeros(4, sum(lengths_q), sum(lengths_k), dtype=torch.bool)
    for at_q, at_k, n, m in zip(cu_q.tolist(), cu_k.tolist(), lengths_q, lengths_k, strict=False):
        if n and m:
            mask[:, at_q : at_q + n, at_k : at_k + m] = dense_mask(pattern, 4, 2, n, m)
    check_backend(triton_backend, make_problem(layout, mask, heads=4, kv_heads=2, width=sized(64, 16)).on(device), dtype)
