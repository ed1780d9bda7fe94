"""Block mass from strided antidiagonals in plain torch: the reduced grid of one KV head at a time, in tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.base import Reduction

_AT_ONCE = 1 << 21  # logits of one KV head that are in memory together
_CAUSAL_TILES = 32
_LEAST_ROWS = 128  # of one product, all heads of a KV head together: smaller ones are slow


def block_mass(q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
    """``(B, H, query blocks, key blocks)`` float32.

    Memory holds the result, a copy of the queries and keys of one KV head in float32, and one tile.
    """
    (batch, seqlen_q, heads, _), seqlen_k, kv_heads = q.shape, k.shape[1], k.shape[2]
    block, group = reduction.block, heads // kv_heads
    mass = torch.zeros(batch, heads, -(-seqlen_q // block), -(-seqlen_k // block), dtype=torch.float32, device=q.device)
    for b in range(batch):
        for g in range(kv_heads):
            of_group = slice(g * group, (g + 1) * group)
            _Reduced.of(q[b, :, of_group], k[b, :, g], reduction).write_mass(mass[b, of_group])
    return mass


@dataclass(frozen=True, eq=False)
class _Reduced:
    """The reduced grid of one KV head, factors worked in.

    ``q`` is ``(query blocks, groups per block, group, stride * D)``, so that the rows of some blocks, of all heads, are one matrix; groups
    that do not exist hold zeros. ``k`` is ``(stride * D, key groups)``. ``corner`` is what the logit of the two last groups still has to
    be multiplied by. When causal, query group i reads the key groups up to ``reach + i``; otherwise ``reach`` is None.
    """

    q: Tensor
    k: Tensor
    groups_q: int
    corner: float
    softcap: float | None
    reach: int | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, reduction: Reduction) -> _Reduced:
        """From q ``(T, group, D)`` and k ``(S, D)``."""
        (seqlen_q, heads, width), seqlen_k, stride = q.shape, k.shape[0], reduction.stride
        groups_q, groups_k, per_block = -(-seqlen_q // stride), -(-seqlen_k // stride), reduction.block // stride
        short_q, short_k = seqlen_q - (groups_q - 1) * stride, seqlen_k - (groups_k - 1) * stride
        # One of the two turns around: the keys, which are fewer. A short group then ends where whole ones do, and begins with zeros.
        blocks, whole = -(-groups_q // per_block), seqlen_q // reduction.block
        make = torch.empty if whole == blocks else torch.zeros
        rows = make(blocks, per_block, heads, stride, width, dtype=torch.float32, device=q.device)
        by_token, tokens = rows.permute(0, 1, 3, 2, 4), whole * reduction.block
        by_token[:whole] = q[:tokens].view(whole, per_block, stride, heads, width)
        # Means over the pairs that exist: 1/a in short rows, 1/b in short columns, and 1/min(a, b) where they meet.
        if whole < blocks:
            full = (seqlen_q - short_q - tokens) // stride
            by_token[whole, :full] = q[tokens : seqlen_q - short_q].view(full, stride, heads, width)
            by_token[whole, full, stride - short_q :] = q[seqlen_q - short_q :] * (stride / short_q)
        columns = torch.zeros(groups_k, stride, width, dtype=torch.float32, device=k.device)
        columns[: groups_k - 1] = k[: seqlen_k - short_k].view(groups_k - 1, stride, width).flip(1)
        columns[groups_k - 1, stride - short_k :] = k[seqlen_k - short_k :].flip(0)
        columns[groups_k - 1] *= stride / short_k
        columns *= reduction.scale / stride
        reach = reduction.reach(seqlen_q, seqlen_k) if reduction.causal else None
        corner = max(short_q, short_k) / stride
        return cls(rows.flatten(3), columns.flatten(1).transpose(0, 1), groups_q, corner, reduction.softcap, reach)

    def write_mass(self, out: Tensor) -> None:
        """Fill ``out (group, query blocks, key blocks)``, which is 0."""
        blocks, per_block, heads, _ = self.q.shape
        step = max(1, _AT_ONCE // (heads * self.k.shape[1] * per_block))
        if self.reach is not None:  # a tile is as wide as its last row, so tall ones would waste half of the work
            least = -(-_LEAST_ROWS // (heads * per_block))
            step = min(step, max(least, -(-blocks // _CAUSAL_TILES)))
        for at in range(0, blocks, step):
            end = min(blocks, at + step)
            width = self.k.shape[1] if self.reach is None else min(self.k.shape[1], self.reach + min(self.groups_q, end * per_block))
            if width > 0:
                part = _block_sums(self._softmax(at, end, width))
                out[:, at:end, : part.shape[2]] = part.transpose(0, 1)

    def _softmax(self, at: int, end: int, width: int) -> Tensor:
        """Rows of blocks ``at .. end - 1`` of the softmax, their first ``width`` columns; the others are 0."""
        some = self.q[at:end]
        logits = (some.flatten(0, 2) @ self.k[:, :width]).view(*some.shape[:3], width)
        per_block, last = some.shape[1], self.groups_q - (end - 1) * some.shape[1]
        if last <= per_block and width == self.k.shape[1]:
            logits[-1, last - 1, :, -1] *= self.corner
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.reach is None:
            weights = torch.softmax(logits, dim=-1)
        else:
            # What all rows see is left alone.
            edge = min(width, max(0, at * per_block + self.reach + 1))
            row = torch.arange(at * per_block, end * per_block, device=logits.device).view(end - at, per_block, 1, 1)
            unseen = torch.arange(edge, width, device=logits.device) > row + self.reach
            logits[..., edge:].masked_fill_(unseen, -torch.inf)
            weights = torch.softmax(logits, dim=-1)
            # A row that sees nothing has become NaN, and is 0 where it is unseen; NaN of an input stays what it is.
            weights[..., edge:].masked_fill_(unseen, 0.0)
        weights[-1, last:] = 0.0
        return weights


def _block_sums(weights: Tensor) -> Tensor:
    """``(blocks, heads, column blocks)`` of ``(blocks, groups per block, heads, columns)``; the last columns may be cut."""
    per_block, columns = weights.shape[1], weights.shape[3]
    # Rows first: that is one pass in the order of memory, and leaves little.
    return pad(weights.sum(dim=1), (0, -columns % per_block)).unflatten(2, (-1, per_block)).sum(dim=3)
