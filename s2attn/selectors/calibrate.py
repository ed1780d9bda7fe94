"""`calibrate`: the threshold that each head needs, from queries and keys of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from s2attn.core import bad_kind, bad_value
from s2attn.ops.checks import check_scale, check_tensors
from s2attn.ops.score import antidiagonal
from s2attn.ops.selector import Call
from s2attn.selectors.select import check_share, select
from s2attn.selectors.xattention import XAttention


def calibrate(
    selector: XAttention,
    layers: Sequence[Iterable[tuple[Tensor, Tensor]]],
    *,
    target: float = 0.9,
    causal: bool = True,
    scale: float | None = None,
) -> XAttention:
    """The selector with a table of threshold by layer and query head, so that each keeps ``target`` of its true attention mass, or more.

    For every row, the fewest blocks that hold ``target`` of the true mass are found, and among them the smallest estimated one. A head's
    threshold is the share of its estimated mass, over all rows of all samples, that lies in blocks at least as large as that of their row
    (arXiv:2503.16428, section 2.3, finds such thresholds by search). Takes the time of dense attention for each sample, not its memory.

    Args:
        selector: stride and block are taken from it; its threshold is replaced.
        layers: for each layer its samples: q ``(B, T, H, D)``, k ``(B, S, G, D)``, as they go into attention.
        target: share of the true mass, in (0, 1].
        causal, scale: as in `attention`.

    Raises:
        ValueError, TypeError: a bad argument, a layer without samples, or samples of a layer that differ in heads.

    >>> q, k = torch.randn(1, 256, 2, 16), torch.randn(1, 256, 1, 16)
    >>> table = calibrate(XAttention(stride=8, block=32), [[(q, k)], [(q, k)]]).threshold
    >>> len(table), len(table[0])
    (2, 2)
    """
    if not isinstance(selector, XAttention):
        raise bad_kind("selector", "must be an XAttention", selector)
    check_share("target", target)
    table = []
    for number, samples in enumerate(layers):
        above, total = torch.zeros(0), torch.zeros(0)
        for q, k in samples:
            check_tensors(q, k, k, packed=False)
            call = Call(causal, check_scale(scale, q.shape[-1]))
            shares = _shares(selector, q, k, call, target)
            if len(total) and len(total) != q.shape[2]:
                raise bad_value("layers", f"must have the same heads in all samples of layer {number} ({len(total)})", q.shape[2])
            above, total = (shares[0] + above, shares[1] + total) if len(total) else shares
        if not len(total) or not bool((total > 0).all()):
            raise bad_value("layers", f"must have a sample with a query that sees a key in layer {number}", "none")
        table.append(tuple((above / total).clamp(torch.finfo(torch.float32).tiny, 1.0).tolist()))
    if not table:
        raise bad_value("layers", "must have at least one layer", "none")
    return replace(selector, threshold=tuple(table))


def _shares(selector: XAttention, q: Tensor, k: Tensor, call: Call, target: float) -> tuple[Tensor, Tensor]:
    """For each head the estimated mass of blocks at least as large as the smallest needed one of their row, and of all; float64."""
    score = selector.mass(q.detach(), k.detach(), call)
    true = antidiagonal(q, k, stride=1, block=selector.block, causal=call.causal, scale=call.scale)
    needed = select(true, threshold=target)
    smallest = score.masked_fill(~needed, torch.inf).amin(dim=-1, keepdim=True)
    above = torch.where(score >= smallest, score, 0.0)
    return above.double().sum(dim=(0, 2, 3)).cpu(), score.double().sum(dim=(0, 2, 3)).cpu()
