"""`Selector`: what may stand in the place of a pattern, and finds the blocks from q and k instead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from s2attn.core import Unsupported, check_block, check_int
from s2attn.layout import Layout, from_blocks, read_cu_seqlens
from s2attn.ops.checks import autocast, check_cu_seqlens, check_scale, check_softcap, check_tensors
from s2attn.ops.transforms import refuse_transforms


@dataclass(frozen=True)
class Call:
    """What a selector may know of a call beside q and k; as in `attention`."""

    causal: bool = True
    scale: float | None = None
    softcap: float | None = None
    layer: int = 0
    backend: str = "auto"


@dataclass(frozen=True)
class Selector(ABC):
    """Chooses blocks of keys from q and k; `attention` is then exact on what was chosen.

    A choice is made for every sample, every head (or group of heads) and every block of queries. It is no function that gradients could
    flow through: q, k and v get the gradients of attention over the chosen blocks. The numbers of blocks decide shapes, so the choice
    waits for the device and cannot be captured in a CUDA graph.

    Attributes:
        block: tokens per block of the layout, 16 to 256.
    """

    block: int = field(default=128, kw_only=True)
    causal_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_block("block", self.block)

    @abstractmethod
    def choose(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """The chosen blocks of each sample: bool ``(B, H or G, query blocks, key blocks)``.

        q ``(B, T, H, D)`` and k ``(B, S, G, D)`` are checked already and hold tokens; blocks after the query may be chosen, and are cut.
        """

    def layout(
        self,
        q: Tensor,
        k: Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        layer: int = 0,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        backend: str = "auto",
    ) -> Layout:
        """The layout of the chosen blocks.

        Args:
            q, k: ``(B, T, H, D)`` and ``(B, S, G, D)``, or packed with ``cu_seqlens``.
            causal, scale, softcap, layer, cu_seqlens_q, cu_seqlens_k: as in `attention`.
            backend: who estimates, as in `antidiagonal`; estimates by means, bounds or lines are plain torch in any case.

        Returns:
            One layout for all samples. With B > 1, or packed tensors, it is that of sequences which lie one after another: it serves
            ``q.flatten(0, 1)`` with the cumulative lengths of the samples.

        Raises:
            ValueError, TypeError: a bad argument.
            Unsupported: inside a CUDA graph, or a kind of call that this selector does not know.
        """
        given = check_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
        check_tensors(q, k, k, packed=bool(given))
        q, k = autocast(q, k)
        call = Call(bool(causal), check_scale(scale, q.shape[-1]), check_softcap(softcap), check_int("layer", layer, 0), backend)
        self._check_call(q, k, call)
        if given:
            samples = _sequences(q, k, given)
            lengths = [(some_q.shape[1], some_k.shape[1]) for some_q, some_k in samples]
            chosen = [self._chosen(some_q, some_k, call)[0] for some_q, some_k in samples]
        else:
            lengths = [(q.shape[1], k.shape[1])] * max(1, q.shape[0])
            chosen = list(self._chosen(q, k, call))
        heads = max(mask.shape[0] for mask in chosen)
        chosen = [mask.expand(heads, -1, -1) for mask in chosen]
        return from_blocks(chosen, lengths, block=self.block, causal=call.causal, packed=bool(given) or len(chosen) > 1)

    def _check_call(self, q: Tensor, k: Tensor, call: Call) -> None:
        who = type(self).__name__
        refuse_transforms(who, q, k)
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            reason = "the number of chosen blocks decides shapes, so the choice has to wait for the device"
            raise Unsupported(f"{who} cannot choose inside a CUDA graph; choose with layout() outside of it", {who: [reason]})
        if self.causal_only and not call.causal:
            raise Unsupported(f"{who} needs causal=True", {who: ["it looks at distances to keys before the query"]})

    def _chosen(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """``choose``, but for calls without queries or keys, which have nothing to choose from: one head then stands for all."""
        if q.numel() and k.numel():
            return self.choose(q.detach(), k.detach(), call)
        blocks = (-(-length // self.block) for length in (q.shape[1], k.shape[1]))
        return torch.zeros(max(1, q.shape[0]), 1, *blocks, dtype=torch.bool, device=q.device)


def _sequences(q: Tensor, k: Tensor, given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    ends_q = read_cu_seqlens("cu_seqlens_q", given[0], q.shape[0])
    ends_k = read_cu_seqlens("cu_seqlens_k", given[1], k.shape[0])
    bounds = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    return [(q[None, q_lo:q_hi], k[None, k_lo:k_hi]) for q_lo, q_hi, k_lo, k_hi in bounds]
