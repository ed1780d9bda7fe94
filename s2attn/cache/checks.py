"""What keys and values must be to go into the pages of a cache."""

from __future__ import annotations

from torch import Tensor

from s2attn.core import Unsupported, bad_kind, bad_value
from s2attn.ops.checks import autocast_to_pages
from s2attn.ops.step import LayerCall
from s2attn.patterns import Pattern


def kept_pattern(call: LayerCall) -> Pattern:
    """The pattern of a layer that a cache can serve."""
    if not isinstance(call.pattern, Pattern):
        why = "it chooses keys from each q, so that nothing can be given back; PageBounds.pages chooses among the pages of a cache"
        raise Unsupported("a cache serves patterns, which say before what later queries read", {type(call.pattern).__name__: [why]})
    if not call.causal:
        raise Unsupported("a cache serves causal attention", {"SparseAttention": ["it was made with causal=False"]})
    return call.pattern


def check_new(k: Tensor, v: Tensor, pools: tuple[Tensor, Tensor], num_kv_heads: int, axes: int) -> None:
    """Kind, shape, dtype and device of keys and values that shall be stored; three axes where they are packed, four elsewhere."""
    for name, new, pages in zip(("k", "v"), (k, v), pools, strict=True):
        if not isinstance(new, Tensor):
            raise bad_kind(name, "must be a tensor", new)
        rule = f"({'total' if axes == 3 else 'batch, tokens'}, {num_kv_heads}, {pages.shape[-1]})"
        if new.dim() != axes or tuple(new.shape[-2:]) != (num_kv_heads, pages.shape[-1]) or new.shape[:-2] != k.shape[:-2]:
            raise bad_value(name, f"must have shape {rule}", tuple(new.shape))
        if autocast_to_pages(new, pages).dtype != pages.dtype:
            raise TypeError(f"{name} must have the dtype of the cache, {pages.dtype}; got {new.dtype}")
        if new.device != pages.device:
            raise bad_value(name, f"must lie on the device of the cache, {pages.device}", new.device)
