"""Where the real tokens of a batch stand: what our mask function tells every layer, as one small tensor of integers.

A padded row must give what the same row gives alone, so that sinks, block grids and windows count from its first real token. Sorting the
slots of a row, real ones first and in their order, makes it a row that is padded on the right, whatever its padding was; causal attention
and `s2attn.decode` then never see the padding. The sorting is done once for all layers, and no shape depends on the numbers.

The tensor has four axes, so that Transformers hands it on as it is: ``(rows, 1 + flags, 1, numbers)``, int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2attn.core import Unsupported
from s2attn.integrations.transformers.plan import check_trimmed
from s2attn.integrations.transformers.rows import boundaries, document_starts

WINDOW, PERHAPS_PACKED, PACKED = 1, 2, 4
_REMAP, _PACKED = "remap_positions_for_packed_sequence", "packed_sequence_mask_function"
_KNOWN = (_REMAP, _PACKED, "causal_mask_function", "bidirectional_mask_function", "sliding_window_overlay")


@dataclass(frozen=True, eq=False)
class Places:
    """What a mask tensor says, for T queries over S slots of keys.

    Attributes:
        flags: WINDOW: the model's own mask is a sliding window. PERHAPS_PACKED: a compiled model
            cannot look whether rows are packed.
        cu: None, or the cumulative lengths ``(sequences + 1,)`` of packed rows, all rows one after another.
        keys, queries: None where every slot counts; else ``(B,)`` real tokens among the slots of keys and of queries.
        key_order: None, or ``(B, S)`` slots, real ones first.
        query_order: None, or ``(B, T)`` slots of queries, real ones last. It is left out where queries and keys have the same slots.
    """

    flags: int = 0
    cu: Tensor | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    key_order: Tensor | None = None
    query_order: Tensor | None = None


def read_places(mask: Any, tokens: int, slots: int) -> Places:
    """The places that :func:`make_places` wrote for ``tokens`` queries and ``slots`` keys; any other mask is refused."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.dim() != 4 or mask.shape[2] != 1:
        came = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise Unsupported(
            f"s2attn cannot honour this attention mask: {came}",
            {"attention_mask": ["only 2-D padding masks (batch, tokens), and packed rows, have a meaning beside a pattern"]},
        )
    flags, count = mask.shape[1] - 1, mask.shape[3]
    if flags & PACKED:
        return Places(flags, cu=mask[0, 0, 0])
    if not count:
        return Places(flags)
    numbers = mask[:, 0, 0]
    keys, queries = numbers[:, 0], numbers[:, 1]
    if count == 2:
        return Places(flags, None, keys, queries)
    if count == 2 + slots and tokens == slots:
        return Places(flags, None, keys, queries, numbers[:, 2:])
    if count == 2 + slots + tokens:
        return Places(flags, None, keys, queries, numbers[:, 2 : 2 + slots], numbers[:, 2 + slots :])
    raise Unsupported(
        "the model's mask is not of the keys that its attention was given",
        {"attention_mask": [f"made for {count - 2} slots in all, used for {tokens} queries over {slots} keys"]},
    )


