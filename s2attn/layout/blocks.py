"""From masks of whole blocks, which a selector chose on the device, to a layout; nothing goes through the CPU but a few numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.layout.convert import sorted_entries
from s2attn.layout.entries import Entries, index_from
from s2attn.layout.index import BlockIndex, Spans, spans_of
from s2attn.layout.layout import Layout


def from_blocks(
    chosen: Sequence[Tensor], lengths: Sequence[tuple[int, int]], *, block: int = 64, causal: bool = True, packed: bool | None = None
) -> Layout:
    """The layout that lists the chosen blocks of each sequence, whole but for what comes after the query and after the end.

    Args:
        chosen: for each sequence a bool mask ``(heads, query blocks, key blocks)``; all on one device.
        lengths: for each sequence its query and key tokens ``(T, S)``; queries sit at the end, ``q_pos = i + S - T``.
        block: tokens per block.
        causal: cut keys after the query. Chosen blocks without any pair are left out.
        packed: whether calls give packed tensors; by default when there is more than one sequence.

    Raises:
        ValueError, TypeError: masks that do not fit the lengths.

    >>> from_blocks([torch.ones(2, 2, 2, dtype=torch.bool)], [(100, 100)])
    Layout(heads=2, seqlen_q=100, seqlen_k=100, block=64, entries=6, tiles=2, device='cpu')
    """
    check_block("block", block)
    heads, device = _checked(chosen, lengths, block)
    q_spans = spans_of([t for t, _ in lengths], block, [s - t for t, s in lengths]).to(device)
    k_spans = spans_of([s for _, s in lengths], block).to(device)
    line, idx, head = _chosen_entries(chosen, lengths, block)
    tile, tiles, seen = _tiles(q_spans, k_spans, line, idx, block, causal)
    line, idx, head, tile = line[seen], idx[seen], head[seen], tile[seen]
    ends = torch.bincount(head, minlength=heads).cumsum(0).tolist()
    parts = [slice(lo, hi) for lo, hi in zip([0, *ends[:-1]], ends, strict=True)]
    entries: list[Entries] = [sorted_entries(line[part], idx[part], tile[part]) for part in parts]
    like = BlockIndex(*(torch.zeros(0, dtype=torch.int64, device=device) for _ in range(5)))
    index = index_from(entries, list(range(heads)), len(q_spans), like)
    total = [sum(pair[axis] for pair in lengths) for axis in (0, 1)]
    layout = Layout(block, causal, index, tiles, q_spans, k_spans, len(lengths) > 1 if packed is None else packed, *total)
    return layout.proven()  # holds its invariants by construction, which tests prove


def _checked(chosen: Sequence[Tensor], lengths: Sequence[tuple[int, int]], block: int) -> tuple[int, torch.device]:
    if not chosen or len(chosen) != len(lengths):
        raise bad_value("chosen", f"must have one mask for each of the {len(lengths)} sequences, at least one", len(chosen))
    for mask, (seqlen_q, seqlen_k) in zip(chosen, lengths, strict=True):
        check_int("lengths", seqlen_q, 0)
        check_int("lengths", seqlen_k, 0)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise bad_kind("chosen", "must hold bool tensors", mask)
        expected = (chosen[0].shape[0], -(-seqlen_q // block), -(-seqlen_k // block))
        if mask.shape != expected or not expected[0] or mask.device != chosen[0].device:
            raise bad_value("chosen", f"must hold masks of shape {expected} on one device, with at least one head", tuple(mask.shape))
    return chosen[0].shape[0], chosen[0].device


def _chosen_entries(chosen: Sequence[Tensor], lengths: Sequence[tuple[int, int]], block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query block, key block and head of all chosen blocks: head after head, and inside a head line after line."""
    found, first_line, first_block = [], 0, 0
    for mask, (seqlen_q, seqlen_k) in zip(chosen, lengths, strict=True):
        head, line, idx = mask.nonzero(as_tuple=True)
        found.append((line + first_line, idx + first_block, head))
        first_line, first_block = first_line - (-seqlen_q // block), first_block - (-seqlen_k // block)
    line, idx, head = (torch.cat(part) for part in zip(*found, strict=True))
    if len(found) > 1:
        order = torch.sort(head, stable=True).indices
        line, idx, head = line[order], idx[order], head[order]
    return line, idx, head


def _tiles(q_spans: Spans, k_spans: Spans, line: Tensor, idx: Tensor, block: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tile number of each entry (-1 for full ones), the distinct tiles, and which entries have a pair at all."""
    q_length, k_length = q_spans.length.long()[line], k_spans.length.long()[idx]
    # Beyond these bounds the distance between the blocks no longer changes what causality allows.
    ahead = (q_spans.pos.long()[line] - k_spans.pos.long()[idx]).clamp(-block, block) if causal else torch.full_like(line, block)
    seen = ahead + q_length > 0
    partial = seen & ((k_length < block) | (ahead < block - 1))
    # One number for the three, since rows of a matrix are slow to compare; their order is that of the numbers.
    base = block + 1
    kinds, which = torch.unique((((ahead + block) * base + q_length) * base + k_length)[partial], return_inverse=True)
    token = torch.arange(block, device=line.device)
    query, key = token[:, None], token[None, :]
    after, rows, columns = (x[:, None, None] for x in (kinds // base**2 - block, kinds // base % base, kinds % base))
    tiles = (key <= query + after) & (query < rows) & (key < columns)
    tile = torch.full_like(line, -1)
    tile[partial] = which
    return tile, tiles, seen
