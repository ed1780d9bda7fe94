"""Texts on a GPU: those of the CPU, token for token, through a cache that lies on the GPU."""

from __future__ import annotations

import torch
from torch import nn

import s2attn
from s2attn import Local, Sampling, Sink, SparseAttention, SparseCache, Stride, Window

PATTERNS = [Sink(3) | Window(40), Local(2, block=16) | Stride(3, block=16)]


class Model(nn.Module):
    """Two layers in float64, whose likeliest tokens are the same on every device."""

    def __init__(self):
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(90, 32), nn.Embedding(4096, 32), nn.Linear(32, 90)
        self.qkv = nn.ModuleList(nn.Linear(32, 64) for _ in PATTERNS)
        self.attend = nn.ModuleList(SparseAttention(pattern, 4, 2, layer=i) for i, pattern in enumerate(PATTERNS))

    def forward(self, tokens):
        x = self.token(tokens) + self.place(s2attn.nn.positions(tokens)) + self.token(s2attn.nn.look_back(tokens, 1)[:, :-1])
        for qkv, attend in zip(self.qkv, self.attend, strict=True):
            q, k, v = qkv(x).unflatten(-1, (8, 8)).split([4, 2, 2], dim=2)
            x = x + attend(q, k, v).flatten(2)
        return self.head(x)


def test_a_batch_writes_what_it_writes_on_the_cpu(device, sized):
    """Prompts of different lengths, drawn and greedy, with pages given back, forks in a cascade, and a cache that was in a file."""
    model = Model().double().eval()
    prompts = [torch.randint(90, (length,)).tolist() for length in sized((700, 33, 250), (70, 3, 25))]
    how = [Sampling(20, temperature=1.0), Sampling(9), Sampling(14, temperature=0.7, top_p=0.9)]
    expected = s2attn.generate(model, prompts, how, chunk=64)
    assert s2attn.generate(model.to(device), prompts, how, chunk=64) == expected


def test_forks_and_files_go_on_as_on_the_cpu(device, sized, tmp_path):
    model, prompt = Model().double().eval(), torch.randint(90, (sized(600, 60),)).tolist()
    ways = [Sampling(12, temperature=1.0, seed=seed) for seed in range(3)]
    expected = [text.new for text in s2attn.generate(model, [prompt] * 3, ways)]
    model.to(device)
    cache = SparseCache.for_model(model, max_tokens=len(prompt) + 12, sequences=3, hold=2)
    parent, rows = cache.open(), torch.tensor([prompt], device=device)
    with torch.no_grad(), cache.step([parent], rows):
        model(rows)
    cache.rollback(parent, 2)
    cache.save(tmp_path / "cache.pt")
    cache = SparseCache.load(tmp_path / "cache.pt", device=device)
    assert cache.k_pages.device == rows.device
    sequences = [parent, cache.fork(parent), cache.fork(parent)]
    texts = s2attn.generate(model, [prompt] * 3, ways, cache=cache, sequences=sequences, cascade=True)
    assert [text.new for text in texts] == expected


def test_keys_in_host_memory_change_no_token(device, sized):
    """A layer on the host and old pages of the other there: queries travel, results come back and are merged."""
    model = Model().double().eval()
    prompts = [torch.randint(90, (length,)).tolist() for length in sized((700, 250), (70, 25))]
    expected = [text.new for text in s2attn.generate(model, prompts, Sampling(12), chunk=64)]
    model.to(device)
    cache = s2attn.HostedCache.for_model(model, max_tokens=max(map(len, prompts)) + 12, sequences=2, chunk=64, host_layers=[0], spill=16)
    assert [text.new for text in s2attn.generate(model, prompts, Sampling(12), chunk=64, cache=cache)] == expected
    assert cache.bus.to_host and cache.bus.to_device and cache.pages.most_on_device
