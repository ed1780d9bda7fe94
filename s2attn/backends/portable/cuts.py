"""How many query blocks share one gathered list: chosen for every run of neighbouring blocks by what it would cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from s2attn.layout import Layout
from s2attn.layout.groups import ABSENT, group_rows, unique_heads

MOST_ROWS = 256
"""Query rows that share one gathered key block at most; more rows waste more on the union of their lists."""
GATHER_ROWS = 16
"""What gathering a key block costs, counted in query rows that attend to it (measured at D = 64 on two CPU cores)."""


@dataclass(frozen=True)
class Groups:
    """Groups of query blocks of all unique layout heads, ordered by head: flat vectors, and the lists that they point into.

    Attributes:
        where: for each layout head, its unique head.
        head: unique head of each group.
        first: first query token.
        tokens: query tokens.
        subs: query blocks.
        full: key blocks that all of them see in full, at ``idx[at:at + full]``.
        rest: other key blocks, at ``idx[at + full:at + full + rest]``, with codes ``codes[code_at:code_at + rest]``.
    """

    where: np.ndarray
    head: np.ndarray
    first: np.ndarray
    tokens: np.ndarray
    subs: np.ndarray
    full: np.ndarray
    rest: np.ndarray
    at: np.ndarray
    code_at: np.ndarray
    idx: np.ndarray
    codes: np.ndarray


def cheapest_groups(layout: Layout, heads_per_unit: int) -> Groups:
    """Cut every head's query blocks into groups of 1, 2, 4, ... blocks, each as large as pays for itself."""
    heads, where = unique_heads(layout)
    longest = int(torch.bincount(layout.q_spans.seq.cpu(), minlength=1).max())
    largest = 1
    while largest * 2 * heads_per_unit * layout.block <= MOST_ROWS and largest < longest:
        largest *= 2
    cuts = [_Cut.of(layout, size, heads, heads_per_unit, largest) for size in _powers(largest)]
    chosen = np.argmin(np.stack([cut.cost for cut in cuts]), axis=0) if len(cuts) > 1 else None
    parts: list[dict[str, np.ndarray]] = []
    idx_base = code_base = 0
    for i, cut in enumerate(cuts):
        mine = np.ones_like(cut.full, bool) if chosen is None else chosen[:, cut.top] == i
        head, group = np.nonzero(mine)
        parts.append(cut.take(head, group, idx_base, code_base))
        idx_base, code_base = idx_base + len(cut.idx), code_base + len(cut.codes)
    flat = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(flat["head"], kind="stable")
    codes = [np.pad(cut.codes, ((0, 0), (0, largest - cut.codes.shape[1])), constant_values=ABSENT) for cut in cuts]
    return Groups(
        where, idx=np.concatenate([cut.idx for cut in cuts]), codes=np.concatenate(codes), **{name: x[order] for name, x in flat.items()}
    )


def _powers(largest: int) -> list[int]:
    return [1 << i for i in range(largest.bit_length())]


@dataclass(frozen=True)
class _Cut:
    """The query blocks of all unique heads in groups of one size."""

    first: np.ndarray  # (groups,)
    tokens: np.ndarray
    subs: np.ndarray
    top: np.ndarray  # the group of the largest size around this one
    full: np.ndarray  # (heads, groups)
    rest: np.ndarray
    at: np.ndarray
    code_at: np.ndarray
    idx: np.ndarray
    codes: np.ndarray
    cost: np.ndarray  # (heads, groups of the largest size) when cut like this

    @classmethod
    def of(cls, layout: Layout, size: int, heads: np.ndarray, heads_per_unit: int, largest: int) -> _Cut:
        merged = group_rows(layout, size)
        lead, subs = merged.first.cpu().numpy(), merged.count.cpu().numpy()
        start, length, seq = (t.cpu().numpy().astype(np.int64) for t in layout.q_spans.tensors()[:3])
        last = lead + subs - 1
        tokens = start[last] + length[last] - start[lead]
        inside = np.arange(len(seq)) - np.searchsorted(seq, seq)
        top = (np.cumsum(inside % largest == 0) - 1)[lead]
        ptr, full, code_at = (t.cpu().numpy()[heads] for t in (merged.ptr, merged.full, merged.sub_ptr))
        entries = ptr[:, 1:] - ptr[:, :-1]
        price = entries * (tokens * heads_per_unit + GATHER_ROWS)
        cost = np.stack([np.bincount(top, weights=row) for row in price]) if len(top) else np.zeros((len(heads), 0))
        idx, codes = merged.idx.cpu().numpy(), merged.sub.cpu().numpy()
        return cls(start[lead], tokens, subs, top, full, entries - full, ptr[:, :-1], code_at, idx, codes, cost)

    def take(self, head: np.ndarray, group: np.ndarray, idx_base: int, code_base: int) -> dict[str, np.ndarray]:
        """The chosen groups, pointing into the lists of all cuts one after another."""
        return {
            "head": head,
            "first": self.first[group],
            "tokens": self.tokens[group],
            "subs": self.subs[group].astype(np.int64),
            "full": self.full[head, group].astype(np.int64),
            "rest": self.rest[head, group].astype(np.int64),
            "at": self.at[head, group] + idx_base,
            "code_at": self.code_at[head, group] + code_base,
        }
