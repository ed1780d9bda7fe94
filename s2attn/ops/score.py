"""`score`: estimates of how much attention mass each block of keys receives, from which selectors choose.

All of them return float32 and carry no gradient. Queries sit at the end of the keys, as everywhere: query i has position ``i + S - T``.
Rows of blocks count queries as a layout does, from the first query of the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2attn.backends import Reduction, pick_mass
from s2attn.backends.checks import exact_arithmetic
from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.ops.checks import check_scale, check_softcap, check_tensors

_library = torch.library.Library("s2attn", "FRAGMENT")
_library.define("antidiagonal(Tensor q, Tensor k, int stride, int block, bool causal, float scale, float softcap, str backend) -> Tensor")


def antidiagonal(
    q: Tensor,
    k: Tensor,
    *,
    stride: int = 16,
    block: int = 128,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Block mass from strided antidiagonals: XAttention's estimate (arXiv:2503.16428, section 2.1).

    Queries and keys are cut into groups of ``stride``, each from its first token. The logit of query group i and key group j is the mean
    over one antidiagonal of their tile, ``R[i, j] = sum_s scale * q[i*stride + stride-1-s].k[j*stride + s] / stride``: every query and
    every key of the tile counts once. A softmax over the key groups follows, then the sum over each ``block x block``. With
    ``stride=1`` the result is the exact attention mass.

    The last group may be short. In a tile of a queries and b keys the antidiagonal then begins at the last query and the first key and has
    ``min(a, b)`` pairs, over which R is the mean: tokens that do not exist enter nothing. A short group weighs as much as a whole one.
    When causal, a query group reads the key groups that begin at or before its last query, so the tile on the diagonal counts as a whole.

    Work is that of a dense ``q.k`` divided by ``stride``. The reduced logits are made in tiles and never lie in memory together.

    Args:
        q, k: ``(B, T, H, D)``, ``(B, S, G, D)``; the heads of a group read the key of their KV head, which is not repeated.
        stride: tokens per group; divides ``block``.
        block: tokens per block of the result, 16 to 256.
        causal, scale, softcap: as in `attention`; the cap bounds R.
        backend: who computes it: "auto", "cpu", "torch", "triton" or "reference".

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
    if not isinstance(backend, str):
        raise bad_kind("backend", "must be a string", backend)
    return torch.ops.s2attn.antidiagonal(q.detach(), k.detach(), stride, block, bool(causal), factor, cap or 0.0, backend)


def _antidiagonal(q: Tensor, k: Tensor, stride: int, block: int, causal: bool, scale: float, softcap: float, backend: str) -> Tensor:
    chosen = pick_mass(backend, q, k)
    if not q.numel() or not k.numel():
        return _fake(q, k, stride, block).zero_()
    with exact_arithmetic(q.device):
        return chosen.antidiagonal(q, k, Reduction(stride, block, causal, scale, softcap or None))


def _fake(q: Tensor, k: Tensor, stride: int, block: int, *rest: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], -(-q.shape[1] // block), -(-k.shape[1] // block)), dtype=torch.float32)


_library.impl("antidiagonal", _antidiagonal, "CompositeExplicitAutograd")
torch.library.register_fake("s2attn::antidiagonal", _fake, lib=_library)
