"""Text written through a `SparseCache` is the text written without it, token for token, and takes fewer bytes."""

from __future__ import annotations

import pytest
import torch

from s2attn import Dense, Local, Power, Recipe, Sink, Stride, Window
from s2attn.lab.generate import cache_error, generate, prefill
from s2attn.lab.model import Cache, LanguageModel, ModelConfig
from s2attn.lab.paged import PagedCache

S2 = Local(2, block=16) | Stride(2, block=16)
SMALL = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48, recipe=Recipe(S2, dense_layers=[0]))


def prompt_of(length: int) -> bytes:
    return bytes(torch.randint(256, (length,), generator=torch.Generator().manual_seed(0)).tolist())


@pytest.mark.parametrize("recipe", [Recipe(Dense()), SMALL.recipe, Recipe(Sink(4) | Window(40)), Recipe(Power(block=16))], ids=str)
def test_logits_equal_those_without_a_cache(recipe: Recipe) -> None:
    model = LanguageModel(SMALL.with_recipe(recipe)).eval()
    cache = PagedCache(model.config, 160, chunk=50)
    made = generate(model, prompt_of(120), 40, chunk=50, cache=cache)
    assert cache_error(model, made) < 1e-5
    assert cache.length == 159 and cache.sparse.length(cache.sequences[0], 1) == 159
    assert made.new == generate(model, prompt_of(120), 40).new


def test_a_batch_of_sequences() -> None:
    model = LanguageModel(SMALL).eval()
    tokens = torch.randint(256, (3, 100), generator=torch.Generator().manual_seed(1))
    cache = PagedCache(SMALL, 100, batch=3, chunk=32)
    with torch.no_grad():
        plain, paged = model(tokens), prefill(model, tokens, cache, chunk=32)
    torch.testing.assert_close(paged, plain, atol=2e-5 * float(plain.abs().max()), rtol=0)


def test_four_thousand_tokens_with_eviction_equal_those_without() -> None:
    """Greedy bytes behind a long prompt, once with pages given back and once with everything kept."""
    config = SMALL.with_recipe(Recipe(Local(4, block=16) | Stride(8, block=16)))
    model, prompt, count = LanguageModel(config, seed=1).eval(), prompt_of(3700), 396
    cache = PagedCache(config, 4096, chunk=64)
    sparse = generate(model, prompt, count, temperature=0.0, chunk=64, cache=cache)
    kept = generate(model, prompt, count, temperature=0.0, cache=Cache(config, 4096))
    assert sparse.new == kept.new
    assert len(set(sparse.new)) > 1
    assert cache.most_bytes < 0.3 * cache.sparse.bytes_dense
    assert cache.sparse.bytes_waiting == 0


def test_a_text_goes_on_from_its_cache() -> None:
    """What was written and what follows later is what one call writes."""
    model = LanguageModel(SMALL).eval()
    whole = generate(model, prompt_of(60), 30, temperature=0.0)
    cache = PagedCache(SMALL, 90)
    first = generate(model, prompt_of(60), 20, temperature=0.0, cache=cache)
    second = generate(model, first.new[-1:], 10, temperature=0.0, cache=cache)
    assert first.new + second.new == whole.new
