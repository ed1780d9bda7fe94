"""`DynamicCache`: what comes out is what went in, and attention over it is attention over all of it."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Local, Stride, Unsupported
from s2attn.cache import DynamicCache

S2 = Local(2, 16) | Stride(3, block=16)


def qkv(batch: int, length: int):
    return torch.randn(batch, length, 4, 8), torch.randn(batch, length, 2, 8), torch.randn(batch, length, 2, 6)


def test_steps_of_any_length_equal_the_whole(poisoned_empty) -> None:
    steps, cache = [33, 1, 1, 5, 64, 1, 20, 1], DynamicCache()
    data = [qkv(2, sum(steps)) for _ in range(2)]
    at = 0
    for step in steps:
        for layer, (q, k, v) in enumerate(data):
            known = cache.update(k[:, at : at + step], v[:, at : at + step], layer)
            assert torch.equal(known[0], k[:, : at + step]) and torch.equal(known[1], v[:, : at + step])
            out = s2attn.attention(q[:, at : at + step], *known, S2, layer=layer)
            whole = s2attn.attention(q, k, v, S2, layer=layer)[:, at : at + step]
            torch.testing.assert_close(out, whole, atol=2e-6, rtol=2e-6)
        at += step
    assert cache.get_seq_length(1) == at and cache.get_seq_length(7) == 0
    assert cache.bytes_used == 2 * 2 * at * 2 * (8 + 6) * 4


def test_rows_are_reordered_and_tokens_cropped() -> None:
    cache, (_, k, v) = DynamicCache(), qkv(3, 20)
    cache.update(k, v)
    cache.crop(12)
    cache.reorder_cache(torch.tensor([2, 0, 0, 1]))
    _, more_k, more_v = qkv(4, 2)
    known = cache.update(more_k, more_v)
    for new, old, more in zip(known, (k, v), (more_k, more_v), strict=True):
        assert torch.equal(new, torch.cat([old[[2, 0, 0, 1], :12], more], dim=1))
    cache.crop(0)
    assert cache.get_seq_length() == cache.bytes_used == 0


def test_memory_grows_by_doubling() -> None:
    cache, seen = DynamicCache(), set()
    for _ in range(300):
        k, _ = cache.update(*torch.ones(2, 1, 1, 1, 4))
        seen.add(k.data_ptr())
    assert k.shape == (1, 300, 1, 4) and len(seen) <= 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.update(torch.ones(2, 1, 2, 8), torch.ones(2, 1, 2, 6), -1), "layer must be an integer >= 0; got -1"),
        (lambda cache: cache.update(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 6)), "k must have the batch, heads and width of layer 0"),
        (
            lambda cache: cache.update(torch.ones(2, 1, 2, 8), torch.ones(2, 1, 2, 7)),
            r"v must have the batch.*; got \(2, 2, 7\)",
        ),
        (lambda cache: cache.update(torch.ones(2, 1, 2, 8), torch.ones(2, 2, 2, 6)), "v must have shape"),
        (lambda cache: cache.update(torch.ones(2, 2, 8), torch.ones(2, 2, 6)), "k must have shape"),
        (lambda cache: cache.update(torch.ones(2, 1, 2, 8).half(), torch.ones(2, 1, 2, 6).half()), "k must have the dtype and device"),
        (lambda cache: cache.update(None, None), "k must be a floating point tensor"),
        (lambda cache: cache.update(torch.ones(2, 1, 2, 8, requires_grad=True), torch.ones(2, 1, 2, 6)), "a cache has no gradient"),
        (lambda cache: cache.crop(6), "length must be at most 5, the tokens that every layer has; got 6"),
        (lambda cache: cache.reorder_cache(torch.tensor([0, 2])), r"rows must be below the batch, 2, and not negative; got \[0, 2\]"),
        (lambda cache: cache.reorder_cache([0, 1]), "rows must be an int32 or int64 tensor"),
    ],
)
def test_wrong_calls_are_refused(call, message) -> None:
    cache = DynamicCache()
    cache.update(torch.ones(2, 5, 2, 8), torch.ones(2, 5, 2, 6))
    with pytest.raises((ValueError, TypeError, Unsupported), match=message):
        call(cache)
    assert cache.get_seq_length() == 5
