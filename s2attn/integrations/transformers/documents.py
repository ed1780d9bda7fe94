"""Documents that share a row: found in position_ids, whatever the padding and the cache are.

Transformers looks for packed rows only where there is no mask and no cache, and takes every gap in
the positions for a new sequence. Here one rule, `document_starts`, holds for every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.core import Unsupported
from s2attn.integrations.transformers.places import PERHAPS_PACKED, Places
from s2attn.integrations.transformers.rows import boundaries, document_starts

_KNOWN = "_s2attn_documents"
_RESUMED = (
    "a cache must hold one document per row, and new tokens have positions below the number of "
    "tokens before them: the prompt was packed, positions repeat (which PastKeyValues allows), or "
    "they begin anew"
)
_COMPILED = "position_ids say that rows are packed: compiled s2attn needs their cu_seq_lens_q, and a cache must hold one document per row"


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch of packed rows, one after another.

    Attributes:
        cu: ``(documents + 1,)`` int64, their cumulative lengths without padding.
        queries, keys: None where there is no padding; else ``(cu[-1],)`` int64 indices of the real
            tokens among the ``B * T`` queries and among the ``B * S`` slots of keys.
        last: ``(B, T)`` bool, the tokens of the last document of each row; None where cu was given.
    """

    cu: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    last: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What positions say about new tokens: ``(B, T)`` each, ordered so that real ones are adjacent.

    Attributes:
        order: the slots in that order; None where they stay in place.
        real: which are no padding; None for all.
        starts: the first token of each document.
        inside: the starts behind the first real token of a row.
        resumed: first tokens that cannot follow what the cache holds.
        earlier: real keys of earlier calls, ``(B, 1)`` or one number for all rows.
    """

    order: Tensor | None
    real: Tensor | None
    starts: Tensor
    inside: Tensor
    resumed: Tensor
    earlier: Any


def find_documents(
    position_ids: Any,
    mask: Tensor | None,
    places: Places,
    shape: tuple[int, int, int],
    *,
    checks: bool,
    paged: bool,
) -> Documents | None:
    """The documents of rows that hold several of them; None where every row is one document.

    Args:
        position_ids: ``(B, T)`` or ``(1, T)``; None where a model does not tell its layers, so
            that only what the mask function saw is known.
        mask: what our mask function made for this call of the model; the result is kept on it.
        shape: B rows, T queries, S slots of keys.
        checks: in compiled code, whether this layer is the one that checks.
        paged: whether keys go into pages, which are known to hold one document per row.

    Raises:
        Unsupported: rows that a cache cannot continue; a compiled model without position_ids.
        RuntimeError: a compiled model was given several documents per row.
    """
    told = isinstance(position_ids, Tensor) and position_ids.dim() == 2
    if not told or position_ids.shape[1] != shape[1]:
        if places.flags & PERHAPS_PACKED:
            why = "compiled models whose layers are not told position_ids need cu_seq_lens_q"
            raise Unsupported("cannot determine whether rows are packed", {"position_ids": [why]})
        return None if places.cu is None else Documents(places.cu)
    if torch.compiler.is_compiling():
        if checks:
            tokens = _read(position_ids, places, shape, paged)
            torch._assert_async(~(tokens.inside.any() | tokens.resumed.any()), _COMPILED)
        return None
    known = None if mask is None else mask.__dict__.get(_KNOWN)
    if known is None or known[0] is not position_ids:
        known = position_ids, _look(_read(position_ids, places, shape, paged), places, shape)
        if mask is not None:
            mask.__dict__[_KNOWN] = known
    return known[1]


def _read(
    position_ids: Tensor,
    places: Places,
    shape: tuple[int, int, int],
    paged: bool,
) -> _Tokens:
    """Find where documents start, and which rows cannot continue what their cache holds.

    A cached row that is one document has no more tokens than positions, unless positions repeat.
    Pages hold one document per row, so that only a restart at 0 is looked for.
    """
    batch, tokens, slots = shape
    order = real = None
    earlier: Any = slots - tokens
    first = torch.arange(tokens, device=position_ids.device) == 0
    if places.keys is not None and places.queries is not None:
        slot, count = torch.arange(tokens, device=places.keys.device), places.queries[:, None]
        order, real = places.query_order, slot >= tokens - count
        if order is None:
            order, real = places.key_order, slot < count
        first = real & ~pad(real[:, :-1], (1, 0))
        earlier = places.keys[:, None] - count
    positions = position_ids.expand(batch, -1)
    positions = positions if order is None else positions.gather(1, order)
    starts = document_starts(positions, real)
    least = earlier
    if paged:
        least = earlier.clamp(max=1) if isinstance(earlier, Tensor) else min(earlier, 1)
    return _Tokens(order, real, starts, starts & ~first, first & (positions < least), earlier)


def _look(tokens: _Tokens, places: Places, shape: tuple[int, int, int]) -> Documents | None:
    if not bool(tokens.inside.any() | tokens.resumed.any()):  # the only synchronization, as a rule
        return None
    if bool(tokens.resumed.any()):
        raise Unsupported("cannot continue these rows of a cache", {"position_ids": [_RESUMED]})
    if bool((tokens.earlier > 0).any() if isinstance(tokens.earlier, Tensor) else tokens.earlier):
        raise Unsupported(
            "cannot continue these rows of a cache",
            {"position_ids": ["only its first call may hold packed rows"]},
        )
    starts, last = tokens.starts, tokens.starts.cumsum(1) == tokens.starts.sum(1, keepdim=True)
    if tokens.real is None or places.keys is None:
        return Documents(boundaries(starts), last=last)
    row = torch.arange(shape[0], device=starts.device)[:, None]
    queries, slots = (
        torch.arange(count, device=row.device).expand(shape[0], -1) for count in shape[1:]
    )  # fmt: skip
    kept = slots < places.keys[:, None]
    queries = queries if tokens.order is None else tokens.order
    slots = slots if places.key_order is None else places.key_order
    last = torch.zeros_like(last).scatter(1, queries, last & tokens.real)
    real = tokens.real
    return Documents(
        boundaries(starts[real]),
        (row * shape[1] + queries)[real],
        (row * shape[2] + slots)[kept],
        last,
    )
