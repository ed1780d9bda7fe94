"""The model's keys and values in a `SparseCache`: what no later query reads is given back while text is written."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.cache import SparseCache, pages_needed
from s2attn.lab.model import ModelConfig
from s2attn.layout import default_block
from s2attn.nn import SparseAttention


class PagedCache:
    """A cache with room for ``batch`` sequences of ``capacity`` tokens, which come ``chunk`` at a time or fewer.

    Pages have ``page_size`` tokens, by default as many as the finest block of any layer.

    Attributes:
        sparse: the cache itself, which counts its bytes.
        sequences: the batch's sequences in it.
        most_bytes: the most that was ever in use.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        *,
        batch: int = 1,
        chunk: int = 512,
        page_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if page_size is None:
            page_size = min(default_block(config.recipe.pattern(layer)) for layer in range(config.layers))
        shape = {"num_kv_heads": config.kv_heads, "num_heads": config.heads, "num_layers": config.layers, "page_size": page_size}
        pages = batch * pages_needed(config.recipe, tokens=capacity, chunk=chunk, **shape)
        self.sparse = SparseCache(config.recipe, head_dim=config.head_dim, num_pages=pages, max_tokens=capacity, dtype=dtype, **shape)
        self.sequences = [self.sparse.open() for _ in range(batch)]
        self.recent = torch.zeros(batch, config.look_back, dtype=torch.int64)
        self.length = 0
        self.most_bytes = 0

    def attend(self, attention: SparseAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values of new tokens, let their queries attend, and give back what no later query reads."""
        scoring = {"scale": attention.scale, "softcap": attention.softcap, "sinks": attention.sinks, "backend": attention.backend}
        out = self.sparse.attend(self.sequences, attention.layer, q, k, v, **scoring)
        self.most_bytes = max(self.most_bytes, self.sparse.bytes_used)
        return out
