"""Hashing: neighbours in the order differ in one bit, and vectors collide by their angle."""

from __future__ import annotations

import math

import pytest
import torch

from s2attn.selectors.lsh import bucket_order, buckets, gray_rank, hyperplanes, inverse_of, reorder


@pytest.mark.parametrize("bits", [1, 3, 7, 12])
def test_neighbouring_buckets_differ_in_one_bit(bits):
    codes = torch.arange(2**bits)
    by_rank = torch.empty_like(codes)
    by_rank[gray_rank(codes)] = codes  # fails unless the ranks are a permutation
    assert sorted(by_rank.tolist()) == codes.tolist()
    changed = by_rank ^ by_rank.roll(1)
    assert [bin(change).count("1") for change in changed.tolist()] == [1] * 2**bits


def test_codes_of_many_bits_undo_the_gray_code():
    number = torch.randint(0, 2**62, (1000,))
    assert torch.equal(gray_rank(number ^ (number >> 1)), number)


@pytest.mark.parametrize("angle", [0.1, 0.5, 1.0, math.pi / 2, 2.5])
@pytest.mark.parametrize("hashes", [1, 3])
def test_vectors_collide_with_probability_one_minus_angle_over_pi(angle, hashes):
    count = 40000
    a, other = torch.randn(count, 12), torch.randn(count, 12)
    a = a / a.norm(dim=1, keepdim=True)
    other = other - (other * a).sum(1, keepdim=True) * a
    b = math.cos(angle) * a + math.sin(angle) * other / other.norm(dim=1, keepdim=True)
    planes, _ = torch.linalg.qr(hyperplanes(hashes, 12, torch.Generator().manual_seed(3)).T)  # one bit tells nothing of another
    same_bits = [(buckets(a, plane[None]) == buckets(b, plane[None])).double().mean().item() for plane in planes.T]
    deviation = math.sqrt(0.25 / count)
    assert all(abs(rate - (1 - angle / math.pi)) < 4.5 * deviation for rate in same_bits)
    if hashes == 1:
        assert same_bits[0] == (buckets(a, planes.T) == buckets(3.0 * b, planes.T)).double().mean().item()  # lengths do not matter


def test_the_order_is_stable_and_can_be_undone():
    x = torch.randn(2, 500, 3, 4)
    planes = hyperplanes(3, 4, torch.Generator().manual_seed(0))
    order = bucket_order(x, planes)
    ranks = reorder(buckets(x, planes).unsqueeze(-1), order).squeeze(-1)
    assert bool((ranks.diff(dim=1) >= 0).all())
    assert bool((order.diff(dim=1)[ranks.diff(dim=1) == 0] > 0).all())
    assert torch.equal(reorder(reorder(x, order), inverse_of(order)), x)
