"""Rows to columns: the same entries by the other axis (CSR to CSC, and back)."""

from __future__ import annotations

import torch

from s2attn.layout.entries import Entries, entries_of, first_with_same_lists, index_from
from s2attn.layout.index import BlockIndex


def transpose_index(index: BlockIndex, lines: int) -> BlockIndex:
    """The index whose ``lines`` lines are this one's blocks; transposing twice gives the first index again.

    Heads that share storage share it in the result too. Mask tiles keep their numbers and their ``[query, key]`` orientation.
    """
    same = first_with_same_lists(index)
    kept = sorted(set(same))
    heads = [_turned(entries_of(index, head)) for head in kept]
    return index_from(heads, [kept.index(head) for head in same], lines, index)


def _turned(entries: Entries) -> Entries:
    key = entries.idx * 2 + (entries.tile >= 0)
    order = torch.sort(key.int() if not len(key) or int(key.max()) < 2**31 else key, stable=True).indices
    return Entries(entries.idx[order], entries.line[order], entries.tile[order])
