"""The other selectors: what each one promises on data where the right choice is known."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn.core import Unsupported
from s2attn.selectors import Call, FlexPrefill, Gated, MeanPool, PageBounds, VerticalSlash
from s2attn.selectors.lines import blocks_of_lines
from s2attn.testing import assert_close, eager, oracle

EVERY = [
    MeanPool(top_k=3, block=16),
    MeanPool(threshold=0.6, block=16, share="mean"),
    PageBounds(top_k=2, block=16),
    VerticalSlash(verticals=3, slashes=3, last=20, block=16),
    FlexPrefill(threshold=0.5, block=16),
    Gated(lambda q, k, call: torch.rand(q.shape[0], q.shape[2], -(-q.shape[1] // 16), -(-k.shape[1] // 16)), top_k=3, block=16),
]


def tensors(batch, seqlen_q, seqlen_k, heads=4, kv_heads=2, dim=16):
    sizes = ((seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads))
    return [(2 * torch.randn(batch, *size, dim)).requires_grad_() for size in sizes]


@pytest.mark.parametrize("selector", EVERY, ids=lambda selector: type(selector).__name__)
@pytest.mark.parametrize("lengths", [(96, 96), (75, 75), (30, 91), (1, 65), (50, 33)])
def test_attention_over_the_chosen_blocks_is_exact(selector, lengths):
    q, k, v = tensors(2, *lengths)
    t, s = lengths
    torch.manual_seed(1)
    layout = selector.layout(q, k).validate()
    dense = layout.to_dense().repeat_interleave(4 // layout.heads, 0)
    mask = torch.stack([dense[:, b * t : (b + 1) * t, b * s : (b + 1) * s] for b in range(2)])
    own = torch.arange(s)[None, :] == torch.arange(t)[:, None] + s - t
    assert bool((mask | ~own).all())  # a query sees itself
    torch.manual_seed(1)
    out = s2attn.attention(q, k, v, selector)
    (plain, _), (exact, _) = eager(q, k, v, mask), oracle(q, k, v, mask)
    assert_close("out", out, plain, exact, terms=4.0)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for got, want in zip(grads, torch.autograd.grad(exact.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(got, want.float(), atol=2e-4, rtol=2e-4)


def planted(keys_at=(), distances=(), seqlen=256, dim=64):
    """One head whose queries look at some keys, or at the keys that lie some distances before them."""
    codes = torch.nn.functional.normalize(torch.randn(seqlen, dim), dim=1)
    k, q = codes.clone(), torch.zeros(seqlen, dim)
    for j in keys_at:
        k[j] = torch.nn.functional.normalize(torch.ones(dim), dim=0)
        q += k[j] / len(keys_at)
    for d in distances:
        q[d:] += codes[: seqlen - d]
    return 80.0 * q[None, :, None], k[None, :, None]


def test_vertical_slash_finds_keys_and_distances():
    q, k = planted(keys_at=[37])
    blocks = VerticalSlash(verticals=1, slashes=1, last=16, block=32).choose(q, k, Call())[0, 0]
    assert bool(blocks[:, 37 // 32].all())
    q, k = planted(distances=[64, 100])
    blocks = VerticalSlash(verticals=1, slashes=2, last=16, block=32).choose(q, k, Call())[0, 0]
    for row in range(8):
        assert all(bool(blocks[row, block]) for d in (64, 100) for block in {(32 * row - d) // 32, (32 * row + 31 - d) // 32} if block >= 0)
    assert int(blocks.sum()) < 8 * 6


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(64, 64), (50, 50), (20, 70), (70, 20)])
def test_every_pair_on_a_line_lies_in_a_listed_block(seqlen_q, seqlen_k):
    keys, distances = torch.rand(2, 3, seqlen_k) < 0.04, torch.rand(2, 3, seqlen_k) < 0.04
    blocks = blocks_of_lines(keys, distances, seqlen_q, 16)
    listed = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :seqlen_q, :seqlen_k]
    distance = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)
    on_slash = (distance >= 0) & distances[:, :, distance.clamp(min=0)]
    assert not bool(((on_slash | keys[:, :, None]) & ~listed).any())
    keys[0, 0], distances[0, 0] = False, False
    assert not bool(blocks_of_lines(keys, distances, seqlen_q, 16)[0, 0].any())


def test_flexprefill_tells_heads_apart():
    """Themes of whole blocks are what means can see; single keys far from the mean of their block are not."""
    themes = torch.nn.functional.normalize(torch.randn(8, 64), dim=1).repeat_interleave(32, 0)
    blocky_q, blocky_k = 60 * themes.flip(0)[None, :, None], themes[None, :, None]
    lonely_q, lonely_k = planted(keys_at=[37, 150])
    q, k = torch.cat([blocky_q, lonely_q], 2), torch.cat([blocky_k, lonely_k], 2)
    selector = FlexPrefill(0.9, block=32)
    assert selector.predicted(q, k, Call(scale=0.125)).tolist() == [[True, False]]
    blocks = selector.choose(q, k, Call(scale=0.125))[0]
    assert bool(blocks[1, 5:, 37 // 32].all()) and bool(blocks[1, 5:, 150 // 32].all())
    assert all(bool(blocks[0, row, 7 - row]) for row in range(4, 8))


def test_mean_pool_takes_the_blocks_that_suit():
    themes = torch.nn.functional.normalize(torch.randn(8, 32), dim=1)
    k = themes.repeat_interleave(16, 0)[None, :, None]
    q = 30 * themes[[0, 0, 1, 0, 3, 2, 1, 5]].repeat_interleave(16, 0)[None, :, None]
    blocks = MeanPool(top_k=2, block=16, forced=("diagonal",)).choose(q, k, Call())[0, 0]
    assert [row.nonzero().flatten().tolist() for row in blocks] == [[0], [0, 1], [1, 2], [0, 3], [3, 4], [2, 5], [1, 6], [5, 7]]


def test_page_bounds_never_miss_the_page_of_the_greatest_logit_that_stands_out():
    q, k, _ = (x.detach() for x in tensors(3, 1, 200, 2, 2))
    k[:, 77] = 3 * q[:, 0]
    blocks = PageBounds(top_k=1, block=16, forced=()).choose(q, k, Call())
    assert blocks[:, :, 0].nonzero()[:, 2].tolist() == [77 // 16] * 6


def test_a_gate_decides():
    gate = lambda q, k, call: torch.eye(4).flip(1).expand(1, 2, 4, 4)  # noqa: E731
    q, k, _ = tensors(1, 64, 64, 2, 1)
    blocks = Gated(gate, top_k=1, block=16, forced=()).choose(q, k, Call())
    assert torch.equal(blocks[0, 0], torch.eye(4).flip(1).bool())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MeanPool(), ValueError, r"top_k, threshold must be given one at a time; got \(None, None\)"),
        (lambda: MeanPool(top_k=2, threshold=0.5), ValueError, "must be given one at a time"),
        (lambda: MeanPool(top_k=0), ValueError, "top_k must be an integer >= 1; got 0"),
        (lambda: PageBounds(threshold=0.0), ValueError, r"threshold must be in \(0, 1\]; got 0.0"),
        (lambda: VerticalSlash(slashes=0), ValueError, "slashes must be an integer >= 1; got 0"),
        (lambda: FlexPrefill(tau=2), ValueError, r"tau must be in \(0, 1\]; got 2"),
        (lambda: Gated(3, top_k=1), TypeError, "gate must be a function"),
        (lambda: Gated(lambda *_: torch.ones(2), top_k=1).layout(*tensors(1, 8, 8)[:2]), ValueError, r"gate must return a tensor of shape"),
        (lambda: VerticalSlash().layout(*tensors(1, 8, 8)[:2], causal=False), Unsupported, "VerticalSlash needs causal=True"),
        (lambda: FlexPrefill().layout(*tensors(1, 8, 8)[:2], causal=False), Unsupported, "FlexPrefill needs causal=True"),
    ],
)
def test_bad_selectors(make, error, words):
    with pytest.raises(error, match=words):
        make()
