"""Plans, kept with their layout."""

from __future__ import annotations

from s2attn.backends.portable.plan import Plan, make_plan
from s2attn.layout import Layout


def cached_plan(layout: Layout, batch: int, num_heads: int, num_kv_heads: int) -> Plan:
    """The plan of a layout for so many batch entries and heads, made on first use."""
    shape = batch, num_heads, num_kv_heads
    return layout.derive(("portable", *shape), lambda: make_plan(layout, *shape))
