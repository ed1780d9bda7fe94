"""Block mass from strided antidiagonals in plain torch: the reduced grid of one KV head at a time, in tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.base import Reduction
from s2attn.backends.portable.workers import alone_on, in_order

_AT_ONCE = 1 << 21  # logits of one KV head that are in memory together
_CAUSAL_TILES = 32
_LEAST_ROWS = 128  # of one product, all heads of a KV head together: smaller ones are slow


def block_mass(q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
    """``(B, H, query blocks, key blocks)`` float32.

    Memory holds the result, a copy of the keys of one KV head in float32, and one tile per thread.
    """
    (batch, seqlen_q, heads, _), seqlen_k, kv_heads = q.shape, k.shape[1], k.shape[2]
    block, group = reduction.block, heads // kv_heads
    mass = torch.zeros(batch, heads, -(-seqlen_q // block), -(-seqlen_k // block), dtype=torch.float32, device=q.device)
    with alone_on(q.device):
        for b in range(batch):
            for g in range(kv_heads):
                of_group = slice(g * group, (g + 1) * group)
                _Reduced.of(q[b, :, of_group], k[b, :, g], reduction).write_mass(mass[b, of_group])
    return mass


@dataclass(frozen=True, eq=False)
class _Reduced:
    """The reduced grid of one KV head, factors worked in.

    ``q`` is ``(T, group, D)``, of which :meth:`_rows` makes rows as they are needed; ``k`` is ``(stride * D, key groups)``. ``corner`` is
    what the logit of the two last groups still has to be multiplied by. When causal, query group i reads the key groups up to
    ``reach + i``; otherwise ``reach`` is None.
    """

    q: Tensor
    k: Tensor
    stride: int
    per_block: int
    corner: float
    softcap: float | None
    reach: int | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, reduction: Reduction) -> _Reduced:
        """From q ``(T, group, D)`` and k ``(S, D)``."""
        (seqlen_k, width), stride = k.shape, reduction.stride
        groups_k = -(-seqlen_k // stride)
        short_q, short_k = ((length - 1) % stride + 1 for length in (len(q), seqlen_k))
        # One of the two turns around: the keys, which are fewer. A short group then ends where whole ones do, and begins with zeros.
        # Means are over the pairs that exist: 1/a in short rows, 1/b in short columns, and 1/min(a, b) where they meet.
        columns = torch.zeros(groups_k, stride, width, dtype=torch.float32, device=k.device)
        columns[: groups_k - 1] = k[: seqlen_k - short_k].view(groups_k - 1, stride, width).flip(1)
        columns[groups_k - 1, stride - short_k :] = k[seqlen_k - short_k :].flip(0)
        columns[groups_k - 1] *= stride / short_k
        columns *= reduction.scale / stride
        reach = reduction.reach(len(q), seqlen_k) if reduction.causal else None
        corner, keys = max(short_q, short_k) / stride, columns.flatten(1).transpose(0, 1)
        return cls(q, keys, stride, reduction.block // stride, corner, reduction.softcap, reach)

    @property
    def groups_q(self) -> int:
        return -(-len(self.q) // self.stride)

    def _rows(self, at: int, end: int) -> Tensor:
        """Blocks ``at .. end - 1`` as ``(blocks, groups per block, group, stride * D)``: the rows of all heads are one matrix.

        Groups that do not exist hold zeros.
        """
        (length, heads, width), stride, block = self.q.shape, self.stride, self.stride * self.per_block
        whole = min(end, length // block)
        make = torch.empty if whole == end else torch.zeros
        rows = make(end - at, self.per_block, heads, stride, width, dtype=torch.float32, device=self.q.device)
        by_token = rows.permute(0, 1, 3, 2, 4)
        by_token[: whole - at] = self.q[at * block : whole * block].view(whole - at, self.per_block, stride, heads, width)
        if whole < end:
            last = length - (self.groups_q - 1) * stride  # tokens of the last group
            full = (length - last - whole * block) // stride
            by_token[-1, :full] = self.q[whole * block : length - last].view(full, stride, heads, width)
            by_token[-1, full, stride - last :] = self.q[length - last :] * (stride / last)
        return rows.flatten(3)

    def write_mass(self, out: Tensor) -> None:
        """Fill ``out (group, query blocks, key blocks)``, which is 0."""
        heads, blocks, _ = out.shape
        per_block = self.per_block
        step = max(1, _AT_ONCE // (heads * self.k.shape[1] * per_block))
        if self.reach is not None:  # a tile is as wide as its last row, so tall ones would waste half of the work
            least = -(-_LEAST_ROWS // (heads * per_block))
            step = min(step, max(least, -(-blocks // _CAUSAL_TILES)))

        def write(at: int) -> None:
            end = min(blocks, at + step)
            width = self.k.shape[1] if self.reach is None else min(self.k.shape[1], self.reach + min(self.groups_q, end * per_block))
            if width > 0:
                part = _block_sums(self._softmax(at, end, width))
                out[:, at:end, : part.shape[2]] = part.transpose(0, 1)

        # The last tiles are the widest ones.
        for _ in in_order(write, range(blocks - 1 - (blocks - 1) % step, -1, -step), out.device):
            pass

    def _softmax(self, at: int, end: int, width: int) -> Tensor:
        """Rows of blocks ``at .. end - 1`` of the softmax, their first ``width`` columns; the others are 0."""
        some, per_block = self._rows(at, end), self.per_block
        logits = (some.flatten(0, 2) @ self.k[:, :width]).view(*some.shape[:3], width)
        last = self.groups_q - (end - 1) * per_block
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
