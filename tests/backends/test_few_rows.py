"""A few query rows over long lists on a CPU: pieces, fill-up rows, masks, dtypes, and bits that depend on nothing else."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Dense, Local, Sink, Stride, Window
from s2attn.testing.masks import dense_mask
from s2attn.testing.oracle import assert_close, eager, oracle

S2 = Local(4) | Stride(8)


def random_call(tokens: int, keys: int, heads: int, kv_heads: int, width: int = 16, v_width: int = 24, dtype=torch.float32):
    q = torch.randn(2, tokens, heads, width)
    k, v = torch.randn(2, keys, kv_heads, width), torch.randn(2, keys, kv_heads, v_width)
    return tuple(x.to(dtype) for x in (q, k, v))


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (12, 1)], ids=lambda heads: f"{heads[0]} over {heads[1]}")
@pytest.mark.parametrize("pattern", [Dense(), S2, Sink(70) | Window(130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_long_lists_are_cut_into_pieces_and_joined(heads, pattern, dtype) -> None:
    q, k, v = random_call(1, 20_001, *heads, dtype=dtype)
    sinks, how = torch.randn(heads[0]), {"softcap": 9.0, "return_lse": True, "backend": "torch"}
    out, lse = s2attn.attention(q, k, v, pattern, sinks=sinks, **how)
    mask = dense_mask(pattern, *heads, 1, 20_001)
    (exact, exact_lse), (plain, plain_lse) = (f(q, k, v, mask, softcap=9.0, sinks=sinks) for f in (oracle, eager))
    assert_close("out", out, plain, exact)
    assert_close("lse", lse, plain_lse.float(), exact_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_depend_on_the_item_alone(dtype) -> None:
    """Not on threads, and not on the batch, whatever the number of rows."""
    for heads in (2, 6, 10, 14):
        q, k, v = random_call(1, 9_000, heads, 2, width=64, v_width=64, dtype=dtype)
        several, before = [], torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                several.append(s2attn.attention(q, k, v, Dense(), return_lse=True, backend="torch"))
        finally:
            torch.set_num_threads(before)
        out, lse = several[0]
        assert all(torch.equal(out, other) and torch.equal(lse, other_lse) for other, other_lse in several[1:])
        for i in range(2):
            one, one_lse = s2attn.attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], Dense(), return_lse=True, backend="torch")
            assert torch.equal(one[0], out[i]) and torch.equal(one_lse[0], lse[i])


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -torch.inf])], ids=["no sinks", "sinks"])
def test_rows_that_see_nothing(sinks) -> None:
    """Of positions 8 to 11 only the first sees one of the first four keys among its last six."""
    q, k, v = random_call(4, 12, 2, 2)
    out, lse = s2attn.attention(q, k, v, Sink(4) & Window(6), sinks=sinks, return_lse=True, backend="torch")
    floor = torch.full((2,), -torch.inf) if sinks is None else sinks
    assert bool((out[:, 1:] == 0).all()) and bool(out[:, 0].any(-1).all())
    assert torch.allclose(lse[..., 1:], floor[:, None].expand(2, 3)) and bool(lse[..., 0].isfinite().all())


def test_a_key_of_nan_reaches_the_rows_that_see_it_alone() -> None:
    q, k, v = random_call(2, 300, 4, 2)
    k[0, 297, 1] = torch.nan
    for window, seen in ((1, []), (2, [0]), (3, [0, 1])):
        out = s2attn.attention(q, k, v, Window(window), backend="torch")
        expected = torch.zeros(2, 2, 4, dtype=torch.bool)
        expected[0, seen, 2:] = True
        assert torch.equal(out.isnan().any(-1), expected)


def test_widths_that_are_no_multiple_of_eight() -> None:
    q, k, v = random_call(1, 500, 4, 2, width=20)
    exact, plain = (f(q, k, v, dense_mask(S2, 4, 2, 1, 500))[0] for f in (oracle, eager))
    assert_close("out", s2attn.attention(q, k, v, S2, backend="torch"), plain, exact)
