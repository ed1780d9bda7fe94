"""The checks of paged calls that need to look at numbers on the device: lengths and block tables."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from s2attn.backends import Pages
from s2attn.backends.checks import is_captured
from s2attn.core import bad_value
from s2attn.layout import Layout, read_cu_seqlens
from s2attn.layout.positions import UNIT, Lines, listed_entries, seen_units

Numbers = tuple[int, ...]


def may_look(validate: bool, *tensors: Tensor) -> bool:
    """Whether numbers of the device may be looked at: not where the caller has said so, and not while its stream is being captured."""
    return validate and not is_captured(*tensors)


def read_lengths(cu_seqlens_q: Tensor | None, seq_lens: Tensor, total_q: int, room: int) -> tuple[Numbers, Numbers]:
    """Cumulative queries, and tokens of each sequence, as numbers, checked: no sequence is longer than its table, ``room`` tokens."""
    tokens = tuple(seq_lens.tolist())
    if cu_seqlens_q is None:
        step = total_q // max(len(tokens), 1)
        cu_q = [step * number for number in range(len(tokens) + 1)]
    else:
        cu_q = read_cu_seqlens("cu_seqlens_q", cu_seqlens_q, total_q)
    for sequence, length in enumerate(tokens):
        if not 0 <= length <= room:
            rule = f"must be 0 to {room}, the tokens that block_table has room for"
            raise bad_value("seq_lens", rule, f"{length} for sequence {sequence}")
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


def check_listed(layout: Layout, pages: Pages, owner: Tensor | None = None, lines: Lines | None = None) -> None:
    """Refuse a block table that points outside of the cache, or to an evicted page, where the layout lists a block.

    Args:
        owner: the sequence of each line of the table, for messages; line i is that of sequence i by default.
        lines: what queries read of a square layout; every listed block of a packed one counts.
    """
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    corners = torch.stack([layout.rows.ptr[:, 0], layout.rows.ptr[:, -1]], dim=1).tolist()
    for head, (low, high) in enumerate(corners):
        if (low, high) not in seen:
            if lines is None:
                block = torch.unique(layout.rows.idx[low:high]).long()
                seen[low, high] = layout.k_spans.seq[block].long(), layout.k_spans.pos[block].long() // pages.page_size
            else:
                listed = listed_entries(layout, head, lines)
                some, unit = seen_units(layout, lines, listed).nonzero(as_tuple=True)
                pos = listed.block[some] * layout.block + unit * UNIT
                seen[low, high] = lines.seq[listed.line[some]], pos // pages.page_size
        sequence, number = seen[low, high]
        kv_head = head * pages.kv_heads // layout.heads
        page = pages.table[sequence, kv_head if pages.table.shape[1] > 1 else 0, number]
        wrong = (page < 0) | (page >= pages.k.shape[0])
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            line = int(sequence[first])
            where = f"sequence {line if owner is None else int(owner[line])}, KV head {kv_head}, entry {int(number[first])}"
            rule = f"must name one of the {pages.k.shape[0]} pages wherever the pattern reads (-1 is an evicted page)"
            raise bad_value("block_table", rule, f"{int(page[first])} for {where}")
