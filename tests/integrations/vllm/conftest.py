"""Tiny random models, and what Transformers writes with them when every head of every layer sees what its pattern allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from s2attn import Recipe
from tests.support import dense_mask

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # logits far apart, so that rounding does not decide between two tokens
}


def save_llama(folder: Path, **config: Any) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, **config)).save_pretrained(folder)
    return str(folder)


def save_gemma(folder: Path) -> str:
    """A model that caps its logits, without sliding windows."""
    torch.manual_seed(0)
    full = ["full_attention"] * SHAPE["num_hidden_layers"]
    Gemma2ForCausalLM(Gemma2Config(**SHAPE, layer_types=full, attn_logit_softcapping=2.0)).save_pretrained(folder)
    return str(folder)


@lru_cache(maxsize=64)
def mask_of(recipe: Recipe, layer: int, heads: int, kv_heads: int, longest: int) -> Tensor:
    return dense_mask(recipe.pattern(layer), heads, kv_heads, longest, longest, layer=layer)


def masked(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **others: Any) -> tuple[Tensor, None]:
    """Attention as Transformers asks for it, by the recipe in the configuration, with a mask written out for every head."""
    heads, kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
    recipe, longest = Recipe.from_json(module.config.oracle_recipe), module.config.max_position_embeddings
    allowed = mask_of(recipe, module.layer_idx, heads, kv_heads, longest)[:, :length, :length]
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scaling
    cap = getattr(module.config, "attn_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    seen = logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return (seen @ value).transpose(1, 2), None


@torch.no_grad()
def write(folder: str, recipe: Recipe, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The likeliest tokens, without any cache."""
    AttentionInterface.register("oracle", masked)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="oracle", dtype=torch.float32).eval()
    model.config.oracle_recipe = recipe.to_json()
    texts = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
        texts.append(tokens[len(prompt) :])
    return texts


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Saves a model of a kind, with more for its configuration, and says where."""
    save = {"llama": save_llama, "gemma": save_gemma}
    return lambda kind, **config: save[kind](tmp_path_factory.mktemp(kind), **config)


@pytest.fixture(scope="session")
def greedy() -> Callable[[str, Recipe, list[list[int]], int], list[list[int]]]:
    return write
