"""`store_kv`: write new keys and values into the pages of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value
from s2attn.ops.decode import check_page_scale, check_pages


def store_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write the keys and values of new tokens into their slots, in place: slot s is token ``s % page_size`` of page ``s // page_size``.

    Args:
        k, v: ``(tokens, G, D)`` and ``(tokens, G, Dv)``, or with a batch axis before them; any strides.
        k_pages, v_pages: as in `decode`; different pages must not share memory.
        slot_mapping: ``(tokens,)``, or with the batch axis, int32 or int64. Tokens with a negative slot are left out (vLLM's padding).
        k_scale, v_scale: ``(G,)`` float32: numbers are divided by them on their way into float8 pages, and cut to what float8 can hold.

    Raises:
        ValueError, TypeError: a bad argument, named with its rule, before anything is written: also a slot beyond the last page, and a slot
            that is named twice.

    >>> k_pages, v_pages = torch.zeros(2, 4, 16, 1, 8)
    >>> store_kv(torch.ones(3, 1, 8), torch.ones(3, 1, 8), k_pages, v_pages, torch.tensor([17, -1, 2]))
    >>> k_pages[..., 0].sum((1, 2)).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    _check(k, v, k_pages, v_pages, slot_mapping)
    check_page_scale("k_scale", k_scale, k_pages)
    check_page_scale("v_scale", v_scale, v_pages)
    slots = slot_mapping.reshape(-1).long()
    kept = (slots >= 0).nonzero()[:, 0]
    slots, size = slots[kept], k_pages.shape[1]
    if len(slots):
        last = int(slots.max())
        if last >= k_pages.shape[0] * size:
            raise bad_value("slot_mapping", f"must name slots below {k_pages.shape[0] * size}, the size of the cache", last)
        if len(torch.unique(slots)) < len(slots):
            raise bad_value("slot_mapping", "must name no slot twice", "repeated slots")
    for new, pages, factor in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        numbers = new.reshape(-1, *new.shape[-2:])[kept]
        if pages.dtype == torch.float8_e4m3fn:
            numbers = numbers.float() if factor is None else numbers.float() / factor[:, None]
            most = torch.finfo(pages.dtype).max
            numbers = numbers.clamp(-most, most)
        with torch.no_grad():
            pages[slots // size, slots % size] = numbers.to(pages.dtype)


def _check(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    for name, tensor in (("k", k), ("v", v), ("k_pages", k_pages), ("v_pages", v_pages), ("slot_mapping", slot_mapping)):
        if not isinstance(tensor, Tensor):
            raise bad_kind(name, "must be a tensor", tensor)
        if tensor.device != k_pages.device:
            raise bad_value(name, f"must lie on the device of k_pages, {k_pages.device}", tensor.device)
    check_pages(k_pages, v_pages)
    if slot_mapping.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slot_mapping must be an int32 or int64 tensor; got {slot_mapping.dtype}")
    for name, new, pages in (("k", k, k_pages), ("v", v, v_pages)):
        if not new.is_floating_point() or pages.dtype not in (new.dtype, torch.float8_e4m3fn):
            raise TypeError(f"{name} must have the dtype of its pages, {pages.dtype}; got {new.dtype}")
        if new.shape != (*slot_mapping.shape, *pages.shape[2:]):
            rule = f"must have shape {(*slot_mapping.shape, *pages.shape[2:])}, by slot_mapping and {name}_pages"
            raise bad_value(name, rule, tuple(new.shape))
