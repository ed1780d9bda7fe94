"""`DynamicCache`: keys and values one after another in memory that grows, for `s2attn.attention` and no pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2attn.core import Unsupported, bad_kind, bad_value, check_int


@dataclass(frozen=True, eq=False)
class _Layer:
    pools: tuple[Tensor, Tensor]  # keys and values (B, room, G, width)
    tokens: int


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
        self._layers: dict[int, _Layer] = {}

    def update(self, k: Tensor, v: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Store the keys ``(B, T, G, D)`` and values ``(B, T, G, Dv)`` of new tokens; all of the layer's, ``(B, S, G, D)`` and so on.

        The results are views, which hold until :meth:`crop` and the next update. Memory doubles when it is full.
        """
        layer = check_int("layer", layer, 0)
        self._check(k, v, layer)
        before = self._layers.get(layer)
        begin = 0 if before is None else before.tokens
        end = begin + k.shape[1]
        pools = []
        for i, new in enumerate((k, v)):
            pool = None if before is None else before.pools[i]
            if pool is None or end > pool.shape[1]:
                pool = _grown(pool, new, begin, max(end, 2 * begin))
            pool[:, begin:end] = new
            pools.append(pool)
        self._layers[layer] = _Layer((pools[0], pools[1]), end)  # last of all: whatever was raised, nothing has changed
        return pools[0][:, :end], pools[1][:, :end]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens of each row that a layer has been given."""
        kept = self._layers.get(check_int("layer", layer, 0))
        return 0 if kept is None else kept.tokens

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens of every layer: drafts that were not accepted, or a prompt that is used again."""
        most = min((kept.tokens for kept in self._layers.values()), default=0)
        if check_int("length", length, 0) > most:
            raise bad_value("length", f"must be at most {most}, the tokens that every layer has", length)
        self._layers = {layer: replace(kept, tokens=length) for layer, kept in self._layers.items()}

    def reorder_cache(self, rows: Tensor) -> None:
        """Make the batch of these rows ``(new batch,)``, integers in any order and as often as wanted: beams that go on."""
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
            raise bad_kind("rows", "must be an int32 or int64 tensor (new batch,)", rows)
        for kept in self._layers.values():
            batch = len(kept.pools[0])
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < batch:
                raise bad_value("rows", f"must be below the batch, {batch}, and not negative", rows.tolist())
        chosen = {}
        for layer, kept in self._layers.items():
            with torch.inference_mode(False):
                k, v = (pool[:, : kept.tokens].index_select(0, rows.to(pool.device)) for pool in kept.pools)
            chosen[layer] = _Layer((k, v), kept.tokens)
        self._layers = chosen

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the memory that is allocated, room for more tokens included."""
        return sum(pool.numel() * pool.element_size() for kept in self._layers.values() for pool in kept.pools)

    @property
    def bytes_used(self) -> int:
        """Bytes of all keys and values that are kept, without room for more."""
        pools = ((pool, kept.tokens) for kept in self._layers.values() for pool in kept.pools)
        return sum(pool[:, :tokens].numel() * pool.element_size() for pool, tokens in pools)

    @property
    def bytes_dense(self) -> int:
        """What the tokens take where every key is kept, which is what this cache does: ``bytes_used``."""
        return self.bytes_used

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
        kept = self._layers.get(layer)
        for name, new, pool in zip(("k", "v"), (k, v), () if kept is None else kept.pools, strict=False):
            if (len(new), new.shape[2:]) != (len(pool), pool.shape[2:]):
                rule = f"must have the batch, heads and width of layer {layer} before, {(len(pool), *pool.shape[2:])}"
                raise bad_value(name, rule, (len(new), *new.shape[2:]))
            if new.dtype != pool.dtype or new.device != pool.device:
                rule = f"must have the dtype and device of layer {layer} before, {pool.dtype} on {pool.device}"
                raise bad_value(name, rule, f"{new.dtype} on {new.device}")


def _grown(pool: Tensor | None, new: Tensor, begin: int, room: int) -> Tensor:
    """Memory like ``new`` for ``room`` tokens, of which the first ``begin`` are those of ``pool``."""
    with torch.inference_mode(False):  # what is made in inference mode could not be written to outside of it
        larger = torch.empty(new.shape[0], room, *new.shape[2:], dtype=new.dtype, device=new.device)
        if pool is not None:
            larger[:, :begin] = pool[:, :begin]
    return larger
