"""Modules: `SparseAttention` puts a pattern where a model has its attention; `positions` and `look_back` say where its tokens stand."""

from s2attn.nn.attention import SparseAttention
from s2attn.nn.places import look_back, positions

__all__ = ["SparseAttention", "look_back", "positions"]
