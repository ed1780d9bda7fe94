"""Estimates of block mass by the compiled kernels, against float64 and against plain torch."""

from __future__ import annotations

import pytest
import torch

from s2attn.backends import Reduction, get_backend
from s2attn.ops import antidiagonal


def tensors(device, dtype, seqlen_q, seqlen_k, width=128, heads=4, kv_heads=2):
    q, k = (torch.randn(2, n, h, width, device=device).to(dtype) for n, h in ((seqlen_q, heads), (seqlen_k, kv_heads)))
    return 2 * q, k


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("stride", "block"), [(1, 128), (4, 64), (8, 256), (16, 128), (16, 16)])
def test_mass_against_float64(stride, block, causal, dtype, device, sized, poisoned_empty):
    q, k = tensors(device, dtype, *sized((700, 900), (60, 90)), width=sized(128, 16))
    reduction = Reduction(stride, block, causal, q.shape[-1] ** -0.5)
    exact = get_backend("reference").antidiagonal(q, k, reduction)
    got = antidiagonal(q, k, stride=stride, block=block, causal=causal, backend="triton")
    # Inputs are the same numbers and sums are float32, whatever the dtype.
    torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [48, 64, 80, 192, 256])
def test_widths(width, dtype, device, sized):
    q, k = tensors(device, dtype, *sized((300, 300), (40, 40)), width=width)
    reduction = Reduction(8, 32, True, width**-0.5, 5.0)
    exact = get_backend("reference").antidiagonal(q, k, reduction)
    got = antidiagonal(q, k, stride=8, block=32, softcap=5.0, backend="triton")
    torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)


def test_long_calls_come_in_parts_and_repeat_themselves(usual, device, sized, room):
    room(8)
    q, k = tensors(device, usual, *sized((32768, 32768), (300, 300)), width=sized(128, 16))
    runs = [antidiagonal(q, k, stride=8, block=64, backend="triton") for _ in range(2)]
    assert torch.equal(*runs)
    torch.testing.assert_close(runs[0], antidiagonal(q, k, stride=8, block=64, backend="torch"), atol=1e-3, rtol=1e-3)
    groups = runs[0].sum(-1)
    torch.testing.assert_close(groups[..., :-1], torch.full_like(groups[..., :-1], 8.0))
