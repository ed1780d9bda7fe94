"""The kernels that estimate the mass of blocks, in Triton's interpreter, against the dense float64 oracle."""

from __future__ import annotations

import pytest
import torch

from s2attn.backends.base import Reduction
from s2attn.backends.reference import Reference
from s2attn.backends.triton import score
from s2attn.backends.triton.score import ScoreTiles, antidiagonal, choose_score_tiles
from s2attn.backends.triton.tiles import SHARED_MEMORY

TILES = ScoreTiles(32, 32, 16, 4, 1)


def tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, dim=16, dtype=torch.float32):
    return torch.randn(batch, seqlen_q, heads, dim).mul(2).to(dtype), torch.randn(batch, seqlen_k, kv_heads, dim).to(dtype)


def compare(q, k, reduction, tiles=TILES, tolerance=2e-5):
    want = Reference().antidiagonal(q, k, reduction)
    got = antidiagonal(q, k, reduction, tiles)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("stride", "block"), [(1, 16), (16, 16), (8, 128), (2, 256), (1, 64)])
@pytest.mark.parametrize("lengths", [(130, 130), (61, 200), (1, 70), (90, 33)])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_oracle(triton_backend, stride, block, lengths, causal):
    compare(*tensors(1, *lengths, 2, 1), Reduction(stride, block, causal, 0.25))


@pytest.mark.parametrize("dim", [8, 48, 80, 256])
def test_widths(triton_backend, dim):
    compare(*tensors(1, 70, 70, 2, 2, dim), Reduction(8, 32, True, dim**-0.5))


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_batches_groups_strides_and_caps(triton_backend, softcap):
    q, k = tensors(2, 100, 100, 6, 2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 3).contiguous().transpose(1, 3)
    compare(*turned, Reduction(8, 32, True, 0.25, softcap))


@pytest.mark.parametrize("room", [1, 40, 200, 500])
def test_parts_of_heads_and_rows_are_those_of_one_launch(triton_backend, monkeypatch, room):
    """100 rows of the reduced grid and 4 blocks of keys are 52 numbers for each of 4 heads."""
    q, k = tensors(1, 100, 100, 4, 2)
    reduction = Reduction(8, 32, True, 0.25)
    whole = antidiagonal(q, k, reduction, TILES)
    monkeypatch.setattr(score, "AT_ONCE", room)
    # Rows land in other places of other tiles, where the interpreter's products add up in another order.
    torch.testing.assert_close(antidiagonal(q, k, reduction, TILES), whole, atol=1e-6, rtol=1e-6)


def test_nothing_is_read_that_was_not_written(triton_backend, poisoned_empty):
    compare(*tensors(1, 300, 300, 2, 1), Reduction(4, 16, True, 0.25))


def test_half_precision(triton_backend):
    q, k = tensors(1, 96, 96, 2, 1, dtype=torch.float16)
    compare(q, k, Reduction(8, 32, True, 0.25))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_nan_spoils_its_rows_alone(triton_backend):
    q, k = tensors(1, 64, 64, 1, 1)
    q[0, 40] = torch.nan
    reduction = Reduction(4, 16, True, 0.25)
    mass = antidiagonal(q, k, reduction, TILES)[0, 0]
    assert mass.isnan().any(1).tolist() == [False, False, True, False]
    k[0, 40] = torch.nan
    mass = antidiagonal(q[:, :32], k[:, :64], reduction, TILES)[0, 0]  # queries 32 to 63, groups from 40 on see it
    assert mass.isnan().any(1).tolist() == [True, True]


def test_infinite_scores_of_unseen_keys_do_not_matter(triton_backend):
    q, k = tensors(1, 32, 32, 1, 1)
    reduction = Reduction(4, 16, True, 0.25)
    clean = antidiagonal(q, k, reduction, TILES)[0, 0, 0]
    k[0, 20:] = torch.nan
    assert torch.equal(antidiagonal(q, k, reduction, TILES)[0, 0, 0], clean)


def test_the_op_and_the_selector_take_it_by_name(triton_backend, monkeypatch):
    import s2attn

    q, k = tensors(1, 100, 100, 4, 2)
    calls = []
    monkeypatch.setattr(score, "antidiagonal", lambda *given: calls.append(given) or antidiagonal(*given))
    out = s2attn.attention(q, k, k, s2attn.XAttention(8, 0.7, block=32), backend="triton")
    assert len(calls) == 1
    torch.testing.assert_close(out, s2attn.attention(q, k, k, s2attn.XAttention(8, 0.7, block=32)), atol=1e-5, rtol=1e-5)
    given = {"stride": 8, "block": 32}
    torch.testing.assert_close(
        s2attn.ops.antidiagonal(q, k, backend="triton", **given), s2attn.ops.antidiagonal(q, k, **given), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("limit", sorted(set(SHARED_MEMORY.values())))
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [16, 80, 256])
def test_tiles_fit_where_they_are_chosen(limit, itemsize, dim):
    tiles = choose_score_tiles(dim, itemsize, limit)
    assert tiles.num_stages * (tiles.rows + tiles.columns) * tiles.depth * itemsize <= limit
