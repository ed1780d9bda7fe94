"""The usual case alone, before all others: when this fails, nothing else has to be looked at."""

from __future__ import annotations

from s2attn import Local, Stride, build_layout
from tests.support import dense_mask
from tests.support.problems import check_backend, make_problem

PATTERN = Local(4) | Stride(4)


def test_the_usual_case(dtype, device, sized, triton_backend, poisoned_empty):
    n, width = sized(1024, 100), sized(128, 32)
    layout = build_layout(PATTERN, 8, 2, n)
    problem = make_problem(layout, dense_mask(PATTERN, 8, 2, n, n), heads=8, kv_heads=2, batch=sized(2, 1), width=width)
    check_backend(triton_backend, problem.on(device), dtype)
