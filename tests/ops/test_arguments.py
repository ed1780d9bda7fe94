"""Arguments that look right and are not: swapped axes, masks and strings as patterns; numbers that graphs hold as sizes."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch

import s2attn
from s2attn import Dense, Local, Recipe, SparseAttention, Stride, Window
from s2attn.layout import Layout, build_layout, from_blocks, spans_of
from s2attn.ops import warmup

S2 = Local(1, block=16) | Stride(2, block=16)
ORDER = r"pass \(batch, heads, seq, head_dim\) as x\.transpose\(1, 2\)"


def shaped(q: tuple[int, int], k: tuple[int, int]):
    """q and k ``(1, tokens, heads, 8)``, and v as k."""
    return torch.randn(1, *q, 8), torch.randn(1, *k, 8), torch.randn(1, *k, 8)


@pytest.mark.parametrize(("q", "k"), [((8, 128), (8, 128)), ((2, 1024), (2, 1024)), ((4, 64), (4, 64)), ((1, 256), (1, 128))])
def test_swapped_axes_give_a_warning(q, k):
    with pytest.warns(UserWarning, match=f"q and k look swapped, with {q[0]} queries of {q[1]} heads .*{ORDER}") as caught:
        s2attn.attention(*shaped(q, k), Dense())
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((1, 32), (300, 8)),  # decoding
        ((1, 128), (1, 8)),  # the first token
        ((1, 32), (1, 32)),
        ((5, 40), (5, 40)),  # a short prompt
        ((3, 128), (130, 128)),  # a chunk over 128 KV heads
        ((128, 8), (128, 8)),
    ],
)
def test_calls_in_the_right_order_give_none(q, k):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s2attn.attention(*shaped(q, k), Dense())


def test_the_warning_comes_once_for_each_place():
    tensors = shaped((8, 128), (8, 128))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            s2attn.attention(*tensors, Dense())
        s2attn.attention(*tensors, Dense())
    assert len(caught) == 2


def test_errors_about_heads_name_the_order():
    with pytest.raises(ValueError, match=f"q must have a multiple of the 96 heads of k; .*{ORDER}; got 64"):
        s2attn.attention(*shaped((8, 64), (8, 96)), Dense())


MASK = torch.ones(40, 40, dtype=torch.bool).tril()
NO_PATTERNS = [
    (MASK, r"s2attn\.Layout\.from_dense\(mask\)"),
    (MASK.numpy(), r"s2attn\.Layout\.from_dense\(mask\)"),
    ("dense", r"s2attn\.parse_pattern\(text\) reads one from a string"),
    (Recipe(Dense()), r"take recipe\.pattern\(layer\)"),
]
PLACES = {
    "attention": lambda wrong: s2attn.attention(*shaped((40, 4), (40, 2)), wrong),
    "build_layout": lambda wrong: build_layout(wrong, 4, 2, 40),
    "module": lambda wrong: SparseAttention(wrong, 4, 2),
    "decode": lambda wrong: decode(wrong),
    "decode_cascade": lambda wrong: decode(wrong, s2attn.decode_cascade),
    "warmup": partial(warmup, seqlen=40, num_heads=2, head_dim=8, device="cpu"),
}


def decode(pattern, call=s2attn.decode):
    pages, table = torch.randn(2, 16, 2, 8), torch.tensor([[0, 1]])
    return call(torch.randn(1, 1, 4, 8), pages, pages, pattern, block_table=table, seq_lens=torch.tensor([20]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("wrong", "hint"), NO_PATTERNS)
def test_what_is_no_pattern_is_told_how_to_become_one(place, wrong, hint):
    with pytest.raises(TypeError, match=f"pattern must be a Pattern.*{hint}; got"):
        PLACES[place](wrong)


def test_scale_and_softcap_may_come_from_dynamic_sizes():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def call(q, k, v):
        return s2attn.attention(q, k, v, S2, scale=1.0 / q.shape[1] ** 0.5, softcap=2.0 * q.shape[1])

    for tokens in (40, 56, 72):
        q, k, v = shaped((tokens, 4), (tokens, 2))
        torch.testing.assert_close(call(q, k, v), s2attn.attention(q, k, v, S2, scale=tokens**-0.5, softcap=2.0 * tokens))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_numbers_must_be_finite(wrong):
    given = shaped((40, 4), (40, 2))
    with pytest.raises(ValueError, match="scale must be finite"):
        s2attn.attention(*given, S2, scale=wrong)
    with pytest.raises(ValueError, match="softcap must be positive and finite"):
        s2attn.attention(*given, S2, softcap=wrong)


LAYOUTS = {
    "pattern": lambda: build_layout(S2, 4, 2, seqlen_q=40),
    "dense": lambda: Layout.from_dense(MASK.clone(), block=16),
    "blocks": lambda: from_blocks([torch.ones(2, 3, 3, dtype=torch.bool)], [(40, 40)], block=16),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_inference_mode_serves_training(name):
    with torch.inference_mode():
        layout = LAYOUTS[name]()
        assert layout.columns is not None
    assert not any(tensor.is_inference() for tensor in layout.tensors())
    q, k, v = (x.requires_grad_() for x in shaped((40, 4), (40, 2)))
    found = torch.autograd.grad(s2attn.attention(q, k, v, layout).square().sum(), (q, k, v))
    expected = torch.autograd.grad(s2attn.attention(q, k, v, LAYOUTS[name]()).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_lengths_of_inference_mode_serve_training():
    with torch.inference_mode():
        cu = torch.tensor([0, 13, 40])
    q, k, v = (x[0].requires_grad_() for x in shaped((40, 4), (40, 2)))
    s2attn.attention(q, k, v, S2, cu_seqlens_q=cu, cu_seqlens_k=cu).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: build_layout(Window(3), 1, 1, 64, 2**31),
        lambda: build_layout(Window(3), 1, 1, 2**31, 2**31),
        lambda: build_layout(Window(3), 1, 1, cu_seqlens_q=torch.tensor([0, 9, 64]), cu_seqlens_k=torch.tensor([0, 2**30, 2**31])),
        lambda: spans_of([2**31], 64),
    ],
)
def test_more_tokens_than_int32_counts_are_refused(make):
    with pytest.raises(ValueError, match=r"lengths must have at most 2147483647 tokens in all.*; got 2147483648"):
        make()


def test_the_last_token_that_int32_counts():
    layout = build_layout(Window(3), 1, 1, 64, 2**31 - 1)
    assert layout.seqlen_k == 2**31 - 1 and int(layout.q_spans.pos[0]) == 2**31 - 65
    assert layout.rows.line(0, 0)[1] and int(layout.rows.idx.max()) == 2**25 - 1
