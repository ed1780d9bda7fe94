"""`score`: estimates of how much attention mass each block of keys receives, from which selectors choose.

All of them return float32 and carry no gradient. Queries sit at the end of the keys, as everywhere: query i has position ``i + S - T``.
Rows of blocks count queries as a layout does, from the first query of the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.checks import exact_arithmetic
from s2attn.core import bad_value, check_block, check_int
from s2attn.ops.checks import check_scale, check_softcap, check_tensors

_AT_ONCE = 1 << 22  # logits of one KV head that are in memory together
_CAUSAL_TILES = 8


def antidiagonal(
    q: Tensor,
    k: Tensor,
    *,
    stride: int = 16,
    block: int = 128,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Block mass from strided antidiagonals: XAttention's estimate (arXiv:2503.16428, section 2.1).

    Queries and keys are cut into groups of ``stride``, each from its first token. The logit of query group i and key group j is the mean
    over one antidiagonal of their tile, ``R[i, j] = sum_s scale * q[i*stride + stride-1-s].k[j*stride + s] / stride``: every query and
    every key of the tile counts once. A softmax over the key groups follows, then the sum over each ``block x block``. With
    ``stride=1`` the result is the exact attention mass.

    The last group may be short. In a tile of a queries and b keys the antidiagonal then begins at the last query and the first key and has
    ``min(a, b)`` pairs, over which R is the mean: tokens that do not exist enter nothing. A short group weighs as much as a whole one.
    When causal, a query group reads the key groups that begin at or before its last query, so the tile on the diagonal counts as a whole.

    Work is that of a dense ``q.k`` divided by ``stride``. The reduced logits are made in tiles of rows; memory holds the block mass, a
    copy of the keys in float32, and one tile.

    Args:
        q, k: ``(B, T, H, D)``, ``(B, S, G, D)``; the heads of a group read the key of their KV head, which is not repeated.
        stride: tokens per group; divides ``block``.
        block: tokens per block of the result, 16 to 256.
        causal, scale, softcap: as in `attention`; the cap bounds R.

    Returns:
        ``(B, H, query blocks, key blocks)`` float32, at least 0. A row sums to the number of its query groups that see a key.

    >>> q, k = torch.randn(1, 256, 4, 32), torch.randn(1, 256, 2, 32)
    >>> antidiagonal(q, k, stride=16, block=64).sum(dim=-1)[0, 0].round()
    tensor([4., 4., 4., 4.])
    """
    check_tensors(q, k, k, packed=False)
    check_block("block", block)
    if block % check_int("stride", stride, 1):
        raise bad_value("stride", f"must divide block ({block})", stride)
    factor, cap = check_scale(scale, q.shape[-1]), check_softcap(softcap)
    (batch, seqlen_q, heads, _), seqlen_k, kv_heads = q.shape, k.shape[1], k.shape[2]
    mass = torch.zeros(batch, heads, -(-seqlen_q // block), -(-seqlen_k // block), dtype=torch.float32, device=q.device)
    if not mass.numel():
        return mass
    group = heads // kv_heads
    with exact_arithmetic(q.device):
        for b in range(batch):
            for g in range(kv_heads):
                of_group = slice(g * group, (g + 1) * group)
                one = _Reduced.of(q[b, :, of_group].transpose(0, 1), k[b, :, g], stride, factor, cap, causal)
                one.write_mass(mass[b, of_group], block // stride)
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
    def of(cls, q: Tensor, k: Tensor, stride: int, factor: float, softcap: float | None, causal: bool) -> _Reduced:
        (seqlen_q, width), seqlen_k = q.shape[1:], k.shape[0]
        groups_q, groups_k = -(-seqlen_q // stride), -(-seqlen_k // stride)
        short_q, short_k = seqlen_q - (groups_q - 1) * stride, seqlen_k - (groups_k - 1) * stride
        whole = (groups_q - 1) * stride
        # The last group turns around on its own: its last query comes first, and what is missing lies at the end.
        turned = q[:, :whole].reshape(q.shape[0], groups_q - 1, stride, width).flip(2)
        tail = pad(q[:, whole:].flip(1), (0, 0, 0, stride - short_q)).unsqueeze(1)
        rows = torch.cat([turned, tail], dim=1).reshape(q.shape[0], groups_q, stride * width).float() * (factor / stride)
        columns = pad(k, (0, 0, 0, stride - short_k)).reshape(groups_k, stride * width).float()
        # Means over the pairs that exist: 1/a in short rows, 1/b in short columns, and 1/min(a, b) where they meet.
        rows = torch.cat([rows[:, :-1], rows[:, -1:] * (stride / short_q)], dim=1)
        columns = torch.cat([columns[:-1], columns[-1:] * (stride / short_k)])
        reach = (seqlen_k - seqlen_q + stride - 1) // stride if causal else None
        return cls(rows, columns, max(short_q, short_k) / stride, softcap, reach)

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
