"""What `s2attn tune` runs: one kernel with any tiles, over the problem of a target or over several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from s2attn.backends import Pages, Requests, Scoring
from s2attn.backends.triton import launch
from s2attn.backends.triton.backend import processors
from s2attn.backends.triton.decode import Rows, decode, plan_decode
from s2attn.backends.triton.tiles import Tiles
from s2attn.backends.triton.ways import Way, objections
from s2attn.core import bad_value
from s2attn.tuning.candidates import Target, fallback
from s2attn.tuning.paged import Batch, DecodeCase

Run = Callable[[], list[Tensor]]


class Bench(ABC):
    """The tensors and the layout of one target, and its kernel over them with any tiles."""

    graph = False
    """Whether calls are so short that the host's time would count where no graph is replayed."""

    def __init__(self, target: Target, device: torch.device):
        self.target, self.layout = target, target.layout(device)

    @staticmethod
    def random(target: Target, device: torch.device) -> Bench:
        """Normal numbers on a device."""
        return DecodeBench.filled(target, device) if target.situation.op == "decode" else AttentionBench.filled(target, device)

    @staticmethod
    def hollow(target: Target, device: torch.device) -> Bench:
        """Tensors without memory: kernels are compiled for them and for the device, and not started."""
        return DecodeBench.empty(target, device) if target.situation.op == "decode" else AttentionBench.empty(target, device)

    @abstractmethod
    def calls(self, tiles: Tiles) -> dict[str, Run]:
        """One start of the target's kernel with these tiles, for each problem by its name.

        Raises:
            ValueError: tiles in another form than "plain" cannot serve.
        """

    def begin(self, shared_limit: int) -> None:
        """Compute what the kernel needs of others."""
        return

    @property
    def lost(self) -> bool:
        """Whether the compiler did not specialise the warps of the tiles that came last, which were in such a form and have run."""
        return False


class AttentionBench(Bench):
    """Forward, dq or dkv.

    Args:
        make: a tensor ``(1, seqlen, heads, width)`` of the target's dtype, for so many heads and such a width.
    """

    def __init__(self, target: Target, device: torch.device, make: Callable[[int, int], Tensor]):
        super().__init__(target, device)
        s = target.situation
        self.q, self.k, self.v = make(target.heads, s.head_dim), make(target.kv_heads, s.head_dim), make(target.kv_heads, s.v_dim)
        self.dout, self.scoring = make(target.heads, s.v_dim), Scoring(s.head_dim**-0.5)
        self.lse = self.delta = torch.empty(1, target.heads, target.seqlen, device=self.q.device)
        self.way: Way | None = None

    @classmethod
    def filled(cls, target: Target, device: torch.device) -> AttentionBench:
        generator = torch.Generator(device).manual_seed(0)
        return cls(
            target, device, lambda heads, width: torch.randn(
                1, target.seqlen, heads, width, generator=generator, device=device
            ).to(target.dtype)
        )  # fmt: skip

    @classmethod
    def empty(cls, target: Target, device: torch.device) -> AttentionBench:
        return cls(target, device, lambda heads, width: torch.empty(1, target.seqlen, heads, width, dtype=target.dtype, device="meta"))

    def begin(self, shared_limit: int) -> None:
        """What the backward kernels need of the forward pass."""
        rows = self._way("forward", fallback(replace(self.target.situation, op="forward"), shared_limit))
        out, self.lse = rows.forward(self.q, self.k, self.v, self.layout, self.scoring)
        self.delta = launch.delta(out, self.dout, self.lse, None, {})

    @property
    def lost(self) -> bool:
        return self.way is not None and self.way.special is not None and self.way.special.lost

    def _way(self, op: str, tiles: Tiles) -> Way:
        way = self.way = Way.of(op, tiles, self.q, self.k, self.v, self.layout, self.scoring)
        if tiles.form != "plain" and way.special is None:
            raise bad_value(tiles.form, "must be able to serve", "; ".join(
                objections(op, tiles.form, self.q, self.k, self.v, self.layout, self.scoring)
            ) or f"device {self.layout.device}")  # fmt: skip
        return way

    def calls(self, tiles: Tiles) -> dict[str, Run]:
        op = self.target.situation.op
        way, inputs, rest = self._way(op, tiles), (self.q, self.k, self.v), (self.layout, self.scoring)
        backward = (*inputs, self.dout, self.lse, self.delta, *rest)
        runs: dict[str, Run] = {
            "forward": lambda: list(way.forward(*inputs, *rest)),
            "dq": lambda: [way.dq(*backward)],
            "dkv": lambda: list(way.dkv(*backward)),
        }
        return {op: runs[op]}


class DecodeBench(Bench):
    """Decoding over pages: batches of several sizes and pages, which one choice of tiles has to serve.

    Args:
        make: the tensors of a case.
    """

    graph = True

    def __init__(self, target: Target, device: torch.device, make: Callable[[DecodeCase], Batch]):
        super().__init__(target, device)
        self.batches, self.rows = [make(case) for case in target.cases], Rows(self.layout)

    @classmethod
    def filled(cls, target: Target, device: torch.device) -> DecodeBench:
        return cls(target, device, lambda case: Batch.of(case, 0, str(device)))

    @classmethod
    def empty(cls, target: Target, device: torch.device) -> DecodeBench:
        return cls(target, device, hollow_batch)

    def calls(self, tiles: Tiles) -> dict[str, Run]:
        return {batch.case.name: self._call(batch, tiles) for batch in self.batches}

    def _call(self, batch: Batch, tiles: Tiles) -> Run:
        pages, requests = Pages(batch.k_pages, batch.v_pages, batch.block_table.unsqueeze(1)), Requests(batch.seq_lens, None, checked=False)
        scoring, programs = Scoring(batch.case.head_dim**-0.5), processors(self.layout.device)
        plan = plan_decode(batch.q.flatten(0, 1).unsqueeze(0), pages, requests, self.layout, scoring, tiles, self.rows, programs)
        return lambda: list(decode(plan))


def hollow_batch(case: DecodeCase) -> Batch:
    """The shapes of a case without memory."""
    counts = [-(-length // case.page_size) for length in case.lengths]
    pages = torch.empty(sum(counts), case.page_size, case.kv_heads, case.head_dim, dtype=getattr(torch, case.dtype), device="meta")
    q = pages.new_empty(case.batch, case.q_len, case.heads, case.head_dim)
    table = pages.new_empty(case.batch, max(counts), dtype=torch.int32)
    return Batch(case, q, pages, pages.clone(), table, table.new_empty(case.batch))
