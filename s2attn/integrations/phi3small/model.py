"""`Phi3Small`: tokens to logits, in the module names of the published checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2attn.core import bad_value, check_int
from s2attn.integrations.phi3small.config import Phi3SmallConfig
from s2attn.integrations.phi3small.files import load_weights, read_config
from s2attn.nn import SparseAttention, positions
from s2attn.nn.rotary import frequencies, rotate, rotations
from s2attn.patterns import Recipe

Rotation = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Projections and rotary positions around `SparseAttention`."""

    def __init__(self, config: Phi3SmallConfig, recipe: Recipe, layer: int):
        super().__init__()
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.group, self.head_dim = heads // groups, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, (heads + 2 * groups) * config.head_dim)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.attend = SparseAttention(recipe.pattern(layer), heads, groups, scale=config.scale, layer=layer)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        # A KV head's channels lie together: the queries of its group, its key, its value.
        groups = self.query_key_value(x).unflatten(-1, (-1, self.group + 2, self.head_dim))
        q, k, v = groups.split([self.group, 1, 1], dim=3)
        q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
        q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
        return self.dense(self.attend(q, k, v).flatten(2))


class Gegelu(nn.Module):
    """The feed-forward part: even channels gate odd ones, ``gate * sigmoid(1.702 gate) * (odd + 1)``, both bounded by a limit."""

    def __init__(self, config: Phi3SmallConfig):
        super().__init__()
        self.limit = config.gegelu_limit
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.ffn_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        gate, linear = self.up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
        if self.limit is not None:
            # Infinities stay what they are, as the model had it in training: an overflow shall be seen.
            gate = torch.where(gate.isinf(), gate, gate.clamp(max=self.limit))
            linear = torch.where(linear.isinf(), linear, linear.clamp(-self.limit, self.limit))
        return self.dropout(self.down_proj(gate * torch.sigmoid(1.702 * gate) * (linear + 1)))


class Block(nn.Module):
    """Attention and the feed-forward part, each behind a LayerNorm, each added to the stream."""

    def __init__(self, config: Phi3SmallConfig, recipe: Recipe, layer: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attn = Attention(config, recipe, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = Gegelu(config)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stream(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: Phi3SmallConfig, recipe: Recipe):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout_prob)
        self.layers = nn.ModuleList(Block(config, recipe, layer) for layer in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.multiplier = config.mup_embedding_multiplier or 0.0

    def forward(self, tokens: Tensor, rotation: Rotation) -> Tensor:
        x = self.dropout(self.embed_tokens(tokens))
        x = x * self.multiplier if self.multiplier > 0 else x
        for layer in self.layers:
            x = layer(x, rotation)
        return self.final_layernorm(x)


class Phi3Small(nn.Module):
    """Phi-3-small: int64 tokens ``(B, T)`` to logits ``(B, T, vocabulary)``, whose attention is `s2attn.SparseAttention`.

    `s2attn.generate`, `s2attn.stream` and `s2attn.SparseCache` work on it as it is. Its state dict has the names of the published
    checkpoints.

    Args:
        config: as its ``config.json`` has it.
        recipe: other patterns than the model's own.
        context: the longest text that it will see, ``max_position_embeddings`` by default. A model whose configuration has
            ``rope_scaling`` turns its heads by the long factors if that is more than ``original_max_position_embeddings``, and by the
            short ones otherwise, for every text: keys that a cache holds keep their angles.

    Raises:
        ValueError, TypeError: also a recipe for another number of layers or heads.
    """

    def __init__(self, config: Phi3SmallConfig, *, recipe: Recipe | None = None, context: int | None = None):
        super().__init__()
        self.config = config
        self.recipe = config.recipe if recipe is None else config.check_recipe(recipe)
        longest = config.max_position_embeddings
        self.context = longest if context is None else check_int("context", context, 1)
        if self.context > longest:
            raise bad_value("context", f"must be at most max_position_embeddings ({longest})", context)
        self.model = Stream(config, self.recipe)
        self._kept: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        recipe: Recipe | None = None,
        context: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Phi3Small:
        """Read a checkpoint as it is published, ready to write: ``config.json`` beside ``model.safetensors`` or its shards and index.

        Args:
            folder: where these files are; nothing is downloaded, and no code in it is run.
            recipe, context: as of the class.
            dtype: of the weights; that of the files when left out.
            device: where the weights go, one after another.

        Raises:
            ValueError: files that are missing or broken; weights that are missing, too many, or of another shape, by their names.
            Unsupported: a configuration with something that this model does not have.
        """
        with torch.device("meta"):
            model = cls(Phi3SmallConfig.from_dict(read_config(folder)), recipe=recipe, context=context)
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        model.load_state_dict(load_weights(folder, shapes, model.turns("cpu"), dtype=dtype, device=device), assign=True)
        return model.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, float32; those of numbers that stand for no token are the lowest that there is."""
        if tokens.shape[1] > self.context:
            raise bad_value("tokens", f"must be at most {self.context} in a text, the context of this model", tokens.shape[1])
        x = self.model(tokens, rotations(positions(tokens), *self._angles(tokens.device)))
        logits = F.linear(x, self.model.embed_tokens.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.mup_width_multiplier:
            logits = logits / self.config.mup_width_multiplier
        return logits.index_fill(-1, self._kept[tokens.device][1], torch.finfo(logits.dtype).min)

    def turns(self, device: torch.device | str) -> Tensor:
        """How far each pair of channels turns per position, float32 ``(head_dim / 2,)``."""
        config, rope = self.config, self.config.rope_scaling
        plain = frequencies(config.head_dim, config.rope_embedding_base, device)
        if rope is None:
            return plain * config.rope_position_scale
        factors = rope.short_factor if self.context <= rope.original_max_position_embeddings else rope.long_factor
        return plain / torch.tensor(factors, dtype=torch.float32, device=device)

    def _angles(self, device: torch.device) -> tuple[Tensor, float]:
        # Plain attributes, not buffers: a model that is turned to bfloat16 shall keep exact angles.
        if device not in self._kept:
            self._kept[device] = self.turns(device), torch.tensor(self.config.unused_tokens, dtype=torch.int64, device=device)
        rope = self.config.rope_scaling
        return self._kept[device][0], 1.0 if rope is None else rope.size(self.context, self.config.max_position_embeddings)
