"""What cache a model needs, found by letting it run over one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from s2attn.cache.checks import kept_pattern
from s2attn.core import Unsupported, bad_value
from s2attn.layout import default_block
from s2attn.ops import attention
from s2attn.ops.attention import autocast
from s2attn.ops.step import LayerCall, plain_look_back, plain_positions, taking
from s2attn.patterns import Recipe


class _Probe:
    """Attends without a cache, and notes who asked and with what shapes."""

    positions = staticmethod(plain_positions)
    look_back = staticmethod(plain_look_back)

    def __init__(self) -> None:
        self.found: list[tuple[LayerCall, dict[str, Any]]] = []

    def attend(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pattern, (q, k, v) = kept_pattern(call), autocast(q, k, v)
        place = {"num_heads": call.num_heads, "num_kv_heads": call.num_kv_heads, "heads": call.heads}
        self.found.append((call, {**place, "head_dim": k.shape[-1], "v_dim": v.shape[-1], "dtype": k.dtype, "device": k.device}))
        how: Any = {"causal": call.causal, "scale": call.scale, "softcap": call.softcap, "sinks": call.sinks, "backend": call.backend}
        return attention(q, k, v, pattern, **how, layer=call.layer, heads=call.heads, return_lse=True)


def device_of(model: Callable[[Tensor], Tensor], otherwise: torch.device) -> torch.device:
    """Where a model's first weight lies, and so its tokens; ``otherwise`` for what has none."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return otherwise if weight is None else weight.device


@torch.no_grad()
def cache_shape(model: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments of `SparseCache` that a model's `SparseAttention` modules answer, page_size included.

    Raises:
        ValueError: modules that share a number, or leave one out.
        Unsupported: a model without such modules, or layers of different shapes.
    """
    probe = _Probe()
    with taking(probe):
        model(torch.zeros(1, 1, dtype=torch.int64, device=device_of(model, torch.device("cpu"))))
    if not probe.found:
        raise Unsupported("there is nothing to keep for this model", {"SparseAttention": ["the model called none"]})
    layers = [call.layer for call, _ in probe.found]
    if sorted(layers) != list(range(len(layers))):
        raise bad_value("layer", f"must be 0 to {len(layers) - 1} in the SparseAttention modules of the model, each once", layers)
    shape = probe.found[0][1]
    others = [f"layer {call.layer}: {came}" for call, came in probe.found if came != shape]
    if others:
        raise Unsupported(f"all layers of a cache have one shape, here {shape}", {"model": others})
    patterns = {call.layer: kept_pattern(call) for call, _ in probe.found}
    same = len(set(patterns.values())) == 1
    page_size = min(default_block(pattern) for pattern in patterns.values())
    return {
        "pattern": patterns[0] if same else Recipe(patterns[0], layers=patterns),
        "num_layers": len(layers),
        "page_size": page_size,
        **shape,
    }
