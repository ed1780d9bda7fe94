"""Decoding over pages on a GPU: right beside the torch backend, the same bits, and inside a graph whose numbers change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import s2attn
from s2attn import Dense, Local, Sink, Stride, Window
from s2attn.backends import get_backend
from s2attn.backends.triton.backend import find_tiles

PATTERNS = {"S2": Local(2) | Stride(4), "window": Sink(16) | Window(300), "dense": Dense()}
HEADS, KV_HEADS = 8, 2


class Cache:
    """Pages in random order, full of numbers."""

    def __init__(self, device, dtype, batch, pages, page_size, width, per_head=False):
        count = batch * pages * (KV_HEADS if per_head else 1)
        shape = (count, page_size, KV_HEADS, width)
        self.k, self.v = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        lines = (batch, KV_HEADS, pages) if per_head else (batch, pages)
        self.table = torch.randperm(count, device=device).view(lines).int()
        self.room = pages * page_size

    def decode(self, q, pattern, lengths, **call):
        where = {"block_table": self.table, "seq_lens": lengths, "return_lse": True, "backend": "triton", **call}
        return s2attn.decode(q, self.k, self.v, pattern, **where)


@pytest.fixture
def cut_as(monkeypatch):
    """Sets the way in which lists are cut; empty leaves it to the rule."""
    return lambda form: monkeypatch.setattr(get_backend("triton"), "_choose", lambda *given: replace(find_tiles(*given), cut=form))


def near(got, expected):
    """Two ways of adding up the same numbers in this dtype."""
    for one, other in zip(got, expected, strict=True):
        seen = torch.isfinite(other)
        assert torch.equal(torch.isfinite(one), seen)
        step = 4 * torch.finfo(one.dtype).eps + 2e-6
        assert ((one - other)[seen].abs().max() <= step * other[seen].abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("form", ["", "direct", "split", "stream"])
@pytest.mark.parametrize("name", PATTERNS)
def test_beside_the_torch_backend(name, form, dtype, device, sized, cut_as, poisoned_empty):
    cut_as(form)
    for q_len, page_size in ((1, 16), (4, 64)):
        cache = Cache(device, dtype, 3, sized(8192, 128) // page_size, page_size, sized(128, 16), per_head=q_len > 1)
        lengths = torch.tensor([cache.room, cache.room // 3, 7], device=device)
        q = torch.randn(3, q_len, HEADS, sized(128, 16), device=device).to(dtype)
        near(cache.decode(q, PATTERNS[name], lengths), cache.decode(q, PATTERNS[name], lengths, backend="torch"))


@pytest.mark.parametrize("form", ["split", "stream"])
def test_prompts_and_tokens_side_by_side(form, usual, device, sized, cut_as):
    cut_as(form)
    cache = Cache(device, usual, 4, sized(256, 4), 32, sized(64, 16))
    news = torch.tensor(sized([700, 1, 0, 33], [20, 1, 0, 9]))
    cu = torch.nn.functional.pad(news.cumsum(0), (1, 0)).to(device)
    lengths = torch.tensor([cache.room, cache.room - 9, 5, 3], device=device)
    q = torch.randn(int(news.sum()), HEADS, sized(64, 16), device=device).to(usual)
    more = {"cu_seqlens_q": cu, "softcap": 20.0, "sinks": torch.randn(HEADS, device=device)}
    got = cache.decode(q, PATTERNS["S2"], lengths, **more)
    near(got, cache.decode(q, PATTERNS["S2"], lengths, backend="torch", **more))
    again = cache.decode(q, PATTERNS["S2"], lengths, validate=False, **more)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_float8_pages(usual, device, sized):
    cache = Cache(device, usual, 2, sized(128, 4), 16, sized(128, 16))
    scales = {"k_scale": torch.tensor([0.02, 0.05], device=device), "v_scale": torch.tensor([0.05, 0.02], device=device)}
    pools = [torch.zeros(x.shape, dtype=torch.float8_e4m3fn, device=device) for x in (cache.k, cache.v)]
    slots = torch.arange(pools[0].shape[0] * 16, device=device)
    flat = [x.flatten(0, 1) for x in (cache.k, cache.v)]
    s2attn.store_kv(*flat, *pools, slots, backend="triton", **scales)
    plain = [torch.zeros_like(x) for x in pools]
    s2attn.store_kv(*flat, *plain, slots, backend="torch", **scales)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(pools, plain, strict=True))
    cache.k, cache.v = pools
    q, lengths = torch.randn(2, 1, HEADS, sized(128, 16), device=device).to(usual), torch.tensor([cache.room, 20], device=device)
    near(cache.decode(q, PATTERNS["S2"], lengths, **scales), cache.decode(q, PATTERNS["S2"], lengths, backend="torch", **scales))


@pytest.mark.parametrize("form", ["direct", "split", "stream"])
def test_the_same_bits_every_time(form, usual, device, sized, cut_as):
    cut_as(form)
    cache = Cache(device, usual, 3, sized(512, 4), 16, sized(128, 16))
    q, lengths = torch.randn(3, 2, HEADS, sized(128, 16), device=device).to(usual), torch.tensor([cache.room, 99, 30], device=device)
    lengths = lengths.clamp(max=cache.room)
    first = cache.decode(q, PATTERNS["dense"], lengths)
    for _ in range(sized(20, 1)):
        assert all(torch.equal(a, b) for a, b in zip(first, cache.decode(q, PATTERNS["dense"], lengths), strict=True))


def test_the_same_bits_in_any_batch(usual, device, sized):
    cache = Cache(device, usual, 3, sized(1024, 4), 16, sized(128, 16))
    q, lengths = torch.randn(3, 1, HEADS, sized(128, 16), device=device).to(usual), torch.tensor([cache.room, 64, 30], device=device)
    whole, table = cache.decode(q, PATTERNS["dense"], lengths, batch_invariant=True), cache.table
    for entry in range(3):
        cache.table = table[entry : entry + 1]
        alone = cache.decode(q[entry : entry + 1], PATTERNS["dense"], lengths[entry : entry + 1], batch_invariant=True)
        assert all(torch.equal(a[entry : entry + 1], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("form", ["direct", "split", "stream"])
def test_a_captured_step_follows_its_lengths(form, usual, device, sized, cut_as):
    """One graph of storing and attending serves every later length, table and token."""
    cut_as(form)
    cache = Cache(device, usual, 2, sized(256, 4), 16, sized(128, 16))
    q = torch.randn(2, 1, HEADS, sized(128, 16), device=device).to(usual)
    k, v = (torch.randn(2, KV_HEADS, sized(128, 16), device=device).to(usual) for _ in range(2))
    lengths, slots = torch.tensor([17, 5], device=device), torch.zeros(2, dtype=torch.int64, device=device)

    def place():
        last = lengths - 1
        slots.copy_(cache.table[torch.arange(2, device=device), last // 16].long() * 16 + last % 16)

    def step():
        s2attn.store_kv(k, v, cache.k, cache.v, slots, backend="triton", validate=False)
        return cache.decode(q, PATTERNS["S2"], lengths, validate=False)

    place()
    step()  # builds the lists and compiles
    replay = step
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()

        def replay():
            graph.replay()
            return captured

    for ends in ([18, 6], [cache.room, 0], [1, cache.room // 2]):
        lengths.copy_(torch.tensor(ends))
        place()
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape))
        slots[lengths == 0] = -1
        got = [x.clone() for x in replay()]
        near(got, cache.decode(q, PATTERNS["S2"], lengths, backend="torch"))


@pytest.mark.parametrize("q_len", [1, None])
def test_a_prepared_step_is_captured_at_once(q_len, usual, device, sized):
    """Nothing but the warm-up comes before the capture: lists are made, kernels compiled and loaded."""
    pattern, width = Local(3) | Stride(5), sized(128, 16)
    cache = Cache(device, usual, 3, sized(512, 4), 16, width)
    shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": width, "page_size": 16, "dtype": usual, "device": device}
    s2attn.warmup_decode(pattern, max_tokens=cache.room, q_len=q_len, **shape, backend="triton")
    k, v = (torch.randn(3, KV_HEADS, width, device=device).to(usual) for _ in range(2))
    q = torch.randn(3, 1, HEADS, width, device=device).to(usual)
    lengths, more = torch.tensor([cache.room, 40, 1], device=device).int(), {}
    if q_len is None:
        q, more = q[:, 0], {"cu_seqlens_q": torch.arange(4, device=device).int()}
    slots = cache.table[:, 0].long() * 16

    def step():
        s2attn.store_kv(k, v, cache.k, cache.v, slots, backend="triton", validate=False)
        return cache.decode(q, pattern, lengths, validate=False, **more)

    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
    else:
        got = step()
    near(got, cache.decode(q, pattern, lengths, backend="torch", **more))
