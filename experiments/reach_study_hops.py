"""Hops: through how many layers a token has to be passed on before a later one can know it, exact to the token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from experiments.model import ModelConfig
from s2attn.core import bad_value, check_int
from s2attn.layout import build_layout
from s2attn.patterns import Pattern
from s2attn.patterns.runs import Array

NEVER = -1
"""In place of a number of hops: no path through the layers of this model."""


def hops(config: ModelConfig, seqlen: int, questions: Sequence[int], places: Sequence[int]) -> Array:
    """The least number of layers whose attention has to carry a token from a place to a question.

    The embedding of token i holds the tokens i - ``look_back`` .. i. In each layer a position keeps what it has (the stream), or reads
    it, in any head, from a position that its query sees. Every path is counted, whether or not training finds it; a model's
    output at a question cannot depend on a token whose entry is `NEVER`.

    Args:
        config: layers, heads, ``look_back`` and recipe of the model.
        seqlen: tokens that it reads, all visible ones before the question among them.
        questions, places: positions, from 0.

    Returns:
        int64 ``(questions, places)``: 0 where the embedding is enough, `NEVER` where there is no path.

    >>> from s2attn.patterns import Recipe, Window
    >>> config = ModelConfig(layers=2, heads=1, kv_heads=1, look_back=0, recipe=Recipe(Window(4)))
    >>> hops(config, 16, [15], [15, 12, 11, 9, 8]).tolist()
    [[0, 1, 2, 2, -1]]
    """
    seqlen = check_int("seqlen", seqlen, 1)
    for name, values in (("questions", questions), ("places", places)):
        if not values or not all(0 <= one < seqlen for one in values):
            raise bad_value(name, f"must be positions in 0 .. {seqlen - 1}, one at least", tuple(values))
    behind = torch.arange(seqlen)[:, None] - torch.tensor(list(places))[None, :]
    far = config.layers + 1
    least = torch.where((behind >= 0) & (behind <= config.look_back), 0, far)
    for layer in range(config.layers):
        seen = visible(config, seqlen, layer)
        read = torch.full_like(least, far)
        for moves in range(layer, -1, -1):
            # A product of 0s and 1s counts the positions that are seen and know it: float32 counts these exactly.
            read = read.where(seen @ (least <= moves).float() == 0, moves + 1)
        least = torch.minimum(least, read)
    found = least[torch.tensor(list(questions))]
    return found.where(found < far, NEVER).numpy().astype(np.int64)


def visible(config: ModelConfig, seqlen: int, layer: int) -> Tensor:
    """Which keys any head of a layer sees, float32 ``(seqlen, seqlen)`` of 0 and 1, from the layout that the model runs on."""
    return _visible(config.recipe.pattern(layer), config.heads, config.kv_heads, seqlen, layer)


@cache
def _visible(pattern: Pattern, heads: int, kv_heads: int, seqlen: int, layer: int) -> Tensor:
    return build_layout(pattern, heads, kv_heads, seqlen, seqlen, layer=layer).to_dense().any(0).float()
