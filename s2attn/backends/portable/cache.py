"""Plans that are kept as long as their layout's tensors live."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from s2attn.backends.portable.plan import Plan, make_plan
from s2attn.layout import Layout

_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cached_plan(layout: Layout, batch: int, num_heads: int, num_kv_heads: int) -> Plan:
    """The plan of a layout for so many batch entries and heads, made on first use.

    The key is the layout's ``rows.full`` tensor and the identity of all others, not the `Layout` object: an operator that takes
    tensors builds a new object around the same tensors at every call.
    """
    key, *others = layout.rows.full, layout.rows.ptr, layout.rows.tile_ptr, layout.rows.idx, layout.rows.tile, layout.tiles
    others += [*layout.q_spans.tensors(), *layout.k_spans.tensors()]
    shape = batch, num_heads, num_kv_heads
    known: list[tuple[tuple[int, int, int], list[Tensor], Plan]] = _PLANS.setdefault(key, [])
    for other_shape, tensors, plan in known:
        if other_shape == shape and all(a is b for a, b in zip(tensors, others, strict=True)):
            return plan
    plan = make_plan(layout, *shape)
    known.append((shape, others, plan))
    return plan
