"""What a kernel walks: block lists per head with mask tiles, made by interval arithmetic."""

from s2attn.layout.blocks import from_blocks
from s2attn.layout.build import HeadRange, build_layout, default_block, layout_heads, pattern_hint, read_cu_seqlens
from s2attn.layout.count import dense_pairs
from s2attn.layout.flex import from_block_mask, to_block_mask
from s2attn.layout.index import BlockIndex, Spans, spans_of
from s2attn.layout.layout import Layout
from s2attn.layout.readers import last_readers
from s2attn.layout.table import from_block_table, to_block_table

__all__ = [
    "BlockIndex",
    "HeadRange",
    "Layout",
    "Spans",
    "build_layout",
    "default_block",
    "dense_pairs",
    "from_block_mask",
    "from_block_table",
    "from_blocks",
    "last_readers",
    "layout_heads",
    "pattern_hint",
    "read_cu_seqlens",
    "spans_of",
    "to_block_mask",
    "to_block_table",
]
