"""Block mass from strided antidiagonals in plain torch: the reduced grid of one KV head at a time, in tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.backends.base import Reduction
from s2attn.backends.portable.loops import without_lock
from s2attn.backends.portable.score_loops import tile_mass
from s2attn.backends.portable.tile import has_onednn
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
                Reduced.of(q[b, :, of_group], k[b, :, g], reduction).write_mass(mass[b, of_group])
    return mass


@dataclass(frozen=True, eq=False)
class Reduced:
    """The reduced grid of one KV head, factors worked in.

    ``q`` is ``(T, group, D)``, of which `query_groups` makes rows as they are needed; ``k`` is ``(key groups, stride * D)``. ``corner`` is
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
    def of(cls, q: Tensor, k: Tensor, reduction: Reduction) -> Reduced:
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
        corner, keys = max(short_q, short_k) / stride, columns.flatten(1)
        return cls(q, keys, stride, reduction.block // stride, corner, reduction.softcap, reach)

    def write_mass(self, out: Tensor) -> None:
        """Fill ``out (group, query blocks, key blocks)``, which is 0."""
        heads, blocks, _ = out.shape
        groups_q, groups_k, per_block = -(-len(self.q) // self.stride), len(self.k), self.per_block
        step = max(1, _AT_ONCE // (heads * groups_k * per_block))
        if self.reach is not None:  # a tile is as wide as its last row, so tall ones would waste half of the work
            least = -(-_LEAST_ROWS // (heads * per_block))
            step = min(step, max(least, -(-blocks // _CAUSAL_TILES)))
        onednn, fill = self.q.device.type == "cpu" and has_onednn(), without_lock(tile_mass)

        def write(at: int) -> None:
            end = min(blocks, at + step)
            width = groups_k if self.reach is None else min(groups_k, self.reach + min(groups_q, end * per_block))
            if width > 0:
                shape = at, end, width, self.stride, per_block
                fill(self.q, self.k, out, *shape, self.corner, self.softcap, self.reach, onednn)

        # The last tiles are the widest ones.
        for _ in in_order(write, range(blocks - 1 - (blocks - 1) % step, -1, -step), out.device):
            pass
