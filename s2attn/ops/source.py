"""From what a call names (a pattern's text, or a layout's tensors) to the `Layout` object, found again on every later call.

An op of torch.library takes tensors, numbers and text only. A static pattern travels as text, so that a compiled graph holds nothing
but that text and works for every length; an explicit layout travels as its tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from s2attn.backends.checks import is_captured
from s2attn.core import BLOCKS, bad_value
from s2attn.layout import HeadRange, Layout, build_layout, default_block, layout_heads, read_cu_seqlens
from s2attn.patterns import Pattern

LAYOUT_TEXT = "layout"
LAYOUT_TENSORS = 14
"""Tensors of a layout; the cumulative lengths of the call follow them."""
HEADS_TEXT = "heads;"

_lock = Lock()
_layouts: OrderedDict[tuple, Layout] = OrderedDict()
_shared: WeakValueDictionary[tuple, Layout] = WeakValueDictionary()
"""The same layouts by what they were made of: layers whose heads have equal patterns use one."""
_heads_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Numbers of heads that were read, by their tensor. Only `s2attn.ops.sharded` makes such tensors, and nothing writes to them."""
_captured: set[Layout] = set()
_KEEP_LAYOUTS = 256
_KEEP_BYTES = 2 << 30


@dataclass(frozen=True)
class CallSizes:
    """What a layout depends on besides the pattern and the lengths of packed sequences: tokens, heads, and the device."""

    seqlen_q: int
    num_heads: int
    seqlen_k: int
    num_kv_heads: int
    device: torch.device


def pattern_text(pattern: Pattern, block: int | None, causal: bool, layer: int, heads: HeadRange | None) -> str:
    """A call with a pattern as one line of text; :func:`find_layout` reads it."""
    where = "" if heads is None else f"{heads.start},{heads.end},{heads.num_heads},{heads.num_kv_heads}"
    return f"{block or 0};{int(causal)};{layer};{where};{pattern.to_json()}"


def with_named_heads(text: str, num_heads: int, num_kv_heads: int) -> str:
    """The same call on some of so many global heads: their numbers, int64 ``(heads of the call,)``, are the last tensor of its index.

    Whoever cuts q, k and v by heads cuts that tensor with them, so that every process finds the patterns of the heads that it holds.
    """
    return f"{HEADS_TEXT}{num_heads};{num_kv_heads};{text}"


def with_block(text: str, block: int) -> str:
    """The same call with a block of its own."""
    return f"{block};{text.split(';', 1)[1]}"


@lru_cache(maxsize=256)
def block_for(text: str, page_size: int) -> int:
    """The block that suits the pattern of a call: its default, or the largest one up to that which divides the page size, unless 0."""
    most = max(BLOCKS[0], default_block(_read_pattern(text.split(";", 4)[4])))
    return next(size for size in reversed(BLOCKS) if size <= most and page_size % size == 0)


def layout_text(layout: Layout) -> str:
    """A call with an explicit layout as text; its tensors travel beside it."""
    return f"{LAYOUT_TEXT};{int(layout.causal)};{int(layout.packed)}"


def find_layout(text: str, index: list[Tensor], q: Tensor, k: Tensor) -> Layout:
    """The layout for a call of the op on q ``(B, T, H, D)`` and k ``(B, S, G, D)``; built when it is new, and checked when it was given."""
    if text.startswith(LAYOUT_TEXT):
        _, causal, packed = text.split(";")
        layout = Layout.from_tensors(index[:LAYOUT_TENSORS], causal=causal == "1", packed=packed == "1").checked
        _check_sequences(layout, index[LAYOUT_TENSORS:])
        return layout
    if text.startswith(HEADS_TEXT):
        text, index = _with_heads(text, index[-1], q.shape[2]), index[:-1]
    lengths = tuple(
        tuple(read_cu_seqlens(name, cu, total))
        for name, cu, total in zip(("cu_seqlens_q", "cu_seqlens_k"), index, (q.shape[1], k.shape[1]), strict=False)
    )
    return layout_of(text, CallSizes(q.shape[1], q.shape[2], k.shape[1], k.shape[2], q.device), lengths)


