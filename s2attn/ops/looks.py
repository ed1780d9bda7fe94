"""Checks of paged calls that read numbers on the host: lengths and block tables.

Their cost does not grow with the length of a sequence, except for a minimum and a maximum over its row
of the block table. The lists of a layout are read only for sequences whose row holds a number that
names no page, as after an eviction.
"""

from __future__ import annotations

from itertools import pairwise
from math import lcm

import numpy as np
import torch
from torch import Tensor

from s2attn.backends import Pages
from s2attn.backends.checks import is_captured
from s2attn.core import bad_value
from s2attn.layout import Layout, read_cu_seqlens
from s2attn.layout.positions import UNIT, some_seen

Numbers = tuple[int, ...]


def may_look(validate: bool, *tensors: Tensor) -> bool:
    """Whether numbers of the device may be read: not without ``validate``, nor during graph capture."""
    return validate and not is_captured(*tensors)


def read_lengths(cu_seqlens_q: Tensor | None, seq_lens: Tensor, total_q: int, room: int) -> tuple[Numbers, Numbers]:
    """Cumulative queries, and tokens of each sequence, as numbers, checked: no sequence is longer than its table, ``room`` tokens."""
    tokens = tuple(seq_lens.tolist())
    if cu_seqlens_q is None:
        step = total_q // max(len(tokens), 1)
        cu_q = [step * number for number in range(len(tokens) + 1)]
    else:
        cu_q = read_cu_seqlens("cu_seqlens_q", cu_seqlens_q, total_q)
    if tokens and not (min(tokens) >= 0 and max(tokens) <= room):
        sequence = next(i for i, length in enumerate(tokens) if not 0 <= length <= room)
        rule = f"must be 0 to {room}, the tokens that block_table has room for"
        raise bad_value("seq_lens", rule, f"{tokens[sequence]} for sequence {sequence}")
    return tuple(cu_q), tokens


def cumulative_keys(cu_q: Numbers, tokens: Numbers) -> Numbers:
    """Cumulative lengths of keys: a sequence without new queries reads nothing, so none of its keys need a place in a layout."""
    cu_k = [0]
    for (before, after), length in zip(pairwise(cu_q), tokens, strict=True):
        cu_k.append(cu_k[-1] + (length if after > before else 0))
    return tuple(cu_k)


def check_sequences(layout: Layout, cu_q: Numbers, tokens: Numbers) -> None:
    """A packed layout that was handed in is of the very sequences of the call; a square one has a row for each of their positions."""
    if not layout.packed:
        if tokens and max(tokens) > layout.seqlen_k:
            raise bad_value("layout", f"must have a row for every position, {max(tokens)} by seq_lens", layout.seqlen_k)
        return
    queries = [after - before for before, after in pairwise(cu_q)]
    for name, spans, expected in (("queries", layout.q_spans, queries), ("keys", layout.k_spans, list(tokens))):
        found = torch.zeros(max(len(expected), int(spans.seq.max()) + 1 if len(spans) else 0), dtype=torch.int64, device=layout.device)
        found.index_add_(0, spans.seq.long(), spans.length.long())
        if found.tolist() != expected:
            raise bad_value("layout", f"must have sequences of {expected} {name}, by seq_lens and cu_seqlens_q or q", found.tolist())


def check_table(layout: Layout, pages: Pages, cu_q: Numbers, tokens: Numbers) -> None:
    """Refuse a block table that names no page of the cache where a query reads.

    Args:
        layout: packed, of these sequences; or square, with a row for each position.
        cu_q, tokens: cumulative queries, and tokens of each sequence.
    """
    table, size, num_pages = pages.table.cpu().numpy(), pages.page_size, pages.k.shape[0]
    suspects = []
    for sequence, (before, after, length) in enumerate(zip(cu_q, cu_q[1:], tokens, strict=False)):
        entries = table[sequence, :, : -(-length // size)]
        if after > before and length and (entries.min() < 0 or entries.max() >= num_pages):
            suspects.append((sequence, max(length - (after - before), 0), length))
    if not suspects:
        return
    sequence, kv_head, token = _units_read(layout, pages.kv_heads, _rows_asked(layout, suspects))
    number = token // size
    page = table[sequence, kv_head if table.shape[1] > 1 else 0, number]
    wrong = ((page < 0) | (page >= num_pages)).nonzero()[0]
    if len(wrong):
        at = wrong[0]
        rule = f"must name one of the {num_pages} pages wherever the pattern reads (-1 is an evicted page)"
        raise bad_value("block_table", rule, f"{page[at]} for sequence {sequence[at]}, KV head {kv_head[at]}, entry {number[at]}")


def _rows_asked(layout: Layout, suspects: list[tuple[int, int, int]]) -> np.ndarray:
    """``(4, n)`` int64: sequence, row of the layout, first and end of the row's tokens that are queries.

    ``suspects``: sequence, position of its first query, tokens.
    """
    block, found = layout.block, []
    if layout.packed:
        of, length = (x.cpu().numpy() for x in (layout.q_spans.seq, layout.q_spans.length))
        row = np.isin(of, [sequence for sequence, _, _ in suspects]).nonzero()[0]
        return np.stack([of[row], row, np.zeros_like(row), length[row]]).astype(np.int64)
    for sequence, first, length in suspects:
        row = np.arange(first // block, -(-length // block))
        low, high = np.maximum(first - row * block, 0), np.minimum(length - row * block, block)
        found.append(np.stack([np.full_like(row, sequence), row, low, high]))
    return np.concatenate(found, axis=1)


def _units_read(layout: Layout, kv_heads: int, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence, KV head and first position of each unit of keys that some query of the rows sees."""
    ptr, full, tile_ptr, idx, tile = (x.cpu().numpy() for x in layout.rows.tensors())
    # The pairs of a KV head and a list that some query head has.
    combinations = lcm(kv_heads, layout.heads)
    both = np.stack([np.arange(combinations) * kv_heads, np.arange(combinations) * layout.heads])
    pairs = np.unique(both // combinations, axis=1)
    kv_head, head = np.tile(pairs, asked.shape[1])
    sequence, row, low, high = np.repeat(asked, pairs.shape[1], axis=1)
    begin, fulls = ptr[head, row], full[head, row]
    count = ptr[head, row + 1] - begin
    of = np.repeat(np.arange(len(count)), count)
    entry = np.arange(len(of)) - (np.cumsum(count) - count)[of]
    key_block = idx[begin[of] + entry]
    partial = (entry >= fulls[of]).nonzero()[0]
    at = of[partial]
    code = tile[tile_ptr[head, row][at] + entry[partial] - fulls[at]]
    seen = np.ones((len(of), layout.block // UNIT), dtype=bool)
    some = some_seen(layout).cpu().numpy()
    seen[partial] = some[code, high[at]] > some[code, low[at]]
    which, unit = seen.nonzero()
    start = layout.k_spans.pos.cpu().numpy()[key_block[which]].astype(np.int64)
    of = of[which]
    return sequence[of], kv_head[of], start + unit * UNIT
