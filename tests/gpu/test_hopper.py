"""The Gluon kernels for Hopper: that the device computes what the source says, under every load."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2attn import Dense, Local, Pattern, Sink, Stride, Window, build_layout
from s2attn.backends.triton.hopper import HopperWay
from s2attn.backends.triton.hopper_backward import HopperColumns
from tests.support import dense_mask
from tests.support.problems import check_backend, make_problem, run

# pattern, length on a GPU, query heads, KV heads, D, DV, block, causal
CASES: dict[str, tuple[Pattern, int, int, int, int, int, int, bool]] = {
    "two heads stacked": (Local(2) | Stride(3), 1500, 4, 2, 128, 128, 64, True),
    "two heads stacked, 64 wide": (Local(2) | Stride(3), 1500, 4, 2, 64, 64, 64, True),
    "two rows paired": (Local(2) | Stride(3), 1330, 2, 2, 128, 128, 64, True),
    "two rows paired, 64 wide": (Window(100) | Sink(70), 1330, 3, 3, 64, 64, 64, True),
    "block 128": (Window(300) | Sink(5), 1280, 2, 1, 128, 64, 128, True),
    "block 256": (Window(90), 1270, 1, 1, 64, 128, 256, True),
    "dense, not causal": (Dense(), 900, 4, 1, 128, 128, 64, False),
    "many more items than programs": (Sink(64) | Window(256), 9000, 4, 1, 64, 64, 64, True),
}


def forms(backend, layout) -> dict[str, bool]:
    """Which kernels were Hopper's."""
    return {way.op: isinstance(way.special, (HopperWay, HopperColumns)) for way in backend.ways(layout)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (20.0, True)], ids=["plain", "soft-cap and sinks"])
def test_agrees_with_the_oracle(name, softcap, sinks, dtype, device, sized, hopper, poisoned_empty):
    pattern, n, heads, kv_heads, dim, dim_v, block, causal = CASES[name]
    n, dim, dim_v = sized(n, 140), sized(dim, 64), sized(dim_v, 64)
    layout = build_layout(pattern, heads, kv_heads, n, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, n, causal=causal)
    scoring = {"softcap": softcap, "sinks": torch.randn(heads) if sinks else None}
    p = make_problem(layout, mask, heads=heads, kv_heads=kv_heads, batch=sized(2, 1), width=dim, v_width=dim_v, **scoring).on(device)
    check_backend(hopper, p, dtype)
    assert forms(hopper, p.layout) == dict.fromkeys(("forward", "dq", "dkv"), dtype != torch.float32)


def test_the_same_bits_every_time(usual, device, sized, hopper):
    n, pattern = sized(8192, 140), Sink(64) | Window(sized(256, 20))
    layout = build_layout(pattern, 4, 2, n)
    p = make_problem(layout, dense_mask(pattern, 4, 2, n, n), heads=4, kv_heads=2, width=64).on(device).to(usual)
    first = run(hopper, p)
    for _ in range(sized(100, 1)):
        again = run(hopper, p)
        assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("out", "lse", "dq", "dk", "dv"))


@pytest.mark.parametrize("heads", [1, 2])
def test_a_packed_sequence_reads_nothing_of_the_next(heads, usual, device, sized, hopper):
    pattern, lengths = Local(2) | Stride(2), sized([0, 1000, 0, 75, 640, 1901], [0, 100, 0, 30])
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total, end = int(cu[-1]), lengths[1]
    layout = build_layout(pattern, heads, 1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    mask = torch.zeros(heads, total, total, dtype=torch.bool)
    for lo, n in zip(cu.tolist(), lengths, strict=False):
        mask[:, lo : lo + n, lo : lo + n] = dense_mask(pattern, heads, 1, n, n) if n else False
    p = make_problem(layout, mask, heads=heads, kv_heads=1, width=64).on(device).to(usual)
    once = run(hopper, p)
    spoilt = replace(p, **{name: getattr(p, name).clone() for name in ("q", "k", "v", "dout")})
    for x in (spoilt.q, spoilt.k, spoilt.v, spoilt.dout):
        x[:, end:] = float("nan")
    again = run(hopper, spoilt)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(again, name)[:, :end], getattr(once, name)[:, :end]), name
    assert torch.equal(again.lse[..., :end], once.lse[..., :end])
    assert forms(hopper, p.layout) == dict.fromkeys(("forward", "dq", "dkv"), True)
