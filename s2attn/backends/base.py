"""What a backend is: a way to compute attention over a layout, and the reasons why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from s2attn.core import Unsupported
from s2attn.layout import Layout


@dataclass(frozen=True, eq=False)
class Scoring:
    """How products q.k become logits, and what else stands in the softmax denominator.

    Not to be confused with the pattern `Sink`, which lets queries see the first tokens: the sinks here are numbers, and no key.

    Attributes:
        scale: the logit of a pair is ``x = scale * q.k``.
        softcap: None, or a positive bound: the logit is then ``softcap * tanh(x / softcap)``, taken before the mask (as in Gemma 2).
        sinks: None, or ``(H,)`` float32 (float64 for float64 inputs) on q's device: one logit for each query head, which joins the
            denominator of every row of its head and has no value (as in gpt-oss; a sink of 0 is "softmax1"). -inf counts for nothing.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Reduction:
    """How queries and keys are reduced to estimate the mass of blocks; see `s2attn.ops.antidiagonal`, which says what it means.

    Attributes:
        stride: tokens per group of queries, and of keys; divides ``block``.
        block: tokens per block of the result.
        causal: query group i reads the key groups that begin at or before its last query.
        scale, softcap: as of `Scoring`.
    """

    stride: int
    block: int
    causal: bool
    scale: float
    softcap: float | None = None

    def reach(self, seqlen_q: int, seqlen_k: int) -> int:
        """Query group i reads the key groups up to ``reach + i``; those beyond the last one do not exist."""
        if not self.causal:
            return -(-seqlen_k // self.stride)
        return (seqlen_k - seqlen_q + self.stride - 1) // self.stride


@dataclass(frozen=True, eq=False)
class Pages:
    """Keys and values that lie in pages of a cache, and where those of each sequence are.

    Attributes:
        k, v: ``(num_pages, page_size, G, D)`` and ``(num_pages, page_size, G, Dv)``, any strides; q's dtype or float8_e4m3fn.
        table: ``(B, G, max_pages)`` integers, or ``(B, 1, max_pages)`` where all KV heads share it: the page of each ``page_size`` tokens.
            Whatever a layout lists points to a page that is there; other numbers may be anything.
        k_scale, v_scale: None, or ``(G,)`` float32, which the numbers in the pages of each KV head are multiplied by.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]


@dataclass(frozen=True, eq=False)
class Requests:
    """The sequences of a paged call, whose numbers stay on the device.

    Attributes:
        seq_lens: ``(B,)`` integers: tokens of each sequence, the new ones included.
        cu_seqlens_q: ``(B + 1,)`` integers, or None where every sequence has the same number of queries.
        checked: all numbers, those of the block table too, have been looked at and are as documented. Otherwise they may be anything, and
            are clamped: lengths to what the table has room for, cumulative lengths to a rising walk inside the queries, and keys in pages
            that do not exist count as unseen. A query of no sequence gives 0 and -inf. Nothing outside of the tensors is read or written.
        batch_invariant: the bits of a sequence's result depend on nothing but this sequence.
    """

    seq_lens: Tensor
    cu_seqlens_q: Tensor | None
    checked: bool = True
    batch_invariant: bool = False

    @property
    def batch(self) -> int:
        return self.seq_lens.shape[0]


@dataclass(frozen=True, eq=False)
class Writes:
    """New keys and values on their way into pages.

    Attributes:
        k, v: ``(tokens, G, D)`` and ``(tokens, G, Dv)``.
        k_pages, v_pages: as of `Pages`; different pages do not share memory.
        slots: ``(tokens,)`` integers: slot s is token ``s % page_size`` of page ``s // page_size``. Tokens whose slot is not there, be it
            negative or beyond the last page, are left out; of several tokens with the same slot one is kept.
        k_scale, v_scale: None, or ``(G,)`` float32: what numbers are divided by on their way into float8 pages.
    """

    k: Tensor
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    slots: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class Backend(ABC):
    """One way to compute exact attention over a `Layout`.

    Tensors that reach a backend are checked already and have four axes: q ``(B, T, H, D)``, k ``(B, S, G, D)``, v ``(B, S, G, Dv)``,
    out ``(B, T, H, Dv)``, lse ``(B, H, T)`` float32 (float64 for float64 inputs), natural log; packed sequences arrive with B = 1.
    lse is the log of the whole denominator, sinks included: a row that sees no key gives out 0 and the lse of its sink, or -inf without
    sinks. Both directions are deterministic.
    """

    name: str
    by_position = False
    """Whether paged calls may come with a layout whose rows are positions."""
    capturable = False
    """Whether a CUDA graph can capture paged calls and stores: no number is read on the host."""

    @abstractmethod
    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        """Every reason why this backend cannot serve such tensors; empty when it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """Return ``(out, lse)``."""

    @abstractmethod
    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(dq, dk, dv)``; ``dS = P * (dP - delta)`` with ``P = exp(logit - lse)`` and ``delta = sum(dout * out) - dlse``.

        A soft-cap multiplies dS by ``1 - (logit / softcap) ** 2``. The gradient of the sinks needs no keys, and no backend computes it:
        see `s2attn.ops.register.sink_gradient`.
        """

    def warmup(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring, backward: bool) -> None:
        """Compile what such calls will run, ``backward`` too if so; q, k, v are on the meta device. Plain torch has nothing to compile."""
        return

    def mass_objections(self, q: Tensor, k: Tensor) -> list[str]:
        """Every reason why this backend cannot estimate the mass of blocks from such tensors; empty when it can."""
        return ["it does not estimate the mass of blocks"]

    def antidiagonal(self, q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
        """Block mass ``(B, H, query blocks, key blocks)`` float32, not empty, as `s2attn.ops.antidiagonal` says."""
        raise Unsupported(f"the {self.name} backend cannot estimate the mass of blocks", {self.name: self.mass_objections(q, k)})

    def paged_objections(self, q: Tensor, pages: Pages) -> list[str]:
        """Every reason why this backend cannot read keys and values from such pages; empty when it can."""
        return ["it does not read keys from pages"]

    def forward_paged(self, q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` as of :meth:`forward`, with q ``(1, total, H, D)``, sequence after sequence, and keys read through a block table.

        ``layout`` is causal, and either packed, one sequence for each line of the table, its block dividing the page size where not
        ``by_position``; or square, for every position that the table has room for: a query at position p then reads row ``p // block``
        as its token ``p % block`` does. Only pages with a key that some query sees are read.
        """
        raise Unsupported(f"the {self.name} backend cannot decode", {self.name: self.paged_objections(q, pages)})

    def warmup_paged(self, q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring) -> None:
        """Compile and load what :meth:`forward_paged` runs for such tensors in any batch. Plain torch has nothing to compile."""
        return

    def store_objections(self, new: Writes) -> list[str]:
        """Every reason why this backend cannot write such tokens into pages; empty when it can."""
        return ["it does not write to pages"]

    def store(self, new: Writes) -> None:
        """Write new keys and values in place; float8_e4m3fn pages get numbers that are cut to what float8 can hold."""
        raise Unsupported(f"the {self.name} backend cannot write to pages", {self.name: self.store_objections(new)})
