"""`store_kv`: write new keys and values into the pages of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.backends import Writes, pick_store
from s2attn.core import bad_kind, bad_value
from s2attn.ops.checks import autocast_to_pages
from s2attn.ops.decode import check_page_scale, check_pages
from s2attn.ops.looks import may_look


def store_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
    validate: bool = True,
) -> None:
    """Write the keys and values of new tokens into their slots, in place: slot s is token ``s % page_size`` of page ``s // page_size``.

    Args:
        k, v: ``(tokens, G, D)`` and ``(tokens, G, Dv)``, or with a batch axis before them; any strides.
        k_pages, v_pages: as in `decode`; different pages must not share memory.
        slot_mapping: ``(tokens,)``, or with the batch axis, int32 or int64. Tokens with a negative slot are left out (vLLM's padding).
        k_scale, v_scale: ``(G,)`` float32: numbers are divided by them on their way into float8 pages, and cut to what float8 can hold.
        backend: as in `attention`.
        validate: look at the slots first. Without it, and always while a CUDA graph is captured, nothing is: tokens with a slot beyond the
            last page are left out too, and of several tokens with one slot any is kept.

    Raises:
        ValueError, TypeError: a bad argument, named with its rule, before anything is written: also a slot beyond the last page, and a slot
            that is named twice.

    >>> k_pages, v_pages = torch.zeros(2, 4, 16, 1, 8)
    >>> store_kv(torch.ones(3, 1, 8), torch.ones(3, 1, 8), k_pages, v_pages, torch.tensor([17, -1, 2]))
    >>> k_pages[..., 0].sum((1, 2)).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    k, v = autocast_to_pages(k, k_pages), autocast_to_pages(v, v_pages)
    _check(k, v, k_pages, v_pages, slot_mapping)
    check_page_scale("k_scale", k_scale, k_pages)
    check_page_scale("v_scale", v_scale, v_pages)
    rows_k, rows_v = (x.detach().reshape(-1, *x.shape[-2:]) for x in (k, v))
    new = Writes(rows_k, rows_v, k_pages.detach(), v_pages.detach(), slot_mapping.reshape(-1), k_scale, v_scale)
    chosen = pick_store(backend, new)
    if may_look(validate, k_pages):
        _check_slots(new)
    chosen.store(new)


def _check_slots(new: Writes) -> None:
    slots = new.slots[new.slots >= 0].long()
    if len(slots):
        last, room = int(slots.max()), new.k_pages.shape[0] * new.k_pages.shape[1]
        if last >= room:
            raise bad_value("slot_mapping", f"must name slots below {room}, the size of the cache", last)
        if len(torch.unique(slots)) < len(slots):
            raise bad_value("slot_mapping", "must name no slot twice", "repeated slots")


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
