"""MergeQ: neighbouring query blocks that share one walk over the union of their key blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2attn.core import check_int
from s2attn.layout.layout import Layout
from s2attn.patterns.runs import ranges

FULL = -1
ABSENT = -2


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Rows of a layout merged by ``factor``, each group with the union of its key blocks: S2-Attention's MergeQ, exact for any layout.

    The granularity of sparsity stays ``block`` query tokens while a kernel (or one call of a matrix product) works on up to
    ``factor * block`` of them. Every key block of the union is listed once, with one code per sub-row that says what it sees.

    Attributes:
        factor: query blocks per group; the last group of a sequence may have fewer.
        first: ``(groups,)`` int32, first query block of each group.
        count: ``(groups,)`` int32, query blocks in each group, 1 to ``factor``.
        ptr: ``(heads, groups + 1)`` int64; group g of head h lists ``idx[ptr[h, g]:ptr[h, g + 1]]``.
        full: ``(heads, groups)`` int32; so many of a group's first entries are seen in full by all of its sub-rows.
        sub_ptr: ``(heads, groups)`` int64; the j-th other entry of a group has the codes ``sub[sub_ptr[h, g] + j]``.
        idx: ``(entries,)`` int32 key blocks, ascending inside the full part and inside the rest.
        sub: ``(other entries, factor)`` int32 codes: ``FULL`` (-1), ``ABSENT`` (-2) or the number of a mask tile.

    Invariants:
        G1  the groups cut the query blocks of each sequence into consecutive runs; no group crosses a sequence
        G2  ``ptr`` never decreases inside a head; heads that share storage in the layout share it here
        G3  a key block is listed once per group, and only when at least one sub-row lists it
        G4  code j of an entry is what row ``first + j`` says of that key block; ``ABSENT`` beyond ``count``
        G5  an entry is in the full part exactly when every one of the ``count`` codes is ``FULL``
    """

    factor: int
    first: Tensor
    count: Tensor
    ptr: Tensor
    full: Tensor
    sub_ptr: Tensor
    idx: Tensor
    sub: Tensor

    @property
    def heads(self) -> int:
        return self.full.shape[0]

    @property
    def groups(self) -> int:
        return self.full.shape[1]

    def group(self, head: int, group: int) -> tuple[list[int], list[tuple[int, list[int]]]]:
        """One group as Python numbers: the blocks that all see in full, and the others as (block, codes of the sub-rows)."""
        lo, hi = int(self.ptr[head, group]), int(self.ptr[head, group + 1])
        mid, at = lo + int(self.full[head, group]), int(self.sub_ptr[head, group])
        codes = self.sub[at : at + hi - mid, : int(self.count[group])].tolist()
        return self.idx[lo:mid].tolist(), list(zip(self.idx[mid:hi].tolist(), codes, strict=True))


def group_rows(layout: Layout, factor: int) -> RowGroups:
    """Merge every ``factor`` consecutive query blocks of a sequence; O(listed blocks) time and memory, on the layout's device.

    Raises:
        ValueError: ``factor`` is less than 1.
    """
    check_int("factor", factor, 1)
    first, count, group_of, sub_of = _cut(layout.q_spans.seq.cpu().numpy(), factor)
    rows = layout.rows
    heads, where = unique_heads(layout)
    ptr, full, tile_ptr = (t.cpu().numpy()[heads] for t in (rows.ptr, rows.full, rows.tile_ptr))
    entries = _Entries.of(ptr, full, tile_ptr, rows.idx.cpu().numpy(), rows.tile.cpu().numpy())
    if factor == 1:
        merged = _singles(entries)
    else:
        merged = _merge(entries, group_of, sub_of, count, factor, max(len(layout.k_spans), 1))
    parts = (first, count, merged[0][where], merged[1][where], merged[2][where], merged[3], merged[4])
    return RowGroups(factor, *(torch.from_numpy(np.ascontiguousarray(part)).to(layout.device) for part in parts))


