"""Presets against the modules and the code that their papers released: published numbers in, published masks out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from s2attn import Blocks, attention, preset
from s2attn.patterns import Global, Head, Local, Pattern, Shape, Stride
from s2attn.testing.masks import dense_mask


def read_by(module: nn.Module, length: int, queries: range, **inputs: Tensor) -> np.ndarray:
    """``(queries, length)`` bool: which inputs outputs of a model with one layer depend on, by gradients; a token reads itself."""
    x = torch.randn(1, length, SHAPE["hidden_size"], requires_grad=True)
    out = module(inputs_embeds=x, **inputs).last_hidden_state[0] @ torch.randn(SHAPE["hidden_size"])
    rows = [torch.autograd.grad(out[i], x, retain_graph=True)[0][0].abs().sum(-1) > 0 for i in queries]
    return torch.stack(rows).numpy()


def seen(pattern: Pattern, length: int, *, causal: bool = False) -> np.ndarray:
    at = np.arange(length)
    return pattern.allowed(at[:, None], at, Shape(length, causal), Head(1, 4, 4))


SHAPE = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
}


@pytest.mark.parametrize(("window", "tokens"), [(8, 1), (16, 5)])
def test_longformer_reads_what_the_module_reads(window: int, tokens: int) -> None:
    length = 4 * window
    config = transformers.LongformerConfig(**SHAPE, attention_window=[window], max_position_embeddings=length + 8, pad_token_id=1)
    model = transformers.LongformerModel(config, add_pooling_layer=False).eval()
    everybody = torch.zeros(1, length, dtype=torch.int64)
    everybody[:, :tokens] = 1
    found = read_by(model, length, range(0, length, 3), global_attention_mask=everybody)
    np.testing.assert_array_equal(found, seen(preset("longformer", window=window, global_tokens=tokens), length)[::3])


def test_bigbird_reads_what_the_module_reads() -> None:
    block, blocks, drawn = 16, 12, 2
    length = block * blocks
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sparse = {
        "attention_type": "block_sparse",
        "block_size": block,
        "num_random_blocks": drawn,
        "max_position_embeddings": length,
    }
    model = transformers.BigBirdModel(transformers.BigBirdConfig(**SHAPE, **none, **sparse), add_pooling_layer=False)
    found = read_by(model.train(), length, range(5, length, block)).reshape(blocks, blocks, block)  # it draws in training alone
    assert (found.all(axis=2) == found.any(axis=2)).all()  # whole blocks
    found, expected = (
        found[..., 0],
        seen(preset("bigbird", random=0, block=block), length)[5::block, ::block],
    )
    assert not (expected & ~found).any()
    # What is left are the module's draws: other blocks than ours, as many, for all but the global rows.
    assert (found & ~expected).sum(axis=1).tolist() == [0, *[drawn] * (blocks - 2), 0]


def test_bigbird_by_its_rule() -> None:
    length, block = 1024, 64
    q, k = np.arange(length)[:, None] // block, np.arange(length) // block
    ends = (0, length // block - 1)
    rule = (np.abs(q - k) <= 1) | np.isin(q, ends) | np.isin(k, ends)
    np.testing.assert_array_equal(seen(preset("bigbird", random=0), length), rule)
    with_random = seen(preset("bigbird"), length).reshape(16, block, 16, block)[:, 0, :, 0]
    base = rule[::block, ::block]
    assert not (base & ~with_random).any() and 0 < (with_random & ~base).sum() <= 3 * 14
    causal = seen(preset("bigbird", random=0), length, causal=True)
    np.testing.assert_array_equal(causal, (np.arange(length) <= np.arange(length)[:, None]) & ((q - k <= 1) | (k == 0)))


def test_numbers_that_have_no_half_are_refused() -> None:
    for name, settings, message in [
        ("longformer", {"window": 7}, "window must be even: it counts both sides; got 7"),
        ("longformer", {"window": 0}, "window must be an integer >= 2; got 0"),
        ("bigbird", {"window": 2}, "window must be odd: it counts both sides; got 2"),
        (
            "bigbird",
            {"global_blocks": 3},
            "global_blocks must be even: it counts both sides; got 3",
        ),
        ("bigbird", {"random": -1}, "Random n must be an integer >= 1; got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            preset(name, **settings)


@pytest.mark.parametrize("length", [256, 250, 90])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [Global(20, last=30), Global(16, last=16), Global(1, last=1), Global(500, last=500)],
    ids=repr,
)
def test_global_tokens_at_both_ends(pattern: Global, length: int, causal: bool) -> None:
    q, k = np.arange(length)[:, None], np.arange(length)
    first = (q < pattern.n) | (k < pattern.n)
    last = (q >= length - pattern.last) | (k >= length - pattern.last)
    rule = first & (k <= q) if causal else first | last
    for block in (16, 64):
        got = dense_mask(pattern, 1, 1, length, length, causal=causal)[0].numpy()
        np.testing.assert_array_equal(got, rule)
        x = torch.randn(1, length, 1, 8)
        out, lse = attention(x, x, x, pattern | Local(1, block), causal=causal, return_lse=True)
        scores = x[0, :, 0].double() @ x[0, :, 0].double().T * 8**-0.5
        local = (q // block == k // block) & ((k <= q) | (not causal))
        expected = scores.masked_fill(torch.from_numpy(~(rule | local)), -torch.inf).logsumexp(-1)
        torch.testing.assert_close(lse[0, 0].double(), expected, rtol=0, atol=1e-5)
        assert out.isfinite().all()


@pytest.mark.parametrize(("heads", "stride"), [(2, 8), (4, 8), (8, 8), (12, 8), (3, 8), (1, 5), (6, 16), (32, 16)])
def test_s2_spreads_its_heads_as_the_original_does(heads: int, stride: int) -> None:
    """``head_sliding_step = max(1, int(vert_stride / n_heads))``, then ``(k_block + h * step) % stride == 0`` in every layer."""
    step = max(1, int(stride / heads))
    at = np.arange(40)
    for layer in (0, 1, 5):
        for head in range(heads):
            pattern = preset("s2", local=2, stride=stride, block=16).at(Head(head, heads, heads, layer))
            distance = at[:, None] - at
            rule = ((distance < 2) | ((at + head * step) % stride == 0)) & (distance >= 0)
            np.testing.assert_array_equal(seen(pattern, 640, causal=True)[::16, ::16], rule)


def test_offsets_of_two_heads_at_stride_8() -> None:
    assert [preset("s2").at(Head(h, 2, 2)).parts[1].offset for h in range(2)] == [0, 4]
    assert [Stride(8).at(Head(h, 2, 2)).offset for h in range(2)] == [
        0,
        1,
    ]  # Stride itself goes on in the next layer
    assert [Stride(8).at(Head(h, 2, 2, layer=1)).offset for h in range(2)] == [2, 3]
    assert [preset("phi3_small").default.at(Head(h, 2, 1)).parts[1].offset for h in range(2)] == [
        1,
        5,
    ]


def test_streaming_llm_keeps_the_reference_s_recent_tokens() -> None:
    """The released code keeps ``start_size`` first and ``recent_size`` last entries of the past, then appends the new token."""
    window, length = 32, 100
    mask = seen(preset("streaming_llm", sink=4, window=window), length, causal=True)
    for query in range(length):
        past = list(range(query))
        kept = past if len(past) <= 4 + window - 1 else past[:4] + past[-(window - 1) :]
        assert np.flatnonzero(mask[query]).tolist() == [*kept, query]


def test_a_mask_of_blocks_is_the_published_block_sparse_mask() -> None:
    """Block-sparse FlashAttention (arXiv:2205.14135, section 3.3): a block is computed where the mask is not zero."""
    mask = np.array([[True, False, False], [False, True, False], [True, False, True]])
    np.testing.assert_array_equal(seen(Blocks(mask, block=16), 48), mask.repeat(16, 0).repeat(16, 1))
