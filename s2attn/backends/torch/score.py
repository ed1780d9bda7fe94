"""Block mass from strided antidiagonals: query groups times key groups, and a softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2attn.backends.base import Reduction
from s2attn.backends.torch import attend
from s2attn.backends.torch.rows import product


def block_mass(q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
    """``(B, H, query blocks, key blocks)`` float32, one KV head and a few rows of blocks at a time."""
    (batch, seqlen_q, heads, _), seqlen_k, kv_heads = q.shape, k.shape[1], k.shape[2]
    block, group = reduction.block, heads // kv_heads
    shape = batch, heads, -(-seqlen_q // block), -(-seqlen_k // block)
    mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for b in range(batch):
        for g in range(kv_heads):
            mine = slice(g * group, (g + 1) * group)
            _fill(mass[b, mine], q[b, :, mine].transpose(0, 1), k[b, :, g], reduction)
    return mass


def _fill(out: Tensor, q: Tensor, k: Tensor, reduction: Reduction) -> None:
    """Of queries ``(heads, T, D)`` and keys ``(S, D)`` of one KV head."""
    stride, per_block = reduction.stride, reduction.block // reduction.stride
    seqlen_q, seqlen_k = q.shape[1], len(k)
    groups_q, groups_k = -(-seqlen_q // stride), -(-seqlen_k // stride)
    # Keys are reversed, so that an antidiagonal is a product of rows. Short groups begin with zeros:
    # their antidiagonal is that of the last query and the first key.
    keys = pad(k, (0, 0, 0, -seqlen_k % stride)).float().view(groups_k, stride, -1).flip(1).flatten(1)
    ends = (n - torch.arange(0, n, stride, device=q.device) for n in (seqlen_q, seqlen_k))
    sizes_q, sizes_k = (x.clamp(max=stride).float() for x in ends)
    reach = reduction.reach(seqlen_q, seqlen_k)
    room = attend.NUMBERS if q.device.type == "cpu" else attend.NUMBERS_ELSEWHERE
    step = min(room // (len(q) * groups_k * per_block), -(-out.shape[1] // 16))
    step = max(1, step)  # a causal tile is as wide as its last row
    for low in range(0, out.shape[1], step):
        first, last = low * per_block, min((low + step) * per_block, groups_q)
        width = min(groups_k, reach + last) if reduction.causal else groups_k
        if width <= 0:
            continue
        x = product(_query_groups(q, first, last, stride), keys[:width].T.expand(len(q), -1, -1))
        x *= reduction.scale / torch.minimum(sizes_q[first:last, None], sizes_k[:width])
        if reduction.softcap is not None:
            x = x.div_(reduction.softcap).tanh_().mul_(reduction.softcap)
        if reduction.causal:
            row, column = (torch.arange(n, device=q.device) for n in x.shape[1:])
            unseen = column > row[:, None] + (reach + first)
            x = torch.softmax(x.masked_fill_(unseen, -torch.inf), -1).masked_fill_(unseen, 0.0)
        else:
            x = torch.softmax(x, -1)
        x = pad(x, (0, -width % per_block, 0, -(last - first) % per_block))
        x = x.unflatten(1, (-1, per_block)).unflatten(3, (-1, per_block)).sum((2, 4))
        out[:, low : low + x.shape[1], : x.shape[2]] = x


def _query_groups(q: Tensor, first: int, last: int, stride: int) -> Tensor:
    """Query groups ``first`` to ``last - 1`` of each head as rows ``(heads, groups, stride * D)``."""
    x = q[:, first * stride : last * stride].float()
    short = -x.shape[1] % stride
    if short:
        whole = x.shape[1] // stride * stride
        x = torch.cat([x[:, :whole], pad(x[:, whole:], (0, 0, short, 0))], 1)
    return x.reshape(len(q), last - first, -1)