def unique_heads(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Heads that point to different storage, and for every head the position of its storage among them (both int64 vectors)."""
    if layout.heads == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    seen: dict[bytes, int] = {}
    lines = [t.cpu().numpy() for t in (layout.rows.ptr, layout.rows.full, layout.rows.tile_ptr)]
    where = np.empty(layout.heads, np.int64)
    kept = []
    for head in range(layout.heads):
        key = b"".join(line[head].tobytes() for line in lines)
        if key not in seen:
            seen[key] = len(kept)
            kept.append(head)
        where[head] = seen[key]
    return np.asarray(kept, np.int64), where


@dataclass(frozen=True)
class _Entries:
    """All entries of the chosen heads as flat vectors, in the order of the rows."""

    length: np.ndarray  # (heads, lines) entries of a line
    full: np.ndarray  # (heads, lines) full ones among them
    block: np.ndarray  # (entries,) key block
    code: np.ndarray  # (entries,) FULL or mask tile

    @classmethod
    def of(cls, ptr: np.ndarray, full: np.ndarray, tile_ptr: np.ndarray, idx: np.ndarray, tile: np.ndarray) -> _Entries:
        length = ptr[:, 1:] - ptr[:, :-1]
        flat = length.ravel()
        block = idx[ranges(ptr[:, :-1].ravel(), flat)]
        inside = np.arange(len(block)) - np.repeat(np.cumsum(flat) - flat, flat)
        partial = inside >= np.repeat(full.ravel(), flat)
        code = np.full(len(block), FULL, np.int32)
        code[partial] = tile[ranges(tile_ptr.ravel(), flat - full.ravel())]
        return cls(length, full, block, code)


def _cut(seq: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First block and number of blocks of each group; group and place in the group of each query block."""
    lines = len(seq)
    begins = np.ones(lines, bool)
    begins[1:] = seq[1:] != seq[:-1]
    begin = np.maximum.accumulate(np.where(begins, np.arange(lines), 0)) if lines else np.zeros(0, np.int64)
    inside = np.arange(lines) - begin
    leads = inside % factor == 0
    group_of = np.cumsum(leads) - 1
    first = np.flatnonzero(leads).astype(np.int32)
    count = np.bincount(group_of, minlength=len(first)).astype(np.int32)
    return first, count, group_of, inside % factor


def _pointers(length: np.ndarray) -> np.ndarray:
    """``(heads, n + 1)`` absolute offsets of lists with these lengths that lie one after another."""
    ends = np.cumsum(length.ravel()).reshape(length.shape)
    begin = np.concatenate([np.zeros(1, np.int64), ends[:-1, -1]]) if length.size else np.zeros(length.shape[0], np.int64)
    return np.concatenate([begin[:, None], ends], axis=1)


def _singles(entries: _Entries) -> tuple[np.ndarray, ...]:
    """Groups of one row: the lists are there already."""
    rest = entries.length - entries.full
    code = entries.code[entries.code != FULL]
    return _pointers(entries.length), entries.full.astype(np.int32), _pointers(rest)[:, :-1], entries.block, code[:, None]


def _merge(
    entries: _Entries, group_of: np.ndarray, sub_of: np.ndarray, count: np.ndarray, factor: int, blocks: int
) -> tuple[np.ndarray, ...]:
    """Union of the rows of each group, entries that all sub-rows see in full first."""
    heads, groups = entries.length.shape[0], len(count)
    flat = entries.length.ravel()
    group = np.repeat((np.arange(heads)[:, None] * groups + group_of).ravel(), flat)
    sub = np.repeat(np.tile(sub_of, heads), flat)
    key = group * blocks + entries.block
    order = np.argsort(key, kind="stable")
    key = key[order]
    new = np.ones(len(key), bool)
    new[1:] = key[1:] != key[:-1]
    union = key[new]
    codes = np.full((len(union), factor), ABSENT, np.int32)
    codes[np.cumsum(new) - 1, sub[order]] = entries.code[order]
    owner = union // blocks
    rest = (codes == FULL).sum(1) != np.tile(count, heads)[owner]
    length = np.bincount(owner, minlength=heads * groups).reshape(heads, groups)
    others = np.bincount(owner[rest], minlength=heads * groups).reshape(heads, groups)
    order = np.argsort(owner * 2 + rest, kind="stable")
    idx = (union % blocks)[order].astype(np.int32)
    return _pointers(length), (length - others).astype(np.int32), _pointers(others)[:, :-1], idx, codes[rest]
