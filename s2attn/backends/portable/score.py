"""Block mass from strided antidiagonals in plain torch: the reduced grid of one KV head at a time, in tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.base import Reduction

_AT_ONCE = 1 << 22  # logits of one KV head that are in memory together
_CAUSAL_TILES = 8


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
            one = _Reduced.of(q[b, :, of_group].transpose(0, 1), k[b, :, g], reduction)
            one.write_mass(mass[b, of_group], block // reduction.stride)
    return mass


@dataclass(frozen=True, eq=False)
class _Reduced:
    """The reduced grid of one KV head: ``(group, query groups, stride * D)`` and ``(key groups, stride * D)``, factors worked in.

    ``corner`` is what the logit of the two last groups still has to be multiplied by. When causal, query group i reads the key groups up
    to ``reach + i``; otherwise ``reach`` is None.
    """

    q: Tensor
    k: Tensor
    corner: float
    softcap: float | None
    reach: int | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, reduction: Reduction) -> _Reduced:
        (seqlen_q, width), seqlen_k, stride = q.shape[1:], k.shape[0], reduction.stride
        groups_q, groups_k = -(-seqlen_q // stride), -(-seqlen_k // stride)
        short_q, short_k = seqlen_q - (groups_q - 1) * stride, seqlen_k - (groups_k - 1) * stride
        whole = (groups_q - 1) * stride
        # The last group turns around on its own: its last query comes first, and what is missing lies at the end.
        turned = q[:, :whole].reshape(q.shape[0], groups_q - 1, stride, width).flip(2)
        tail = pad(q[:, whole:].flip(1), (0, 0, 0, stride - short_q)).unsqueeze(1)
        rows = torch.cat([turned, tail], dim=1).reshape(q.shape[0], groups_q, stride * width).float() * (reduction.scale / stride)
        columns = pad(k, (0, 0, 0, stride - short_k)).reshape(groups_k, stride * width).float()
        # Means over the pairs that exist: 1/a in short rows, 1/b in short columns, and 1/min(a, b) where they meet.
        rows = torch.cat([rows[:, :-1], rows[:, -1:] * (stride / short_q)], dim=1)
        columns = torch.cat([columns[:-1], columns[-1:] * (stride / short_k)])
        reach = reduction.reach(seqlen_q, seqlen_k) if reduction.causal else None
        return cls(rows, columns, max(short_q, short_k) / stride, reduction.softcap, reach)

    def write_mass(self, out: Tensor, per_block: int) -> None:
        """Fill ``out (group, query blocks, key blocks)``, which is 0, with the mass of blocks of ``per_block`` groups."""
        heads, groups_q = self.q.shape[:2]
        blocks = max(1, _AT_ONCE // (heads * len(self.k) * per_block))
        if self.reach is not None:  # a tile is as wide as its last row, so tall ones would waste half of the work
            blocks = min(blocks, -(-groups_q // (per_block * _CAUSAL_TILES)))
        height = blocks * per_block
        for at in range(0, groups_q, height):
            end = min(groups_q, at + height)
            width = len(self.k) if self.reach is None else min(len(self.k), self.reach + end)
            if width > 0:
                part = _block_sums(self._softmax(at, end, width), per_block)
                first = at // per_block
                out[:, first : first + part.shape[1], : part.shape[2]] = part

    def _softmax(self, at: int, end: int, width: int) -> Tensor:
        """Rows ``at .. end - 1`` of the softmax, their first ``width`` columns; the others are 0."""
        logits = self.q[:, at:end] @ self.k[:width].transpose(0, 1)
        if end == self.q.shape[1] and width == len(self.k):
            logits[:, -1, -1] *= self.corner
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.reach is None:
            return torch.softmax(logits, dim=-1)
        row = torch.arange(at, end, device=logits.device)[:, None]
        unseen = torch.arange(width, device=logits.device) > row + self.reach
        # A row that sees nothing becomes NaN here, and 0 where it is unseen; NaN of an input stays what it is.
        return torch.softmax(logits.masked_fill_(unseen, -torch.inf), dim=-1).masked_fill_(unseen, 0.0)


def _block_sums(weights: Tensor, per_block: int) -> Tensor:
    """``(heads, rows, columns)`` summed over squares of ``per_block``; the last ones may be cut."""
    heads, rows, columns = weights.shape
    weights = pad(weights, (0, -columns % per_block, 0, -rows % per_block))
    return weights.view(heads, -(-rows // per_block), per_block, -(-columns // per_block), per_block).sum(dim=(2, 4))
