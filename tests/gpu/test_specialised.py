"""The warp-specialised kernels: that the compiler makes the cut, and that what it cuts computes what the source says."""

from __future__ import annotations

import pytest
import torch

from s2attn import Dense, Local, Pattern, Sink, Stride, Window, build_layout
from tests.support import dense_mask
from tests.support.problems import check_backend, make_problem, run

# pattern, length on a GPU, query heads, KV heads, D, DV, block, causal
CASES: dict[str, tuple[Pattern, int, int, int, int, int, int, bool]] = {
    "two heads stacked": (Local(2) | Stride(3), 1500, 4, 2, 128, 128, 64, True),
    "two heads stacked, 64 wide": (Local(2) | Stride(3), 1500, 4, 2, 64, 64, 64, True),
    "two rows merged": (Local(2) | Stride(3), 1330, 2, 2, 128, 128, 64, True),
    "two rows merged, 64 wide": (Window(100) | Sink(70), 1330, 3, 3, 64, 64, 64, True),
    "block 128": (Window(300) | Sink(5), 1280, 2, 1, 128, 64, 128, True),
    "block 256": (Window(90), 1270, 1, 1, 64, 128, 256, True),
    "dense, not causal": (Dense(), 900, 4, 1, 128, 128, 64, False),
    "a sink that all read": (Sink(64) | Window(256), 9000, 2, 1, 64, 64, 64, True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (20.0, True)], ids=["plain", "soft-cap and sinks"])
def test_agrees_with_the_oracle(name, softcap, sinks, dtype, device, sized, special, poisoned_empty):
    pattern, n, heads, kv_heads, dim, dim_v, block, causal = CASES[name]
    n, dim, dim_v = sized(n, 140), sized(dim, 64), sized(dim_v, 64)
    layout = build_layout(pattern, heads, kv_heads, n, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, n, causal=causal)
    scoring = {"softcap": softcap, "sinks": torch.randn(heads) if sinks else None}
    p = make_problem(layout, mask, heads=heads, kv_heads=kv_heads, batch=sized(2, 1), width=dim, v_width=dim_v, **scoring).on(device)
    check_backend(special, p, dtype)
    ways = {way.op: way.special for way in special.ways(p.layout)}
    cut = dtype != torch.float32 or device.type == "cpu"  # on a GPU only 16-bit numbers are served
    assert (ways["forward"] is not None) == (ways["dq"] is not None) == cut
    assert not any(way.lost for way in ways.values() if way is not None), "the compiler did not specialise the warps"


def test_the_same_bits_every_time(usual, device, sized, special):
    n, pattern = sized(8192, 140), Sink(64) | Window(sized(256, 20))
    layout = build_layout(pattern, 4, 2, n)
    p = make_problem(layout, dense_mask(pattern, 4, 2, n, n), heads=4, kv_heads=2, width=64).on(device).to(usual)
    first = run(special, p)
    for _ in range(sized(20, 1)):
        again = run(special, p)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name
