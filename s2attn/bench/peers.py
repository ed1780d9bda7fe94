"""Who takes part in a comparison: s2attn, torch's dense attention, and a compiled FlexAttention with the same mask."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2attn.bench.cases import AttentionCase
from s2attn.layout import build_layout
from s2attn.ops import attention
from s2attn.patterns import And, Dense, Local, Or, Pattern, Power, Sink, Stride, Window

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Skip(Exception):
    """A peer cannot take part in a case; the text says why and stands in the record."""


@dataclass(frozen=True)
class Prepared:
    """A peer that is ready for one case.

    Attributes:
        attend: out of q, k, v, all in the peer's own order of axes.
        heads_first: that order is ``(B, H, T, D)`` instead of ``(B, T, H, D)``.
        metadata_s: seconds spent on block lists and masks.
        metadata_bytes: what they hold, where it is known.
        pattern: what the peer computes, which is what it is checked against.
        pairs: (query, key) pairs that it lists, all heads and batch entries.
    """

    attend: Attend
    heads_first: bool
    metadata_s: float
    metadata_bytes: int
    pattern: Pattern
    pairs: int


class Peer(ABC):
    """One way to compute a case."""

    name: str

    @abstractmethod
    def prepare(self, case: AttentionCase) -> Prepared:
        """Everything that is done once per mask; raises `Skip` where the peer cannot serve the case."""


class S2Attn(Peer):
    """This library, with the backend that ``backend="auto"`` picks or the one named."""

    name = "s2attn"

    def __init__(self, backend: str = "portable"):
        self.backend = backend

    def prepare(self, case: AttentionCase) -> Prepared:
        began = time.perf_counter()
        layout = build_layout(case.pattern, case.heads, case.kv_heads, seqlen_q=case.seqlen, block=case.block)
        if case.backward:
            _ = layout.columns
        seconds = time.perf_counter() - began
        pairs = case.batch * int(layout.pairs.sum()) * case.heads // layout.heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, layout, backend=self.backend)

        return Prepared(attend, False, seconds, layout.nbytes, case.pattern, pairs)


class Sdpa(Peer):
    """torch's dense causal attention: every key, whatever the case's pattern."""

    name = "sdpa"

    def prepare(self, case: AttentionCase) -> Prepared:
        gqa = case.heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        return Prepared(attend, True, 0.0, 0, Dense(), case.pairs_dense)


class Flex(Peer):
    """torch's FlexAttention, compiled, with the same mask at the same block size; its mask is built by a compiled function too.

    Without compilation the mask of 16k tokens and 8 heads alone takes 21 GB.
    """

    name = "flex"

    def prepare(self, case: AttentionCase) -> Prepared:
        if case.backward:
            raise Skip("FlexAttention has no backward on CPUs")
        try:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        except ImportError:
            raise Skip(f"torch {torch.__version__} has no FlexAttention") from None
        mask = mask_function(case.pattern, case)
        began = time.perf_counter()
        build = create_block_mask if case.seqlen <= 2048 else torch.compile(create_block_mask)
        block_mask = build(mask, None, case.heads, case.seqlen, case.seqlen, device="cpu", BLOCK_SIZE=case.block)
        seconds = time.perf_counter() - began
        held = sum(part.numel() * part.element_size() for part in block_mask.as_tuple() if isinstance(part, Tensor))
        kernel = torch.compile(flex_attention, dynamic=False)
        gqa = case.heads != case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kernel(q, k, v, block_mask=block_mask, enable_gqa=gqa)

        layout = build_layout(case.pattern, case.heads, case.kv_heads, seqlen_q=case.seqlen, block=case.block)
        pairs = case.batch * int(layout.pairs.sum()) * case.heads // layout.heads
        return Prepared(attend, True, seconds, held, case.pattern, pairs)


MaskFunction = Callable[[Any, Any, Any, Any], Any]


def mask_function(pattern: Pattern, case: AttentionCase) -> MaskFunction:
    """A FlexAttention ``mask_mod(b, h, q, k)`` for the causal form of ``pattern``, written by hand as its user would.

    Raises:
        Skip: for a kind of pattern that has none here.
    """
    inner = _mask(pattern, case)
    return lambda b, h, q, k: (k <= q) & inner(b, h, q, k)


def _mask(pattern: Pattern, case: AttentionCase) -> MaskFunction:
    if isinstance(pattern, (Or, And)):
        return _joined([_mask(part, case) for part in pattern.parts], either=isinstance(pattern, Or))
    match pattern:
        case Dense():
            return lambda b, h, q, k: q >= 0
        case Window(n=n):
            return lambda b, h, q, k: q - k < n
        case Sink(n=n):
            return lambda b, h, q, k: k < n
        case Local(n=n, block=size):
            return lambda b, h, q, k: q // size - k // size < n
        case Power(base=2, block=size):
            return lambda b, h, q, k: ((q // size - k // size) & (q // size - k // size - 1)) == 0
        case Stride():
            return _stride_mask(pattern, case)
    raise Skip(f"no FlexAttention mask is written for {type(pattern).__name__}")


def _joined(masks: list[MaskFunction], *, either: bool) -> MaskFunction:
    def joined(b: Any, h: Any, q: Any, k: Any) -> Any:
        total = masks[0](b, h, q, k)
        for mask in masks[1:]:
            total = total | mask(b, h, q, k) if either else total & mask(b, h, q, k)
        return total

    return joined


def _stride_mask(pattern: Stride, case: AttentionCase) -> MaskFunction:
    size, stride, shift = pattern.block, pattern.stride, pattern.shift
    if isinstance(pattern.offset, int):
        fixed = pattern.offset + shift
        return lambda b, h, q, k: (k // size + fixed) % stride == 0
    group = case.heads // case.kv_heads if pattern.heads == "kv" else 1
    return lambda b, h, q, k: (k // size + h // group + shift) % stride == 0


PEERS: dict[str, Callable[[], Peer]] = {"s2attn": S2Attn, "sdpa": Sdpa, "flex": Flex}
