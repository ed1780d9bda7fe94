"""Selectors on a graphics card: the same choices as on the CPU, nothing left behind on another device."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import XAttention, hyper_attention
from s2attn.core import Unsupported
from s2attn.selectors import FlexPrefill, MeanPool, PageBounds, VerticalSlash
from s2attn.selectors.planted import planted

pytestmark = pytest.mark.gpu

EVERY = [
    XAttention(8, 0.8, block=32),
    XAttention(8, [[0.5, 0.8, 0.5, 0.8]], block=32, share="majority"),
    MeanPool(top_k=3, block=32, share="mean"),
    PageBounds(top_k=3, block=16, share="union"),
    VerticalSlash(8, 8, block=32),
    FlexPrefill(0.8, block=32),
]


@pytest.mark.parametrize("selector", EVERY, ids=repr)
def test_choices_and_results_are_those_of_the_cpu(selector):
    x = planted("slashes", seqlen=300, width=16)
    here = [y.requires_grad_() for y in (x.q, x.k, x.v)]
    there = [y.detach().cuda().requires_grad_() for y in here]
    layout = selector.layout(*there[:2]).validate()
    assert layout.device.type == "cuda"
    differ = layout.to_dense().cpu() ^ selector.layout(*here[:2]).to_dense()
    assert differ.double().mean() < 0.01  # sums that tie up to rounding may fall the other way
    if not differ.any():
        outs = [s2attn.attention(*some, selector) for some in (here, there)]
        torch.testing.assert_close(outs[1].cpu(), outs[0], atol=1e-4, rtol=1e-4)
        grads = [torch.autograd.grad(out.sum(), some) for out, some in zip(outs, (here, there), strict=True)]
        for got, want in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"sampling": "value_norm"}, {"kappa": 10.0}])
def test_hyper_attention_repeats_itself(settings):
    q, k, v = (torch.randn(1, 700, heads, 32, device="cuda", requires_grad=True) for heads in (4, 2, 2))
    runs = []
    for _ in range(2):
        out = hyper_attention(q, k, v, block=64, samples=64, min_seqlen=128, **settings)
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_cuda_graph_is_told_that_it_cannot_hold_a_choice():
    q = torch.randn(1, 64, 2, 16, device="cuda")
    with pytest.raises(Unsupported, match="XAttention cannot choose inside a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        XAttention(8, block=32).layout(q, q)
