"""s2attn: exact attention that reads only the keys it needs.

A *pattern* says which keys a query may see, a *layout* is the block index made from it, `attention` computes it exactly on whatever
machine is there, and `merge` joins partial results. `describe` and `plot` judge a pattern before a GPU is spent on it.
"""

from typing import Any

from s2attn.core import Unsupported
from s2attn.layout import HeadRange, Layout, build_layout
from s2attn.nn import SparseAttention
from s2attn.ops import attention, merge, warmup
from s2attn.patterns import (
    Blocks,
    ByRange,
    Dense,
    Dilated,
    Global,
    Local,
    LongNet,
    Pattern,
    PerHead,
    Power,
    Random,
    Recipe,
    Sink,
    Stride,
    Window,
    parse_pattern,
    preset,
)

__version__ = "0.1.0"

__all__ = [
    "Blocks",
    "ByRange",
    "Comparison",
    "Dense",
    "Dilated",
    "Global",
    "HeadRange",
    "HostedCache",
    "Layout",
    "Local",
    "LongNet",
    "Pattern",
    "PerHead",
    "Power",
    "Random",
    "Recipe",
    "Report",
    "Sampling",
    "Sink",
    "SparseAttention",
    "SparseCache",
    "Stride",
    "Suggestion",
    "Unsupported",
    "Window",
    "XAttention",
    "attention",
    "balanced_shards",
    "build_layout",
    "compare",
    "context_attention",
    "context_traffic",
    "decode",
    "decode_cascade",
    "describe",
    "describe_context",
    "generate",
    "head_range",
    "hyper_attention",
    "merge",
    "overlapped_attention",
    "overlapped_projection",
    "parse_pattern",
    "patch",
    "patched",
    "plan_layers",
    "plot",
    "plot_context",
    "preset",
    "store_kv",
    "stream",
    "suggest",
    "ulysses_attention",
    "unpatch",
    "warmup",
    "warmup_decode",
]

# The analysis, the selectors, serving and hosts are loaded when they are first asked for: attention alone does not need them.
_LAZY = {
    "Comparison": "s2attn.analysis.compare",
    "HostedCache": "s2attn.cache.hosted",
    "Report": "s2attn.analysis.report",
    "Sampling": "s2attn.nn.sampling",
    "Shards": "s2attn.distributed.shards",
    "SparseCache": "s2attn.cache.sparse",
    "Suggestion": "s2attn.analysis.suggest",
    "XAttention": "s2attn.selectors",
    "balanced_shards": "s2attn.distributed.balance",
    "compare": "s2attn.analysis.compare",
    "context_attention": "s2attn.distributed.context",
    "context_traffic": "s2attn.distributed.traffic",
    "decode": "s2attn.ops.decode",
    "decode_cascade": "s2attn.ops.cascade",
    "describe": "s2attn.analysis.describe",
    "describe_context": "s2attn.analysis.context",
    "generate": "s2attn.nn.generation",
    "head_range": "s2attn.distributed.heads",
    "hyper_attention": "s2attn.selectors",
    "overlapped_attention": "s2attn.distributed.projection",
    "overlapped_projection": "s2attn.distributed.projection",
    "patch": "s2attn.integrations.transformers",
    "patched": "s2attn.integrations.transformers",
    "plan_layers": "s2attn.cache.host_plan",
    "plot": "s2attn.analysis.plot",
    "plot_context": "s2attn.analysis.context",
    "store_kv": "s2attn.ops.store",
    "stream": "s2attn.nn.generation",
    "suggest": "s2attn.analysis.suggest",
    "ulysses_attention": "s2attn.distributed.ulysses",
    "unpatch": "s2attn.integrations.transformers",
    "warmup_decode": "s2attn.ops.warmup_decode",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
