"""Estimates by means, by bounds, and along lines, against sums over single pairs."""

from __future__ import annotations

import math

import pytest
import torch

from s2attn.ops import bound_mass, key_bounds, last_queries, mean_pool, pooled

LENGTHS = [(64, 64), (61, 61), (17, 49), (1, 50), (40, 23)]


def tensors(seqlen_q, seqlen_k, heads=4, kv_heads=2, dim=8):
    return torch.randn(2, seqlen_q, heads, dim), torch.randn(2, seqlen_k, kv_heads, dim)


def softmax(weights):
    total = sum(math.exp(x) for x in weights.values())
    return {j: math.exp(x) / total for j, x in weights.items()}


def means_by_hand(q, k, block, causal):
    (batch, t, heads, dim), s = q.shape, k.shape[1]
    out = torch.zeros(batch, heads, -(-t // block), -(-s // block))
    for b in range(batch):
        for h in range(heads):
            for r in range(out.shape[2]):
                mean = q[b, r * block : (r + 1) * block, h].mean(0)
                seen = [j for j in range(out.shape[3]) if not causal or j * block <= min(t, (r + 1) * block) - 1 + s - t]
                keys = {j: k[b, j * block : (j + 1) * block, h // (heads // k.shape[2])].mean(0) for j in seen}
                for j, w in softmax({j: float(mean @ key) / math.sqrt(dim) for j, key in keys.items()}).items():
                    out[b, h, r, j] = w
    return out


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_means(lengths, causal):
    q, k = tensors(*lengths)
    torch.testing.assert_close(mean_pool(q, k, block=16, causal=causal), means_by_hand(q, k, 16, causal), atol=1e-5, rtol=1e-5)


def bounds_by_hand(q, k, block, causal):
    (batch, t, heads, dim), s = q.shape, k.shape[1]
    out = torch.zeros(batch, heads, -(-t // block), -(-s // block))
    for b in range(batch):
        for h in range(heads):
            pages = [k[b, j * block : (j + 1) * block, h // (heads // k.shape[2])] for j in range(out.shape[3])]
            for i in range(t):
                greatest = {
                    j: float(torch.maximum(q[b, i, h] * page.amin(0), q[b, i, h] * page.amax(0)).sum()) / math.sqrt(dim)
                    for j, page in enumerate(pages)
                    if not causal or j * block <= i + s - t
                }
                for j, w in softmax(greatest).items():
                    out[b, h, i // block, j] += w
    return out


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_bounds(lengths, causal, monkeypatch):
    q, k = tensors(*lengths)
    exact = bounds_by_hand(q, k, 16, causal)
    torch.testing.assert_close(bound_mass(q, k, block=16, causal=causal), exact, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(pooled, "_AT_ONCE", 1)
    torch.testing.assert_close(bound_mass(q, k, block=16, causal=causal), exact, atol=1e-5, rtol=1e-5)


def test_bounds_of_a_cache_need_not_be_made_again():
    q, k = tensors(1, 50)
    low, high = key_bounds(k, block=16)
    assert low.shape == high.shape == (2, 4, 2, 8)
    for j in range(4):
        page = k[:, 16 * j : 16 * (j + 1)]
        assert torch.equal(low[:, j], page.amin(1)) and torch.equal(high[:, j], page.amax(1))
    again = bound_mass(q, torch.empty_like(k).fill_(torch.nan), block=16, bounds=(low, high))
    assert torch.equal(again, bound_mass(q, k, block=16))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("n", [1, 16, 100])
def test_lines(lengths, n):
    q, k = tensors(*lengths)
    (t, s), n_here = lengths, min(n, lengths[0])
    lines = last_queries(q, k, n=n)
    vertical, slash = torch.zeros(2, 4, s), torch.zeros(2, 4, s)
    for b in range(2):
        for h in range(4):
            for i in range(t - n_here, t):
                seen = range(min(s, max(0, i + s - t + 1)))
                for j, w in softmax({j: float(q[b, i, h] @ k[b, j, h // 2]) / math.sqrt(8) for j in seen}).items():
                    vertical[b, h, j] += w
                    slash[b, h, i + s - t - j] += w
    assert lines.queries == n_here
    torch.testing.assert_close(lines.vertical, vertical, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lines.slash, slash, atol=1e-5, rtol=1e-5)


def test_a_softcap_flattens_every_estimate():
    q, k = tensors(40, 40)
    for estimate in (
        lambda x, **s: mean_pool(x, k, block=16, **s),
        lambda x, **s: bound_mass(x, k, block=16, **s),
        lambda x, **s: last_queries(x, k, **s).vertical,
    ):
        torch.testing.assert_close(estimate(100 * q, softcap=1e-6), estimate(0 * q), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimate", [mean_pool, bound_mass])
def test_bad_blocks(estimate):
    with pytest.raises(ValueError, match="block must be one of 16, 32, 64, 128, 256; got 10"):
        estimate(*tensors(20, 20), block=10)


def test_bad_number_of_queries():
    with pytest.raises(ValueError, match="n must be an integer >= 1; got 0"):
        last_queries(*tensors(20, 20), n=0)
