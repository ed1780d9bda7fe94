"""Which layers keep their keys on the device, given its memory: the arithmetic before a cache in two memories is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from s2attn.backends.checks import lse_dtype
from s2attn.cache.needs import most_pages, page_needs
from s2attn.core import Unsupported, check_int
from s2attn.layout import HeadRange
from s2attn.patterns import Pattern, Recipe


@dataclass(frozen=True)
class LayerPlan:
    """Where the keys and values of each layer shall lie.

    Attributes:
        host_layers: numbers of the layers whose keys lie on the host; the others stay on the device.
        layer_bytes: bytes of each layer, at its most.
        device_pages, host_pages: pages that both need.
        device_bytes, host_bytes: the same in bytes.
        bytes_per_token: what crosses the bus for each new token of each sequence: q, k and v of the layers on the host one way, out and
            lse the other.
    """

    host_layers: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    device_pages: int
    host_pages: int
    device_bytes: int
    host_bytes: int
    bytes_per_token: int

    @property
    def device_layers(self) -> tuple[int, ...]:
        """The layers that stay."""
        return tuple(layer for layer in range(len(self.layer_bytes)) if layer not in self.host_layers)

    def __str__(self) -> str:
        stay, layers = len(self.device_layers), len(self.layer_bytes)
        here, there = self.device_bytes / 2**30, self.host_bytes / 2**30
        return (
            f"{stay} of {layers} layers stay on the device: {here:.2f} GiB there, {there:.2f} GiB on the host, "
            f"{self.bytes_per_token} bytes over the bus for each new token"
        )


def plan_layers(
    pattern: Pattern | Recipe,
    *,
    device_bytes: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    tokens: int,
    num_heads: int | None = None,
    v_dim: int | None = None,
    sequences: int = 1,
    chunk: int = 512,
    page_size: int = 64,
    heads: HeadRange | None = None,
    hold: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weight_bytes: int = 0,
    activation_bytes: int = 0,
) -> LayerPlan:
    """How many layers can keep their keys on the device, and which: as many as fit, the smallest first, of equal ones the first.

    With all layers dense it is FastAttention's ``floor((memory - weights - activations) / (2 * B * S * G * D * bytes))``
    (arXiv:2410.16663, section 4.4); a layer with a sparse pattern counts with the pages that it really keeps.

    Args:
        device_bytes, weight_bytes, activation_bytes: memory of the device, and what else lies in it.
        tokens, sequences, chunk: room for so many sequences of so many tokens, which come up to ``chunk`` at a time.
        pattern, num_layers, num_heads, num_kv_heads, head_dim, v_dim, page_size, heads, hold, dtype: as of `SparseCache`.

    Raises:
        Unsupported: weights and activations alone are more than the memory.

    >>> from s2attn import Dense
    >>> shape = {"num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "tokens": 131072}
    >>> print(plan_layers(Dense(), device_bytes=24 << 30, weight_bytes=15 << 30, activation_bytes=1 << 30, **shape))
    16 of 32 layers stay on the device: 8.00 GiB there, 8.00 GiB on the host, 329728 bytes over the bus for each new token
    """
    for name, value in (("device_bytes", device_bytes), ("weight_bytes", weight_bytes), ("activation_bytes", activation_bytes)):
        check_int(name, value, 0)
    check_int("sequences", sequences, 1)
    query_heads = num_kv_heads if num_heads is None else num_heads
    everyone = heads or HeadRange(0, query_heads, query_heads, num_kv_heads)
    needs = page_needs(pattern, everyone, num_kv_heads, num_layers, check_int("tokens", tokens, 1), page_size)
    width = head_dim + (head_dim if v_dim is None else v_dim)
    page_bytes = page_size * width * dtype.itemsize

    def pages(layers: Sequence[int]) -> int:
        if not layers:
            return 0
        return sequences * most_pages(needs[list(layers)], tokens=tokens, chunk=chunk, page_size=page_size, hold=hold)

    room = device_bytes - weight_bytes - activation_bytes
    if room < 0:
        raise Unsupported("nothing can lie on the device", {"memory": [f"weights and activations need {-room} bytes more than there are"]})
    each = [pages([layer]) * page_bytes for layer in range(num_layers)]
    stay: list[int] = []
    for layer in np.argsort(each, kind="stable").tolist():
        if pages([*stay, layer]) * page_bytes > room:
            break
        stay.append(layer)
    away = tuple(layer for layer in range(num_layers) if layer not in stay)
    here, there = pages(sorted(stay)), pages(away)
    v_width = width - head_dim
    one = (query_heads * (head_dim + v_width) + num_kv_heads * width) * dtype.itemsize + lse_dtype(dtype).itemsize * query_heads
    sizes = here, there, here * page_bytes, there * page_bytes
    return LayerPlan(away, tuple(each), *sizes, len(away) * one)
