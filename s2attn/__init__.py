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
    "Dense",
    "Dilated",
    "Global",
    "HeadRange",
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
    "Unsupported",
    "Window",
    "XAttention",
    "attention",
    "build_layout",
    "decode",
    "decode_cascade",
    "describe",
    "generate",
    "hyper_attention",
    "merge",
    "parse_pattern",
    "patch",
    "patched",
    "plot",
    "preset",
    "store_kv",
    "stream",
    "unpatch",
    "warmup",
    "warmup_decode",
]

# The lab, the selectors, serving and hosts are loaded when they are first asked for: attention alone does not need them.
_LAZY = {
    "Report": "s2attn.lab.describe",
    "Sampling": "s2attn.nn.sampling",
    "SparseCache": "s2attn.cache.sparse",
    "XAttention": "s2attn.selectors",
    "decode": "s2attn.ops.decode",
    "decode_cascade": "s2attn.ops.cascade",
    "describe": "s2attn.lab.describe",
    "generate": "s2attn.nn.generation",
    "hyper_attention": "s2attn.selectors",
    "patch": "s2attn.integrations.transformers",
    "patched": "s2attn.integrations.transformers",
    "plot": "s2attn.lab.plot",
    "store_kv": "s2attn.ops.store",
    "stream": "s2attn.nn.generation",
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
