"""NaN, infinity and huge finite numbers, for every backend: they reach only what sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from s2attn.backends import Backend
from s2attn.layout import Layout
from tests.support.problems import make_problem, random_problem, run

pytestmark = [
    # The interpreter turns arrays of one element into scalars, which NumPy announces to refuse one
    # day; and it says when numbers overflow or are invalid.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
SCORINGS = {"plain": {}, "both": {"softcap": 0.8, "sinks": torch.tensor([3.0, -torch.inf])}}
HUGE = 3e38


def by_query(x: Tensor) -> Tensor:
    """``(B, H, T)`` as ``(B, T, H)``."""
    return x.transpose(1, 2)


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, atol=1e-5, rtol=1e-5)


def check_masked_keys(backend: Backend, value: float, scoring: str) -> None:
    """Bad numbers in keys and values change nothing for the queries that do not see them."""
    mask = torch.ones(2, 54, 54, dtype=torch.bool).tril().triu(-35)
    mask[..., 30:] &= torch.rand(2, 54, 24) < 0.6
    layout = Layout.from_dense(mask, block=16)
    p = make_problem(layout, mask, heads=2, kv_heads=1, width=16, **SCORINGS[scoring])
    p, bad_keys, bad_values = p.to(torch.float32), [46], [48, 53]
    clean = run(backend, p)
    k, v = p.k.clone(), p.v.clone()
    k[:, bad_keys, :, 3], v[:, bad_values] = value, value
    got = run(backend, replace(p, k=k, v=v))
    seen = p.mask[..., bad_keys + bad_values].any(-1)  # (H, T)
    unseen = ~seen.t()[None]
    assert unseen.any() and not unseen.all()
    assert close(got.out[unseen], clean.out[unseen])
    assert close(by_query(got.lse)[unseen], by_query(clean.lse)[unseen])
    assert close(got.dq[unseen], clean.dq[unseen])
    # Gradients of keys that no affected query sees.
    apart = ~(p.mask & seen[..., None]).any((0, 1))
    assert apart.any()
    assert close(got.dk[:, apart], clean.dk[:, apart]) and close(got.dv[:, apart], clean.dv[:, apart])
    if value != HUGE:
        sees_value = p.mask[..., bad_values].any(-1).t()[None]
        assert not got.out[sees_value].isfinite().all(-1).any()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_huge_numbers_in_masked_keys_change_nothing(backend: Backend, scoring: str) -> None:
    """Not from other blocks, and not from a query's own partial blocks; forward and backward."""
    check_masked_keys(backend, HUGE, scoring)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_masked_keys_never_leak(masking_backend: Backend, value: float, scoring: str) -> None:
    """Neither do NaN and infinity, except in the tiles of Triton's attention kernels."""
    check_masked_keys(masking_backend, value, scoring)


def test_later_keys_of_huge_numbers(backend_and_dtype: tuple[Backend, torch.dtype]) -> None:
    """Unused slots behind the queries hold what memory held before: their products may be +inf."""
    backend, dtype = backend_and_dtype
    mask = torch.ones(1, 100, 100, dtype=torch.bool).tril()
    p = make_problem(Layout.from_dense(mask, block=64), mask, heads=2, kv_heads=1, width=16).to(dtype)
    clean = run(backend, p)
    k, v = p.k.clone(), p.v.clone()
    k[:, 70:], v[:, 70:] = torch.finfo(dtype).max, torch.finfo(dtype).max
    got = run(backend, replace(p, k=k, v=v))
    for name in ("out", "dq"):
        assert torch.equal(getattr(got, name)[:, :70], getattr(clean, name)[:, :70]), name
    assert torch.equal(got.lse[..., :70], clean.lse[..., :70])


@pytest.mark.parametrize("size", [1e29, 1e31, 1e36])
def test_logits_that_are_all_far_below_zero(backend: Backend, size: float) -> None:
    """They are still seen: the row is not an empty one."""
    mask = torch.ones(1, 40, 70, dtype=torch.bool).tril(30)
    p = make_problem(Layout.from_dense(mask, block=32), mask, heads=2, kv_heads=1, width=16)
    p = p.to(torch.float32)
    k = -size * (1 + 0.01 * torch.arange(70.0))[None, :, None, None].expand_as(p.k)
    got = run(backend, replace(p, q=torch.ones_like(p.q), k=k))
    # The first key has the largest logit, by so much that it has all the weight.
    torch.testing.assert_close(got.out, p.v[:, :1].expand_as(got.out))
    torch.testing.assert_close(got.lse, torch.full_like(got.lse, -4 * size), atol=0.0, rtol=1e-6)
    assert all(getattr(got, name).isfinite().all() for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("softcap", [1e-30, 1e30])
def test_the_smallest_and_the_largest_softcap(backend: Backend, softcap: float) -> None:
    """With the one all seen keys weigh the same, with the other the cap changes nothing."""
    p = random_problem(2, 1, 1, 40, 40, 32, causal=True, width=16).to(torch.float32)
    got = run(backend, replace(p, softcap=softcap))
    if softcap > 1:
        expected = run(backend, p)
    else:
        expected = run(backend, replace(p, q=torch.zeros_like(p.q)))
        assert not got.dq.abs().max() > 1e-20
    for name in ("out", "lse", "dv") if softcap < 1 else ("out", "lse", "dq", "dk", "dv"):
        assert close(getattr(got, name), getattr(expected, name)), name


def test_a_sink_of_infinity_takes_all_the_weight(backend: Backend) -> None:
    sinks = torch.tensor([torch.inf, 0.5, torch.inf, -torch.inf])
    p = random_problem(4, 2, 2, 50, 40, 32, causal=True, width=16).to(torch.float32)
    got = run(backend, replace(p, sinks=sinks))
    assert not got.out[:, :, ::2].any() and torch.all(got.lse[:, ::2] == torch.inf)
    assert not got.dq[:, :, ::2].any()
    finite = run(backend, replace(p, sinks=torch.tensor([-torch.inf, 0.5, -torch.inf, -torch.inf])))
    for name in ("out", "dq"):
        assert close(getattr(got, name)[:, :, 1::2], getattr(finite, name)[:, :, 1::2]), name
    assert got.dk.isfinite().all() and got.dv.isfinite().all()
    # The gradient of the loss ``lse * dlse`` of a head whose lse is its sink.
    assert close(got.dsinks[::2], p.dlse[:, ::2].sum((0, 2)))


def test_the_gradient_of_the_lse_of_an_empty_row_is_not_used(backend: Backend) -> None:
    p = random_problem(2, 1, 1, 60, 40, 32, causal=True, width=16).to(torch.float32)
    empty = ~p.mask.any(-1)[None]
    assert empty.any()
    expected, got = run(backend, p), run(backend, replace(p, dlse=p.dlse.masked_fill(empty, torch.nan)))
    for name in ("dq", "dk", "dv"):
        assert close(getattr(got, name), getattr(expected, name)), name
    assert not got.dq.transpose(1, 2)[empty].any()


def test_a_row_of_nan_has_an_lse_of_nan(backend: Backend) -> None:
    """It is not taken for a row that sees nothing."""
    p = random_problem(2, 2, 2, 50, 50, 32, causal=True, width=16).to(torch.float32)
    k = p.k.clone()
    k[:, 40] = torch.nan
    out, lse = backend.forward(p.q, k, p.v, p.layout, p.scoring)
    seen = p.mask[..., 40][None]
    assert torch.equal(lse.isnan(), seen) and torch.equal(out.isnan().any(-1), by_query(seen))
