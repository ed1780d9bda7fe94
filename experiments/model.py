"""A small causal language model over bytes or tokens: RMSNorm, rotary positions, grouped queries, SwiGLU, and a pattern per layer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiments.data import VOCABULARY
from s2attn.core import bad_value, check_int
from s2attn.nn import SparseAttention, look_back, positions
from s2attn.nn.rotary import frequencies, rotate, rotations
from s2attn.patterns import Dense, Recipe

MOST_LAYERS = MOST_HEADS = 1024
MOST_WIDTH = 2**31 - 1
"""Larger numbers are taken for mistakes."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model and the recipe of its layers; goes to and from JSON.

    ``look_back`` says how many tokens before a token are added to its embedding: small models of bytes learn much faster so.
    ``rope_factor`` divides positions before they are rotated (position interpolation, arXiv:2306.15595).

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
    rope_factor: float = 1.0
    recipe: Recipe = Recipe(Dense())

    def __post_init__(self) -> None:
        check_int("layers", self.layers, 1, MOST_LAYERS)
        for name in ("heads", "kv_heads"):
            check_int(name, getattr(self, name), 1, MOST_HEADS)
        for name in ("width", "head_dim", "hidden", "vocabulary"):
            check_int(name, getattr(self, name), 1, MOST_WIDTH)
        check_int("look_back", self.look_back, 0, MOST_LAYERS)
        if self.heads % self.kv_heads:
            raise bad_value("heads", f"must be a multiple of kv_heads ({self.kv_heads})", self.heads)
        if self.head_dim % 2:
            raise bad_value("head_dim", "must be even, for rotary positions", self.head_dim)
        for name in ("rope_base", "rope_factor"):
            if not getattr(self, name) > 0:
                raise bad_value(name, "must be positive", getattr(self, name))

    def turns(self, device: torch.device | str = "cpu") -> Tensor:
        """How far each pair of channels turns per position, in radians, float32 ``(head_dim / 2,)``."""
        return frequencies(self.head_dim, self.rope_base, device) / self.rope_factor

    @property
    def num_parameters(self) -> int:
        """Weights of the model, counted without making it.

        >>> config = ModelConfig(layers=3, look_back=1)
        >>> config.num_parameters == LanguageModel(config).num_parameters
        True
        """
        heads = 2 * self.heads + 2 * self.kv_heads
        block = self.width * (heads * self.head_dim + 3 * self.hidden + 2)
        tables = self.vocabulary * (1 + self.look_back)
        return self.width * (tables + 1) + self.layers * block

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


class Attention(nn.Module):
    """Projections and rotary positions around `SparseAttention`."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.project_in = nn.Linear(config.width, query + 2 * key, bias=False)
        self.project_out = nn.Linear(query, config.width, bias=False)
        self.attend = SparseAttention(config.recipe.pattern(layer), config.heads, config.kv_heads, layer=layer)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
        config = self.config
        qkv = self.project_in(x).unflatten(-1, (config.heads + 2 * config.kv_heads, config.head_dim))
        q, k, v = qkv.split([config.heads, config.kv_heads, config.kv_heads], dim=2)
        q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)  # the angles are float32, whatever autocast says
        if cu_seqlens is None:
            seen = self.attend(q, k, v)
        else:
            flat = (part.flatten(0, 1) for part in (q, k, v))
            seen = self.attend(*flat, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens).unflatten(0, x.shape[:2])
        return self.project_out(seen.flatten(2))


class Block(nn.Module):
    """Attention and a SwiGLU network, each behind an RMSNorm, each added to the stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.width)
        self.attention = Attention(config, layer)
        self.norm_mlp = nn.RMSNorm(config.width)
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotation, cu_seqlens)
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """Tokens to logits; inside a step of a `s2attn.SparseCache` they go on where the cache ends.

    Two models with the same seed and shape start with the same weights, whatever their recipes.

    Attributes:
        recompute: run each block again in the backward pass instead of keeping what is inside it (gradient checkpointing).
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.recompute = False
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

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits ``(B, T, vocabulary)`` for int64 ``tokens`` ``(B, T)``.

        Args:
            cu_seqlens: int32 ``(documents + 1,)``, cumulative lengths of documents that lie packed in the rows, row behind row; no
                document then sees anything of another, and its positions begin at 0.
        """
        place = positions(tokens) if cu_seqlens is None else packed_positions(tokens, cu_seqlens)
        rotation = rotations(place, self.config.turns(tokens.device))
        x = self.embed(tokens, None if cu_seqlens is None else place)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, cu_seqlens, use_reentrant=False)
            else:
                x = block(x, rotation, cu_seqlens)
        return F.linear(self.norm(x), self.embedding.weight)

    def embed(self, tokens: Tensor, place: Tensor | None = None) -> Tensor:
        """The embeddings of each token and of the ``look_back`` tokens before it, added; zeros stand before the first of a sequence.

        Args:
            place: int64 ``(B, T)``, the positions in their documents, for packed rows.
        """
        back = self.config.look_back
        rows = tokens if place is None else tokens.reshape(1, -1)
        known = look_back(rows, back)
        x = self.embedding(tokens)
        for distance, earlier in enumerate(self.earlier, start=1):
            before = known[:, back - distance : known.shape[1] - distance].reshape(tokens.shape)
            x = x + earlier(before if place is None else before.where(place >= distance, 0))
        return x


def packed_positions(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The position of each token in its own document, int64 ``(B, T)``; arguments as in :meth:`LanguageModel.forward`.

    >>> packed_positions(torch.zeros(2, 4), torch.tensor([0, 3, 4, 8])).tolist()
    [[0, 1, 2, 0], [0, 1, 2, 3]]
    """
    flat = torch.arange(tokens.numel(), device=tokens.device)
    starts = cu_seqlens.long()
    return (flat - starts[torch.searchsorted(starts, flat, right=True) - 1]).view(tokens.shape)
