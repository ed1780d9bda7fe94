"""`DynamicCache`: keys and values one after another in memory that grows, for `s2attn.attention` and no pages."""

from __future__ import annotations

import torch
from torch import Tensor

from s2attn.core import Unsupported, bad_kind, bad_value, check_int


class DynamicCache:
    """All keys and values of all layers for a batch whose rows have one length, with the calls of Transformers' class of that name.

    Axes are those of `s2attn.attention`, and its rule that queries sit at the end of the keys does the rest: prefill, chunks and single
    tokens are one call. Nothing is ever given back; `s2attn.SparseCache` does that. There is no gradient.

    >>> import s2attn
    >>> cache, pattern = DynamicCache(), s2attn.Window(16)
    >>> for length in (40, 1, 1):
    ...     q, k, v = torch.randn(2, length, 4, 8), torch.randn(2, length, 2, 8), torch.randn(2, length, 2, 8)
    ...     out = s2attn.attention(q, *cache.update(k, v), pattern)
    >>> cache.get_seq_length(), out.shape
    (42, torch.Size([2, 1, 4, 8]))
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}

    def update(self, k: Tensor, v: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Store the keys ``(B, T, G, D)`` and values ``(B, T, G, Dv)`` of new tokens; all of the layer's, ``(B, S, G, D)`` and so on.

        The results are views, which hold until :meth:`crop` and the next update. Memory doubles when it is full.
        """
        layer, begin = check_int("layer", layer, 0), self.get_seq_length(layer)
        self._check(k, v, layer)
        end = begin + k.shape[1]
        if layer not in self._layers or end > self._layers[layer][0].shape[1]:
            self._layers[layer] = self._grown(k, v, layer, end)
        self._lengths[layer] = end
        pools = self._layers[layer]
        for pool, new in zip(pools, (k, v), strict=True):
            pool[:, begin:end] = new
        return pools[0][:, :end], pools[1][:, :end]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens of each row that a layer has been given."""
        return self._lengths.get(check_int("layer", layer, 0), 0)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens of every layer: drafts that were not accepted, or a prompt that is used again."""
        most = min(self._lengths.values(), default=0)
        if check_int("length", length, 0) > most:
            raise bad_value("length", f"must be at most {most}, the tokens that every layer has", length)
        self._lengths = dict.fromkeys(self._lengths, length)

    def reorder_cache(self, rows: Tensor) -> None:
        """Make the batch of these rows ``(new batch,)``, integers in any order and as often as wanted: beams that go on."""
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
            raise bad_kind("rows", "must be an int32 or int64 tensor (new batch,)", rows)
        for k, _ in self._layers.values():
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(k):
                raise bad_value("rows", f"must be below the batch, {len(k)}, and not negative", rows.tolist())
        for layer, pools in self._layers.items():
            k, v = (pool[:, : self._lengths[layer]].index_select(0, rows.to(pool.device)) for pool in pools)
            self._layers[layer] = k, v

    @property
    def bytes_used(self) -> int:
        """Bytes of all keys and values that are kept, without room for more."""
        pools = ((pool, self._lengths[layer]) for layer, both in self._layers.items() for pool in both)
        return sum(pool[:, :length].numel() * pool.element_size() for pool, length in pools)

    def _grown(self, k: Tensor, v: Tensor, layer: int, end: int) -> tuple[Tensor, Tensor]:
        begin = self.get_seq_length(layer)
        room = max(end, 2 * begin)
        made = []
        for i, new in enumerate((k, v)):
            pool = new.new_empty(new.shape[0], room, *new.shape[2:])
            if begin:
                pool[:, :begin] = self._layers[layer][i][:, :begin]
            made.append(pool)
        return made[0], made[1]

    def _check(self, k: Tensor, v: Tensor, layer: int) -> None:
        for name, new in (("k", k), ("v", v)):
            if not isinstance(new, Tensor) or not new.is_floating_point():
                raise bad_kind(name, "must be a floating point tensor", new)
            if new.dim() != 4 or new.shape[:3] != k.shape[:3]:
                raise bad_value(
                    name, "must have shape (batch, tokens, kv_heads, head_dim), and k and v differ in the last axis only", new.shape
                )
            if new.requires_grad and torch.is_grad_enabled():
                raise Unsupported("a cache has no gradient", {"autograd": ["call it under torch.no_grad()"]})
        for name, new, pool in zip(("k", "v"), (k, v), self._layers.get(layer, ()), strict=False):
            if (len(new), new.shape[2:]) != (len(pool), pool.shape[2:]):
                rule = f"must have the batch, heads and width of layer {layer} before, {(len(pool), *pool.shape[2:])}"
                raise bad_value(name, rule, (len(new), *new.shape[2:]))
            if new.dtype != pool.dtype or new.device != pool.device:
                rule = f"must have the dtype and device of layer {layer} before, {pool.dtype} on {pool.device}"
                raise bad_value(name, rule, f"{new.dtype} on {new.device}")
