"""A small causal language model over bytes: RMSNorm, rotary positions, grouped queries, SwiGLU, and a pattern per layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2attn.core import bad_value, check_int
from s2attn.lab.data import VOCABULARY
from s2attn.nn import SparseAttention
from s2attn.patterns import Dense, Recipe


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model and the recipe of its layers; goes to and from JSON.

    ``look_back`` says how many bytes before a byte are added to its embedding: small models of bytes learn much faster so.

    >>> config = ModelConfig(layers=2)
    >>> ModelConfig.from_json(config.to_json()) == config
    True
    """

    layers: int = 4
    width: int = 128
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    hidden: int = 384
    vocabulary: int = VOCABULARY
    look_back: int = 2
    rope_base: float = 10000.0
    recipe: Recipe = Recipe(Dense())

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head_dim", "hidden", "vocabulary"):
            check_int(name, getattr(self, name), 1)
        check_int("look_back", self.look_back, 0)
        if self.heads % self.kv_heads:
            raise bad_value("heads", f"must be a multiple of kv_heads ({self.kv_heads})", self.heads)
        if self.head_dim % 2:
            raise bad_value("head_dim", "must be even, for rotary positions", self.head_dim)

    def with_recipe(self, recipe: Recipe) -> ModelConfig:
        return replace(self, recipe=recipe)

    def to_json(self) -> str:
        fields = {**asdict(replace(self, recipe=Recipe(Dense()))), "recipe": json.loads(self.recipe.to_json())}
        return json.dumps(fields, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        fields = json.loads(text)
        recipe = Recipe.from_json(json.dumps(fields.pop("recipe")))
        return cls(**fields, recipe=recipe)


class KeyValueCache(Protocol):
    """What a model asks of a cache.

    Attributes:
        length: tokens that all layers have been given.
        recent: ``(B, look_back)`` int64, the last tokens.
    """

    length: int
    recent: Tensor

    def attend(self, attention: SparseAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values of new tokens, and let their queries attend to all of their layer."""
        ...


class Cache:
    """Keys and values of all layers for the tokens seen so far, in one buffer of ``capacity`` tokens per layer."""

    def __init__(self, config: ModelConfig, capacity: int, *, batch: int = 1, dtype: torch.dtype = torch.float32):
        shape = (config.layers, 2, batch, capacity, config.kv_heads, config.head_dim)
        self.buffer = torch.empty(shape, dtype=dtype)
        self.recent = torch.zeros(batch, config.look_back, dtype=torch.int64)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.buffer.shape[3]

    def attend(self, attention: SparseAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values of new tokens, and let their queries attend to all of their layer."""
        return attention(q, *self.append(attention.layer, k, v))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values behind the ``length`` known ones and return all of them."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise bad_value("cache", f"must have room for {end} tokens", self.capacity)
        keys, values = self.buffer[layer]
        keys[:, self.length : end], values[:, self.length : end] = k, v
        return keys[:, :end], values[:, :end]


class Attention(nn.Module):
    """Projections and rotary positions around `SparseAttention`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.project_in = nn.Linear(config.width, query + 2 * key, bias=False)
        self.project_out = nn.Linear(query, config.width, bias=False)
        self.attend = SparseAttention(config.recipe.pattern(layer), config.heads, config.kv_heads, layer=layer)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        config = self.config
        qkv = self.project_in(x).unflatten(-1, (config.heads + 2 * config.kv_heads, config.head_dim))
        q, k, v = qkv.split([config.heads, config.kv_heads, config.kv_heads], dim=2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        out = self.attend(q, k, v) if cache is None else cache.attend(self.attend, q, k, v)
        return self.project_out(out.flatten(2))


class Block(nn.Module):
    """Attention and a SwiGLU network, each behind an RMSNorm, each added to the stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.width)
        self.attention = Attention(config, layer)
        self.norm_mlp = nn.RMSNorm(config.width)
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotation, cache)
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """Bytes to logits; with a cache it continues where the cache ends (prefill, chunked prefill and decode are one call).

    Two models with the same seed and shape start with the same weights, whatever their recipes.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.earlier = nn.ModuleList(nn.Embedding(config.vocabulary, config.width) for _ in range(config.look_back))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self._start(seed)

    def _start(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Layers that write to the stream start smaller, so that its variance does not grow with depth.
                shrink = (2 * self.config.layers) ** -0.5 if name.endswith(("project_out.weight", "down.weight")) else 1.0
                std = 0.1 if name.startswith(("embedding", "earlier")) else shrink * weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=std, generator=generator)

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits ``(B, T, vocabulary)`` for int64 ``tokens`` ``(B, T)``, which follow the tokens that the cache knows."""
        start = cache.length if cache is not None else 0
        rotation = rotations(start, tokens.shape[1], self.config.head_dim, self.config.rope_base)
        x = self.embed(tokens, cache)
        for block in self.blocks:
            x = block(x, rotation, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return F.linear(self.norm(x), self.embedding.weight)

    def embed(self, tokens: Tensor, cache: KeyValueCache | None) -> Tensor:
        """The embeddings of each byte and of the ``look_back`` bytes before it, added; zero bytes stand before the first."""
        back = self.config.look_back
        before = cache.recent if cache is not None else tokens.new_zeros(len(tokens), back)
        known = torch.cat((before, tokens), dim=1)
        x = self.embedding(tokens)
        for distance, earlier in enumerate(self.earlier, start=1):
            x = x + earlier(known[:, back - distance : known.shape[1] - distance])
        if cache is not None:
            cache.recent = known[:, known.shape[1] - back :]
        return x


def rotations(start: int, length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(length, 1, head_dim / 2)`` of the rotary angles (arXiv:2104.09864) from position ``start`` on."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(start, start + length, dtype=torch.float32)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the two halves of every head of ``x`` ``(B, T, heads, head_dim)`` by the angles of its position."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
