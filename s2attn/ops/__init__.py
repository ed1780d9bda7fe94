"""One op with one meaning: validation, torch.library registration, autograd, and the merging of partial results."""

from s2attn.ops.attention import attention
from s2attn.ops.lines import last_queries
from s2attn.ops.merge import merge
from s2attn.ops.pooled import bound_mass, key_bounds, mean_pool
from s2attn.ops.score import antidiagonal
from s2attn.ops.source import forget_layouts, layout_bytes
from s2attn.ops.warmup import warmup

__all__ = [
    "antidiagonal",
    "attention",
    "bound_mass",
    "forget_layouts",
    "key_bounds",
    "last_queries",
    "layout_bytes",
    "mean_pool",
    "merge",
    "warmup",
]
