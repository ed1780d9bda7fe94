"""Partial results merge: the same numbers as in one piece, in any order, with gradients."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import ByRange, Dense, Sink, Window, merge

PARTS = [ByRange([(0, 20, Dense())]), ByRange([(20, 50, Dense())]), ByRange([(50, None, Dense())])]


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2, 80, h, 8, dtype=dtype, requires_grad=True) for h in (4, 2, 2)]


def pieces(x, patterns):
    return [s2attn.attention(*x, pattern, return_lse=True) for pattern in patterns]


def test_pieces_make_the_whole_with_gradients():
    x = tensors()
    whole = s2attn.attention(*x, Dense(), return_lse=True)
    merged = merge(pieces(x, PARTS))
    cotangents = [torch.randn_like(t) for t in whole]
    torch.testing.assert_close(merged, whole)
    for a, b in zip(torch.autograd.grad(merged, x, cotangents), torch.autograd.grad(whole, x, cotangents), strict=True):
        torch.testing.assert_close(a, b)


def test_associative_commutative_with_an_identity():
    a, b, c = pieces(tensors(), PARTS)
    identity = (torch.full_like(a[0], torch.nan), torch.full_like(a[1], -torch.inf))
    whole = merge([a, b, c])
    for other in (
        merge([merge([a, b]), c]),
        merge([a, merge([b, c])]),
        merge([c, a, b]),
        merge([identity, a, b, c]),
        merge([merge([a, b, c])]),
    ):
        torch.testing.assert_close(other, whole)
    nothing = merge([(torch.zeros_like(a[0]), identity[1]), identity])
    assert not nothing[0].any() and bool((nothing[1] == -torch.inf).all())


def test_gradients_stay_finite_where_nothing_was_seen():
    x = tensors()
    empty, some = (
        s2attn.attention(*x, ByRange([(60, None, Dense())]), return_lse=True),
        s2attn.attention(*x, Window(5) & Sink(30), return_lse=True),
    )
    out, lse = merge([empty, some])
    loss = out.sum() + torch.where(torch.isfinite(lse), lse, torch.zeros_like(lse)).sum()
    for grad in torch.autograd.grad(loss, x):
        assert bool(torch.isfinite(grad).all())


def test_large_lse_does_not_overflow():
    out = torch.randn(1, 3, 1, 4)
    merged, lse = merge([(out, torch.full((1, 1, 3), 3e4)), (out, torch.full((1, 1, 3), -3e4))])
    torch.testing.assert_close(merged, out)
    assert bool((lse == 3e4).all())


def test_packed_and_low_precision():
    torch.manual_seed(0)
    out, lse = torch.randn(9, 2, 4, dtype=torch.bfloat16), torch.randn(2, 9)
    merged, total = merge([(out, lse), (out, lse)])
    assert merged.dtype == torch.bfloat16 and total.dtype == torch.float32
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(total, lse + torch.log(torch.tensor(2.0)))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], ValueError, r"parts must be a non-empty list of \(out, lse\); got \[\]"),
        ([(torch.zeros(1, 2, 3, 4),)], TypeError, "parts must hold pairs of tensors"),
        ([(torch.zeros(2, 3), torch.zeros(2))], ValueError, r"out must have shape .*; got \(2, 3\)"),
        (
            [(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))],
            ValueError,
            r"lse must have shape \(1, 3, 2\) beside out \(1, 2, 3, 4\); got \(1, 2, 3\)",
        ),
        (
            [(torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)), (torch.zeros(1, 5, 3, 4), torch.zeros(1, 3, 5))],
            ValueError,
            "out must have shape .* the same in all parts",
        ),
    ],
)
def test_bad_parts(parts, error, message):
    with pytest.raises(error, match=message):
        merge(parts)
