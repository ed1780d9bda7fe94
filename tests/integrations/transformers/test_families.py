"""Seven families of models: a dense recipe is sdpa, a sparse one is the mask spelled out token by token, and generation is consistent."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Dense, Local, Recipe, Sink, Stride, Window
from tests.integrations.transformers.models import FAMILIES, oracle, text, tiny

SPARSE = Recipe(Local(2, block=16) | Stride(3, block=16), layers={0: Sink(3) | Window(20)})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_dense_recipe_is_sdpa(family: str) -> None:
    model, tokens = tiny(family), text(2, 90)
    expected = model(tokens).logits
    with s2attn.patched(model, Dense()):
        assert model.config._attn_implementation == "s2attn"
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-6, rtol=0)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_sparse_recipe_is_its_mask(family: str) -> None:
    model, tokens = tiny(family), text(2, 100)
    dense = model(tokens).logits
    with oracle(model, SPARSE):
        expected = model(tokens).logits
    with s2attn.patched(model, SPARSE):
        got = model(tokens).logits
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    assert (got - dense).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_tokens_are_the_same_with_and_without_a_cache(family: str) -> None:
    model = s2attn.patch(tiny(family), SPARSE)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(text(2, 70), **how, use_cache=cached) for cached in (True, False))
    assert torch.equal(with_cache, without)
    static = model.generate(text(2, 70), **how, cache_implementation="static", disable_compile=True)
    assert torch.equal(with_cache, static)