def _check_sequences(layout: Layout, given: list[Tensor]) -> None:
    """The cumulative lengths of a call next to a packed layout must be those of the layout."""
    for name, cu, spans, total in zip("qk", given, (layout.q_spans, layout.k_spans), (layout.seqlen_q, layout.seqlen_k), strict=False):
        numbers = read_cu_seqlens(f"cu_seqlens_{name}", cu, total)
        own = layout.derive(("sequences", name), spans.sequences)
        lengths = [after - before for before, after in pairwise(numbers)]
        if lengths[: len(own)] != own or any(lengths[len(own) :]):
            raise bad_value(f"cu_seqlens_{name}", f"must be the lengths that the layout was built for, {own}", lengths)


def layout_of(text: str, sizes: CallSizes, lengths: tuple[tuple[int, ...], ...] = ()) -> Layout:
    """The layout of a pattern's text; ``lengths`` are the cumulative lengths of queries and keys, empty where nothing is packed."""
    key = (text, sizes, lengths)
    with _lock:
        found = _layouts.get(key)
        if found is not None:
            _layouts.move_to_end(key)
            return found
    made = _build(text, sizes, lengths)
    made.derived.grown = _drop_old
    with _lock:
        _layouts[key] = made
    _drop_old()
    return made


def _drop_old() -> None:
    """Drop the least recently used layouts until the rest, with all that is derived from them, keeps to the bounds."""
    with _lock:
        while len(_layouts) > 1 and (len(_layouts) > _KEEP_LAYOUTS or layout_bytes() > _KEEP_BYTES):
            _layouts.popitem(last=False)


def layout_bytes() -> int:
    """Bytes of all layouts that calls have built and that are kept, with what is derived from them, on all devices."""
    return sum(layout.nbytes_held for layout in set(_layouts.values()))


def keep_captured(layout: Layout, *tensors: Tensor) -> None:
    """Keep a layout for good while work on ``tensors`` is captured: a CUDA graph holds addresses, and nobody says when it is gone."""
    if is_captured(*tensors):
        layout.derived.pin()
        _captured.add(layout)


def _with_heads(text: str, numbers: Tensor, count: int) -> str:
    """The text of a call with the range of its heads, which a tensor names."""
    _, num_heads, num_kv_heads, text = text.split(";", 3)
    heads = _heads_read.get(numbers)
    if heads is None:
        heads = _heads_read[numbers] = numbers.tolist()
    if not heads or heads != list(range(heads[0], heads[0] + count)):
        raise bad_value("heads", f"must be {count} consecutive numbers, one for each head of q", heads)
    block, causal, layer, _, spec = text.split(";", 4)
    return f"{block};{causal};{layer};{heads[0]},{heads[-1] + 1},{num_heads},{num_kv_heads};{spec}"


def _build(text: str, sizes: CallSizes, lengths: tuple[tuple[int, ...], ...]) -> Layout:
    block, causal, layer, where, spec = text.split(";", 4)
    heads = HeadRange(*(int(number) for number in where.split(","))) if where else None
    tokens: dict[str, Any]
    if lengths:
        cu_q, cu_k = (torch.tensor(numbers) for numbers in lengths)
        tokens = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    else:
        tokens = {"seqlen_q": sizes.seqlen_q, "seqlen_k": sizes.seqlen_k}
    settings: dict[str, Any] = {
        "block": int(block) or None,
        "causal": causal == "1",
        "layer": int(layer),
        "heads": heads,
        "device": sizes.device,
    }
    pattern = _read_pattern(spec)
    everyone = heads or HeadRange(0, sizes.num_heads, sizes.num_heads, sizes.num_kv_heads)
    resolved = layout_heads(pattern, everyone, sizes.num_kv_heads, int(layer))
    key = (resolved, int(block) or default_block(pattern), causal, sizes, lengths)
    with _lock:
        found = _shared.get(key)
    if found is not None:
        return found
    made = build_layout(pattern, sizes.num_heads, sizes.num_kv_heads, **tokens, **settings)
    with _lock:
        _shared[key] = made
    return made


@lru_cache(maxsize=256)
def _read_pattern(spec: str) -> Pattern:
    return Pattern.from_json(spec)


def forget_layouts() -> None:
    """Drop all layouts that calls have built from patterns, and all that is derived from them.

    Kept are the 256 least recently used ones at most, 2 GiB with what backends derive from them.
    Layouts that somebody else holds, and those of captured CUDA graphs, live on.

    >>> forget_layouts()
    >>> layout_bytes()
    0
    """
    with _lock:
        _layouts.clear()
