"""s2attn: exact attention that reads only the keys it needs.

A *pattern* says which keys a query may see, a *layout* is the block index made from it, `attention` computes it exactly on whatever
machine is there, and `merge` joins partial results. `describe` and `plot` judge a pattern before a GPU is spent on it.
"""

from s2attn.core import Unsupported
from s2attn.layout import HeadRange, Layout, build_layout
from s2attn.nn import SparseAttention
from s2attn.ops import attention, merge
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
    "Sink",
    "SparseAttention",
    "Stride",
    "Unsupported",
    "Window",
    "attention",
    "build_layout",
    "merge",
    "parse_pattern",
    "preset",
]
