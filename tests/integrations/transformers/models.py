"""Tiny random models of every family that is tested, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from s2attn import Pattern, Recipe
from tests.support import dense_mask

FAMILIES = ["Llama", "Qwen3", "Mistral", "Phi3", "Gemma3Text", "GPTNeoX", "Olmo2"]
VOCABULARY = 61
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512}


def tiny(family: str = "Llama", implementation: str = "sdpa", **changes: Any) -> Any:
    """A model in float32, in eval mode, the same one every time."""
    own: dict[str, Any] = {} if family == "GPTNeoX" else {"num_key_value_heads": 2}
    if family in ("Qwen3", "Gemma3Text", "Gemma2"):
        own["head_dim"] = 8
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **TOKENS, **own, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def text(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@contextmanager
def oracle(model: Any, recipe: Recipe | Pattern, window: int | None = None) -> Iterator[None]:
    """Let the model attend by masks that are spelled out token by token: square calls, without padding and caches."""
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> tuple[Tensor, None]:
        pattern = recipe.pattern(module.layer_idx) if isinstance(recipe, Recipe) else recipe
        heads, tokens = query.shape[1], query.shape[2]
        mask = dense_mask(pattern, heads, kv_heads, tokens, tokens, causal=module.is_causal, layer=module.layer_idx)
        if more.get("sliding_window") is not None:
            place = torch.arange(tokens)
            mask = mask & (place[:, None] - place < more["sliding_window"])
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        scores = (query @ k.transpose(2, 3)) * more["scaling"]
        if more.get("softcap") is not None:
            scores = more["softcap"] * torch.tanh(scores / more["softcap"])
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("oracle", attend)
    before = config._attn_implementation
    model.set_attn_implementation("oracle")
    yield
    model.set_attn_implementation(before)
