"""Masks made from patterns token by token: slow, and independent of layouts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from s2attn.layout import HeadRange
from s2attn.patterns import Head, Pattern, Shape


def dense_mask(
    pattern: Pattern,
    num_heads: int,
    num_kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = True,
    layer: int = 0,
    heads: HeadRange | None = None,
) -> Tensor:
    """The bool mask ``(H, T, S)`` that `Pattern.allowed` spells out, with queries at the end of the keys.

    >>> from s2attn.patterns import Window
    >>> dense_mask(Window(2), 1, 1, 3, 3)[0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    heads = heads or HeadRange(0, num_heads, num_heads, num_kv_heads)
    q = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    k = np.arange(seqlen_k)[None, :]
    shape = Shape(seqlen_k, causal)
    masks = [pattern.allowed(q, k, shape, Head(h, heads.num_heads, heads.num_kv_heads, layer)) for h in heads.query_heads]
    return torch.from_numpy(np.stack(masks).reshape(num_heads, seqlen_q, seqlen_k))
