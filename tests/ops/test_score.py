"""Block mass against sums over single pairs, written independently of how the op groups its products."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s2attn.backends.base import Reduction
from s2attn.backends.torch import attend, score
from s2attn.ops import antidiagonal


def by_pairs(q, k, stride, block, causal, scale=None):
    """One pair after another in float64: the antidiagonal of every tile, softmax, sums over blocks."""
    (batch, seqlen_q, heads, dim), seqlen_k, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, -(-seqlen_q // block), -(-seqlen_k // block), dtype=torch.float64)
    dots = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(group, 2)).mul(scale).tolist()
    for b in range(batch):
        for h in range(heads):
            for i in range(-(-seqlen_q // stride)):
                queries = list(range(i * stride, min(seqlen_q, (i + 1) * stride)))
                weight = {}
                for j in range(-(-seqlen_k // stride)):
                    keys = list(range(j * stride, min(seqlen_k, (j + 1) * stride)))
                    if causal and keys[0] > i * stride + stride - 1 + seqlen_k - seqlen_q:
                        continue
                    pairs = list(zip(reversed(queries), keys, strict=False))
                    weight[j] = math.exp(sum(dots[b][h][x][y] for x, y in pairs) / len(pairs))
                for j, w in weight.items():
                    out[b, h, i * stride // block, j * stride // block] += w / sum(weight.values())
    return out


def tensors(batch, seqlen_q, seqlen_k, heads, kv_heads, dim=8, dtype=torch.float32):
    return torch.randn(batch, seqlen_q, heads, dim).mul(2).to(dtype), torch.randn(batch, seqlen_k, kv_heads, dim).to(dtype)


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("lengths", [(64, 64), (61, 61), (33, 33), (17, 49), (7, 64), (1, 50), (40, 23)])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_brute_force(stride, lengths, causal):
    q, k = tensors(2, *lengths, 4, 2)
    got = antidiagonal(q, k, stride=stride, block=16, causal=causal)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), by_pairs(q, k, stride, 16, causal), atol=2e-5, rtol=2e-5)


def test_whole_groups_follow_the_formula_of_the_paper():
    """R[i, j] = sum_s q[iS + S-1-s] . k[jS + s] / (sqrt(d) S), softmax over j <= i, sums over blocks."""
    stride, (q, k) = 8, tensors(1, 96, 96, 1, 1, 16)
    logits = torch.full((12, 12), -torch.inf)
    for i in range(12):
        for j in range(i + 1):
            logits[i, j] = sum(q[0, i * stride + stride - 1 - s, 0] @ k[0, j * stride + s, 0] for s in range(stride)) / (4 * stride)
    mass = torch.softmax(logits, -1).view(3, 4, 3, 4).sum((1, 3))
    torch.testing.assert_close(antidiagonal(q, k, stride=stride, block=32)[0, 0], mass, atol=1e-5, rtol=1e-5)


def test_stride_one_is_the_exact_attention_mass():
    q, k = tensors(1, 50, 50, 2, 2)
    weights = torch.softmax(
        torch.einsum("bthd,bshd->bhts", q, k).mul(8**-0.5).masked_fill(~torch.ones(50, 50).tril().bool(), -torch.inf), -1
    )
    exact = torch.nn.functional.pad(weights, (0, 14, 0, 14)).view(1, 2, 4, 16, 4, 16).sum((3, 5))
    torch.testing.assert_close(antidiagonal(q, k, stride=1, block=16), exact, atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(st.integers(1, 130), st.integers(1, 130), st.sampled_from([4, 8, 16]), st.booleans(), st.sampled_from([1, 1 << 9, 1 << 12]))
def test_does_not_depend_on_how_it_is_cut(seqlen_q, seqlen_k, stride, causal, at_once):
    """Tiles of rows, entries of the batch, and repeated keys give what one call gives."""
    q, k = tensors(2, seqlen_q, seqlen_k, 4, 2)
    settings_ = {"stride": stride, "block": 32, "causal": causal}
    whole = antidiagonal(q, k, **settings_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "NUMBERS", at_once)
        tiled = antidiagonal(q, k, **settings_)
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)
    alone = torch.cat([antidiagonal(q[b : b + 1], k[b : b + 1], **settings_) for b in range(2)])
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    repeated = antidiagonal(q, k.repeat_interleave(2, dim=2), **settings_)
    torch.testing.assert_close(repeated, whole, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, result.numel()) if isinstance(result, torch.Tensor) else self.numel
        return result


@pytest.mark.parametrize("causal", [True, False])
def test_the_reduced_grid_never_lies_in_memory_as_a_whole(causal, monkeypatch):
    q, k = tensors(1, 2048, 2048, 2, 1)
    monkeypatch.setattr(attend, "NUMBERS", 1 << 16)
    with LargestTensor() as largest:
        score.block_mass(q, k, Reduction(4, 32, causal, 0.35))
    assert q.numel() <= largest.numel <= 1 << 16 < 2 * (2048 // 4) ** 2 // 4


@pytest.mark.parametrize("chunk", [64, 128])
@pytest.mark.parametrize("length", [256, 250])
def test_chunks_of_queries_are_rows_of_the_whole(chunk, length):
    """Also where the length is a multiple of the chunk: the last chunk reads the earlier ones."""
    q, k = tensors(1, length, length, 2, 1)
    whole = antidiagonal(q, k, stride=8, block=32)
    for at in range(0, length, chunk):
        end = min(length, at + chunk)
        part = antidiagonal(q[:, at:end], k[:, :end], stride=8, block=32)
        assert bool((part.sum(-1) > 0).all())
        torch.testing.assert_close(part, whole[:, :, at // 32 : -(-end // 32), : part.shape[-1]], atol=1e-5, rtol=1e-5)


def test_what_does_not_exist_enters_nothing():
    """Keys beyond the end are not keys of logit 0: with all real logits far below 0, short groups keep their share."""
    q, k = torch.ones(1, 37, 1, 4), torch.full((1, 37, 1, 4), -30.0)
    mass = antidiagonal(q, k, stride=16, block=16, causal=False, scale=1.0)
    torch.testing.assert_close(mass, torch.full((1, 1, 3, 3), 1 / 3))


def test_rows_sum_to_their_groups():
    q, k = tensors(1, 100, 60, 1, 1)
    mass = antidiagonal(q, k, stride=4, block=16)  # the first 40 queries come before all keys
    assert mass.sum(-1)[0, 0].tolist() == pytest.approx([0, 0, 2, 4, 4, 4, 1], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_differ_by_the_rounding_of_the_inputs_alone(dtype):
    q, k = tensors(1, 70, 70, 2, 1, dtype=dtype)
    assert torch.equal(antidiagonal(q, k, stride=4, block=16), antidiagonal(q.float(), k.float(), stride=4, block=16))


def test_scale_and_softcap():
    q, k = tensors(1, 64, 64, 1, 1)
    torch.testing.assert_close(antidiagonal(q, k, stride=4, block=16, scale=0.7), antidiagonal(q * 0.7, k, stride=4, block=16, scale=1.0))
    capped = antidiagonal(q * 100, k, stride=4, block=16, softcap=1e-6)
    even = antidiagonal(q * 0, k, stride=4, block=16)
    torch.testing.assert_close(capped, even, atol=1e-4, rtol=1e-4)


def test_empty_calls():
    assert antidiagonal(torch.ones(1, 0, 2, 4), torch.ones(1, 5, 1, 4)).shape == (1, 2, 0, 1)
    assert antidiagonal(torch.ones(1, 5, 2, 4), torch.ones(1, 0, 1, 4)).shape == (1, 2, 1, 0)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"stride": 0}, "stride must be an integer >= 1; got 0"),
        ({"stride": 24, "block": 64}, r"stride must divide block \(64\); got 24"),
        ({"block": 48}, "block must be one of 16, 32, 64, 128, 256; got 48"),
        ({"scale": math.inf}, "scale must be finite"),
    ],
)
def test_bad_arguments(settings_, words):
    with pytest.raises(ValueError, match=words):
        antidiagonal(*tensors(1, 64, 64, 2, 1), **settings_)


def test_a_thin_slash_is_seen_at_odd_distances_only():
    """What the page of selectors says: pairs of one antidiagonal of an even stride lie at odd distances."""
    codes = torch.nn.functional.normalize(torch.randn(256, 64), dim=1)
    held = {}
    for distance in (96, 97):
        q = torch.zeros(256, 64)
        q[distance:] = codes[: 256 - distance] * 300
        mass = antidiagonal(q[None, :, None], codes[None, :, None], stride=4, block=32)[0, 0, 6:]
        held[distance] = (mass[:, 2:5].sum(-1) / mass.sum(-1)).min().item()
    assert held[97] > 0.9 > 0.75 > held[96]