def make_places(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    q_length: Any = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    cache_position: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask function for Transformers: the tensor of `Places`.

    It is a new tensor for every call of a model, on which `find_documents` keeps what it found. Compiled code gets None where every query
    sees what causality allows.

    Arguments are those that Transformers gives; ``cache_position`` stands for ``q_length`` and ``q_offset`` in older versions, and in some
    q_length is that tensor.
    """
    compiling = torch.compiler.is_compiling()
    cache_position = q_length if isinstance(q_length, Tensor) else cache_position
    if cache_position is not None:
        q_length, device = cache_position.shape[0], cache_position.device
        q_offset = cache_position[0] if compiling else int(cache_position[0])
    kv_offset = kv_offset if isinstance(kv_offset, int) or compiling else int(kv_offset)
    flags, packed = _read_function(mask_function, local_size, use_vmap, config, compiling)
    _check_sizes(mask_function, attention_mask, q_length, kv_length)
    if not isinstance(kv_offset, int) or kv_offset:
        check_trimmed(config)
    if packed is not None:
        return _flagged(flags | PACKED, boundaries(packed).view(1, -1))
    if q_length == kv_length and isinstance(kv_offset, int) and not kv_offset:
        q_offset = 0  # there is room for nothing else
    ends = q_offset + q_length - kv_offset
    later = isinstance(ends, Tensor) or ends < kv_length  # slots behind the last token, as a static cache has
    if attention_mask is None or (not compiling and not _some(~attention_mask[:, : q_offset + q_length])):
        if later:
            rows = torch.ones(batch_size, 2, dtype=torch.int64, device=device) * q_length
            rows[:, 0] = ends
            return _flagged(flags, rows)
        return None if compiling and not flags else _flagged(flags, torch.empty(1, 0, dtype=torch.int64, device=device))
    real = attention_mask[:, kv_offset : kv_offset + kv_length]
    real = torch.nn.functional.pad(real, (0, kv_length - real.shape[1])) & (torch.arange(kv_length, device=real.device) < ends)
    order = torch.argsort(real.to(torch.int8), dim=1, descending=True, stable=True)
    keys = real.sum(1, keepdim=True)
    if not later and q_length == kv_length:
        return _flagged(flags, torch.cat([keys, keys, order], dim=1))
    asked = real.index_select(1, torch.arange(q_length, device=real.device) + (ends - q_length))
    query_order = torch.argsort(asked.to(torch.int8), dim=1, stable=True)
    return _flagged(flags, torch.cat([keys, asked.sum(1, keepdim=True), order, query_order], dim=1))


def _flagged(flags: int, numbers: Tensor) -> Tensor:
    return numbers[:, None, None].expand(-1, 1 + flags, -1, -1)


def _some(found: Tensor) -> bool:
    return bool(found.any())


def _check_sizes(mask_function: Callable[..., Any], mask: Tensor | None, tokens: int, slots: int) -> None:
    why = []
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        why.append(f"only 2-D padding masks are known; got {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}")
    if mask_function.__name__ == "bidirectional_mask_function" and tokens != slots:
        why.append(f"cross attention ({tokens} queries over {slots} keys) has no pattern")
    if why:
        raise Unsupported("s2attn cannot honour this attention mask", {"attention_mask": why})


def _read_function(
    function: Callable[..., Any], local_size: int | None, use_vmap: bool, config: Any, compiling: bool
) -> tuple[int, Tensor | None]:  # fmt: skip
    """Flags of a mask function of Transformers, and where sequences of packed rows start; unknown kinds are refused."""
    window = getattr(config, "sliding_window", None)
    flags, packed = WINDOW if local_size is not None else 0, None
    if compiling:  # closures cannot be looked into: whether a mask is more than its window is asked of position_ids
        joined = function.__name__ == "and_mask"
        flags, names = (flags | PERHAPS_PACKED, []) if joined else (flags, [function.__name__])
    else:
        parts = dict(_parts(function))
        names, packed = [*parts], _packed_starts(parts)
    unknown = [name for name in names if name not in _KNOWN]
    if use_vmap:
        unknown.append("a function of the caller's own")
    if local_size is not None and local_size != window:
        unknown.append(f"chunks of {local_size} tokens")
    if unknown:
        raise Unsupported("the model's mask is more than causality, padding and windows", {"mask": unknown})
    return flags, packed


def _packed_starts(parts: dict[str, dict[str, Any]]) -> Tensor | None:
    """Where sequences start ``(B, T)``, for models that do not hand position_ids to their layers.

    Before Transformers 5 or so the mask function holds its own numbers of sequences alone, which change at gaps too.
    """
    if _REMAP in parts:
        starts = document_starts(parts[_REMAP]["position_ids"])
    elif _PACKED in parts:
        numbers = parts[_PACKED]["packed_sequence_mask"]
        starts = torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    else:
        return None
    return starts if _some(starts[:, 1:]) else None


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the functions that a mask function was joined from, each with what it holds."""
    name = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
    cells = getattr(function, "__closure__", None) or ()
    inside = {key: cell.cell_contents for key, cell in zip(function.__code__.co_freevars, cells, strict=True)}
    if name == "and_masks":
        for part in inside["mask_functions"]:
            yield from _parts(part)
        return
    yield name, inside
    if name == _REMAP:
        yield from _parts(inside["mask_function"])
