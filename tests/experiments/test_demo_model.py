"""The demo's model: causal, the same with and without a cache, and carried by a checkpoint with its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.generate import cache_error, generate
from experiments.model import LanguageModel, ModelConfig
from experiments.train import load_model, save_model
from s2attn import Dense, Local, Recipe, Sampling, Sink, SparseCache, Stride, Window

SPARSE = Recipe(Local(2, block=16) | Stride(2, block=16), dense_layers=[0])
SMALL = ModelConfig(layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48, recipe=SPARSE)


def model_of(config: ModelConfig = SMALL, seed: int = 0) -> LanguageModel:
    return LanguageModel(config, seed=seed).eval()


def bytes_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("recipe", [Recipe(Dense()), SPARSE, Recipe(Sink(4) | Window(40))], ids=["dense", "s2", "streaming"])
@pytest.mark.parametrize("chunk", [1000, 50, 16])
def test_logits_with_a_cache_equal_those_without(recipe: Recipe, chunk: int) -> None:
    model, tokens = model_of(SMALL.with_recipe(recipe)), bytes_of(150)
    cache, cached = SparseCache.for_model(model, max_tokens=150, chunk=chunk), []
    sequence = cache.open()
    with torch.no_grad():
        plain = model(tokens)
        for piece in [*tokens[:, :130].split(chunk, dim=1), *tokens[:, 130:].split(1, dim=1)]:
            with cache.step([sequence], piece):
                cached.append(model(piece))
    assert cache.length(sequence) == 150
    torch.testing.assert_close(torch.cat(cached, dim=1), plain, atol=2e-5 * float(plain.abs().max()), rtol=0)


def test_a_later_byte_changes_no_earlier_logit() -> None:
    model, tokens = model_of(), bytes_of(96)
    changed = tokens.clone()
    changed[0, 60] = (changed[0, 60] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :60], after[:, :60])
    assert not torch.equal(before[:, 60:], after[:, 60:])


def test_equal_seeds_start_equal_whatever_the_recipe() -> None:
    dense, sparse = model_of(SMALL.with_recipe(Recipe(Dense()))), model_of(SMALL)
    for a, b in zip(dense.parameters(), sparse.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model_of(SMALL, seed=1).embedding.weight, dense.embedding.weight)


def test_layers_use_the_recipe() -> None:
    patterns = [block.attention.attend.pattern for block in model_of().blocks]
    assert patterns == [Dense(), SPARSE.default, SPARSE.default]


def test_a_checkpoint_brings_back_recipe_and_logits(tmp_path: Path) -> None:
    model, tokens = model_of(seed=5), bytes_of(80)
    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved").eval()
    assert loaded.config == model.config and loaded.config.recipe == SPARSE
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["recipe"]["version"] == 1
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder must hold config\.json and weights\.pt; got "):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"layers": 2}')
    with pytest.raises(ValueError, match=r"config\.json must describe a model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"heads must be a multiple of kv_heads \(2\); got 3"),
        ({"head_dim": 7}, "head_dim must be even, for rotary positions; got 7"),
        ({"layers": 0}, "layers must be an integer >= 1; got 0"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"heads": 4, "kv_heads": 2, **change})


def test_generation_repeats_with_its_seed_and_its_cache_is_exact() -> None:
    model, seen, how = model_of(), [], Sampling(12, temperature=0.8, seed=3)
    first = generate(model, b"def f(x):\n", how, chunk=4, on_byte=lambda: seen.append(1))
    again = generate(model, b"def f(x):\n", how, chunk=7)
    assert len(first.new) == 12 == len(seen) and first.new == again.new
    assert first.logits.shape == (12, 256)
    assert cache_error(model, first) < 1e-5


def test_zero_temperature_takes_the_likeliest_byte() -> None:
    made = generate(model_of(), b"import os", Sampling(8))
    assert list(made.new) == made.logits.argmax(dim=-1).tolist()


def test_cache_error_sees_a_wrong_logit() -> None:
    model = model_of()
    made = generate(model, b"import os", Sampling(8))
    made.logits[3, 7] += made.logits.abs().max()
    assert cache_error(model, made) > 0.1
