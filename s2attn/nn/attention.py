"""`SparseAttention`: attention with a pattern as a module, without parameters unless sinks are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.layout import HeadRange, layout_heads, pattern_hint
from s2attn.ops import attention
from s2attn.ops.checks import check_softcap
from s2attn.ops.selector import Selector
from s2attn.ops.step import LayerCall, current_step
from s2attn.patterns import Pattern


class SparseAttention(nn.Module):
    """Attention over the keys that a pattern lets each query see; no projections.

    Without sinks it has no parameters, and nothing in the state dict; with them one parameter, ``sinks``.

    Inside ``with cache.step(...)`` of a `s2attn.SparseCache` the tensors hold the new tokens alone: their keys are stored in the cache,
    their queries see what it holds, and rows that were padded give 0 where the padding is. There ``layer`` says whose pages these are, so
    that every module of a model needs its own number, from 0 on.

    Args:
        pattern: which keys are seen; or a selector, which finds them from q and k.
        num_heads: query heads H of the tensors that come.
        num_kv_heads: key/value heads G, H by default.
        causal, scale, softcap, backend: as in `s2attn.attention`.
        layer: number of the layer, for patterns that differ by layer.
        heads: the global heads that these are, under tensor parallelism.
        sinks: learn one logit for each query head, a parameter ``(num_heads,)`` that starts at 0 and joins the softmax denominator.

    >>> layer = SparseAttention(Pattern.from_json('{"version": 1, "pattern": {"type": "Window", "n": 8}}'), num_heads=4, num_kv_heads=2)
    >>> layer(torch.randn(2, 100, 4, 16), torch.randn(2, 100, 2, 16), torch.randn(2, 100, 2, 16)).shape
    torch.Size([2, 100, 4, 16])
    """

    def __init__(
        self,
        pattern: Pattern | Selector,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        layer: int = 0,
        heads: HeadRange | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(pattern, (Pattern, Selector)):
            raise bad_kind("pattern", f"must be a Pattern or a selector{pattern_hint(pattern)}", pattern)
        if isinstance(pattern, Selector) and heads is not None:
            raise bad_value("heads", "must be left out when a selector is given", heads)
        self.pattern = pattern
        self.num_heads = check_int("num_heads", num_heads, 1)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else check_int("num_kv_heads", num_kv_heads, 1)
        if self.num_heads % self.num_kv_heads:
            raise bad_value("num_kv_heads", f"must divide num_heads ({self.num_heads})", num_kv_heads)
        if not isinstance(sinks, bool):
            raise bad_kind("sinks", "must be True or False", sinks)
        self.softcap = check_softcap(softcap)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(self.num_heads)) if sinks else None)
        self.causal, self.scale, self.layer, self.heads, self.backend = causal, scale, check_int("layer", layer, 0), heads, backend
        self._seen_as = self._first_alike()

    def _first_alike(self) -> int:
        """The first layer whose heads see what those of this one see: layers that are compiled one by one can then share their code."""
        if isinstance(self.pattern, Selector):
            return self.layer
        everyone = self.heads or HeadRange(0, self.num_heads, self.num_heads, self.num_kv_heads)
        mine, *others = (layout_heads(self.pattern, everyone, self.num_kv_heads, layer) for layer in (self.layer, *range(self.layer)))
        return others.index(mine) if mine in others else self.layer

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attend; shapes and results as in `s2attn.attention`."""
        if isinstance(q, torch.Tensor) and q.dim() >= 2 and q.shape[-2] != self.num_heads:
            raise bad_value("q", f"must have num_heads ({self.num_heads}) heads", q.shape[-2])
        if isinstance(k, torch.Tensor) and k.dim() >= 2 and k.shape[-2] != self.num_kv_heads:
            raise bad_value("k", f"must have num_kv_heads ({self.num_kv_heads}) heads", k.shape[-2])
        ask = current_step()
        if ask is not None:
            if cu_seqlens_q is not None or cu_seqlens_k is not None:
                raise bad_value("cu_seqlens_q and cu_seqlens_k", "must be left out while a cache takes a step", "packed sequences")
            out, lse = ask("attend", self._call(), q, k, v)
            return (out, lse) if return_lse else out
        return attention(
            q,
            k,
            v,
            self.pattern,
            causal=self.causal,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            return_lse=return_lse,
            layer=self._seen_as,
            heads=self.heads,
            backend=self.backend,
        )

    def _call(self) -> LayerCall:
        names = ("pattern", "num_heads", "num_kv_heads", "layer", "causal", "heads", "scale", "softcap", "sinks", "backend")
        return LayerCall(**{name: getattr(self, name) for name in names})

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        scoring = f"softcap={self.softcap}, sinks={self.sinks is not None}"
        return f"{self.pattern!r}, {heads}, causal={self.causal}, layer={self.layer}, {scoring}"
