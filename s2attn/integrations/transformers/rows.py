"""Rows of a batch, taken apart and put together again: slots in another order, sequences that share a row, a cache seen as pages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.core import Unsupported

PERHAPS_PACKED = 2
"""Flag of a mask that was made where nobody may look whether rows are packed."""
_KNOWN = "_s2attn_packed"


def take(x: Tensor, order: Tensor) -> Tensor:
    """``x`` ``(B, S, heads, width)`` with the slots of every row in this order ``(B, S)``."""
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def put(out: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """The slots back in their places, with 0 where they are not ``real`` ``(B, S)``."""
    out = torch.where(real[:, :, None, None], out, 0)
    return torch.zeros_like(out).scatter(1, order[:, :, None, None].expand(-1, -1, *out.shape[2:]), out)


def places_of(x: Tensor) -> Tensor:
    """0 and on, for the slots of ``x`` ``(B, S, ...)``."""
    return torch.arange(x.shape[1], device=x.device)


def as_pages(x: Tensor, length: int, size: int) -> Tensor:
    """``(B, G, S, width)`` as pages ``(B * G * length / size, size, G, width)``, the heads all of one memory.

    Without a copy where S is ``length``; the pages of KV head g of row b are ``(b * G + g) * length / size`` and on.
    """
    kv_heads, width = x.shape[1], x.shape[3]
    x = pad(x, (0, 0, 0, length - x.shape[2])) if length != x.shape[2] else x
    return x.contiguous().view(-1, size, 1, width).expand(-1, -1, kv_heads, -1)


def boundaries(packed: Tensor) -> Tensor:
    """Cumulative lengths of the sequences that ``packed`` ``(B, T)`` numbers within each row, the rows one after another."""
    begins = torch.ones_like(packed, dtype=torch.bool)
    begins[:, 1:] = packed[:, 1:] != packed[:, :-1]
    return torch.cat([begins.flatten().nonzero()[:, 0], torch.tensor([packed.numel()], device=packed.device)])


def packed_rows(position_ids: Tensor | None, batch: int, flags: int, layer: int) -> Tensor | None:
    """Cumulative lengths of the sequences in rows whose positions begin anew, as Transformers packs them; None for whole rows.

    Transformers looks for them where there is no cache only; a prompt that fills one is packed too. Looked at once for all layers of a
    model. Compiled code cannot look, and fails where it would have had to.
    """
    if position_ids is None or position_ids.dim() != 2:
        if flags & PERHAPS_PACKED:
            why = "compiled models whose layers are not told position_ids need cu_seq_lens_q"
            raise Unsupported("nobody knows whether rows are packed", {"position_ids": [why]})
        return None
    if torch.compiler.is_compiling():
        if layer == 0:
            whole = (position_ids[:, 1:] - position_ids[:, :-1] == 1).all()
            torch._assert_async(whole, "position_ids say that rows are packed: compiled s2attn needs their cu_seq_lens_q")
        return None
    version = None if position_ids.is_inference() else (position_ids._version, batch)  # torch does not count changes of inference tensors
    known = position_ids.__dict__.get(_KNOWN)
    if known is None or version is None or known[0] != version:
        numbers = (position_ids[:, 1:] - position_ids[:, :-1] != 1).cumsum(1)
        found = boundaries(pad(numbers, (1, 0)).expand(batch, -1)) if numbers[:, -1].any() else None
        known = position_ids.__dict__[_KNOWN] = version, found
    return known[1]
