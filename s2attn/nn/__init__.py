"""Modules: `SparseAttention` puts a pattern where a model has its attention."""

from s2attn.nn.attention import SparseAttention

__all__ = ["SparseAttention"]
