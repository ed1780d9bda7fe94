"""One run of a whole model over new tokens: room in all layers before it, their pages during it, what it needed alone back after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from s2attn.cache.checks import check_new, kept_pattern
from s2attn.cache.needs import pattern_of
from s2attn.core import bad_kind, bad_value, check_int
from s2attn.ops.attention import autocast
from s2attn.ops.step import LayerCall
from s2attn.patterns import Dense, Pattern

if TYPE_CHECKING:
    from s2attn.cache.sparse import SparseCache


class PagedStep:
    """New tokens ``(B, T)`` of some sequences of a `SparseCache`; made by :meth:`SparseCache.step`.

    Attributes:
        counts: how many tokens each row has; what stands behind them is padding.
        starts: the length of each sequence before.
    """

    def __init__(self, cache: SparseCache, sequences: Sequence[int], tokens: Tensor, counts: list[int], cascade: bool = False) -> None:
        self.counts = counts
        self.cache, self.sequences, self.tokens = cache, list(sequences), tokens
        self.texts = [cache.text(sequence) for sequence in sequences]
        self.starts = [len(text) for text in self.texts]
        rooms = cache.ledger.reserve_step(list(zip(sequences, self.counts, strict=True)))
        cache.prepare([room for layer in rooms for room in layer])
        self._cascade = cascade
        self._done = [False] * cache.num_layers
        self._slots = cache.numbers(np.stack([np.concatenate([room.slots.reshape(-1) for room in layer]) for layer in rooms]))
        self._tables = cache.numbers(np.stack([cache.table(sequences, layer) for layer in range(cache.num_layers)]))
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        self._seq_lens = cache.numbers(np.array(ends, dtype=np.int32))
        self._kept = self._cu = None
        if any(count != tokens.shape[1] for count in self.counts):
            real = torch.arange(tokens.shape[1]) < torch.tensor(self.counts)[:, None]
            self._kept = real.flatten().nonzero()[:, 0].to(cache.pools[0].device)
            self._cu = cache.numbers(np.array([0, *np.cumsum(self.counts)], dtype=np.int32))

    # what the modules of a model ask

    def positions(self, tokens: Tensor) -> Tensor:
        """The position of each new token in its sequence, ``(B, T)``; padding has that of the last token before it."""
        self._check_rows("tokens", tokens)
        place = torch.arange(tokens.shape[1])
        last = torch.tensor(self.counts)[:, None] - 1
        return (torch.tensor(self.starts)[:, None] + torch.minimum(place, last)).to(tokens.device)

    def look_back(self, tokens: Tensor, count: int) -> Tensor:
        """The new tokens behind the ``count`` before them."""
        self._check_rows("tokens", tokens)
        before = [([0] * count + text[-count:])[-count:] if count else [] for text in self.texts]
        return torch.cat((torch.tensor(before, dtype=tokens.dtype, device=tokens.device).reshape(len(tokens), count), tokens), dim=1)

    def attend(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys of a layer's new tokens and let their queries attend to all that the cache holds of it."""
        pattern = self._checked_pattern(call)
        for name, new in (("q", q), ("k", k), ("v", v)):
            self._check_rows(name, new, axes=4)
        q, k, v = autocast(q, k, v)
        check_new(k, v, self.cache.pools, self.cache.num_kv_heads, axes=4)
        if self._kept is not None:
            q, k, v = (x.flatten(0, 1)[self._kept] for x in (q, k, v))
        self.cache.store(k, v, self._slots[call.layer])
        self._done[call.layer] = True
        out, lse = self.cache.decode(
            q,
            pattern,
            cascade=self._cascade,
            block_table=self._tables[call.layer],
            seq_lens=self._seq_lens,
            cu_seqlens_q=self._cu,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            return_lse=True,
            layer=call.layer,
            heads=call.heads,
            backend=call.backend,
        )
        return (out, lse) if self._kept is None else self._spread(out, lse, self._kept)

    # its end

    def finish(self) -> None:
        """Give back what only these tokens' queries read, and remember the tokens."""
        left = [layer for layer, done in enumerate(self._done) if not done]
        if left:
            raise bad_value("step", "must reach a SparseAttention for every layer of the cache", f"nothing for layers {left}")
        rows = self.tokens.tolist()
        for sequence in self.sequences:
            self.cache.trim(sequence)
        for row, count, text in zip(rows, self.counts, self.texts, strict=True):
            text.extend(row[:count])

    def _spread(self, out: Tensor, lse: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Packed results in their places among the padding, which is 0, and -inf."""
        rows = out.new_zeros(self.tokens.numel(), *out.shape[1:])
        rows[kept] = out
        padded = lse.new_full((lse.shape[0], self.tokens.numel()), -torch.inf)
        padded[:, kept] = lse
        return rows.unflatten(0, self.tokens.shape), padded.unflatten(1, self.tokens.shape).transpose(0, 1).contiguous()

    def _check_rows(self, name: str, tensor: Tensor, axes: int = 2) -> None:
        if not isinstance(tensor, Tensor):
            raise bad_kind(name, "must be a tensor", tensor)
        if tensor.dim() < axes or tensor.shape[:2] != self.tokens.shape:
            rule = f"must have the batch and the tokens of the step, {tuple(self.tokens.shape)}, as its first two axes"
            raise bad_value(name, rule, tuple(tensor.shape))

    def _checked_pattern(self, call: LayerCall) -> Pattern:
        """The pattern of a module whose attention is what the cache was made for."""
        cache, pattern = self.cache, kept_pattern(call)
        if call.layer >= cache.num_layers:
            raise bad_value("layer", f"must be below num_layers of the cache ({cache.num_layers})", call.layer)
        if self._done[call.layer]:
            rule = "must be another one in each SparseAttention of a model, and be called once in a step"
            raise bad_value("layer", rule, f"{call.layer} a second time")
        came = call.num_heads, call.num_kv_heads, call.heads
        if came != (cache.num_heads, cache.num_kv_heads, cache.heads):
            rule = f"must have the heads of the cache, {cache.num_heads} over {cache.num_kv_heads}"
            raise bad_value("SparseAttention", f"{rule} ({cache.heads or 'all of the model'})", came)
        kept = pattern_of(cache.pattern, call.layer)
        if pattern != kept and not isinstance(kept, Dense):
            rule = f"must be what the cache keeps in layer {call.layer}, {kept}, or the cache's must be Dense()"
            raise bad_value("pattern", rule, pattern)
        return pattern


def checked_counts(sequences: Sequence[int], tokens: Tensor, counts: Sequence[int] | None) -> list[int]:
    """How many new tokens each row has, or an error for arguments of :meth:`SparseCache.step` that do not fit together."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise bad_kind("tokens", "must be an integer tensor (batch, tokens)", tokens)
    if tokens.dim() != 2 or not tokens.numel() or len(tokens) != len(sequences):
        rule = f"must have shape ({len(sequences)}, tokens), a row for each sequence, at least one token in a row"
        raise bad_value("tokens", rule, tuple(tokens.shape))
    found = [tokens.shape[1]] * len(tokens) if counts is None else [check_int("counts", count, 1) for count in counts]
    if len(found) != len(sequences) or max(found) > tokens.shape[1]:
        raise bad_value("counts", f"must have a number up to {tokens.shape[1]} for each of {len(sequences)} rows", found)
    return found
