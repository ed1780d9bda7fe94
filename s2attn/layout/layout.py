"""`Layout`: the block index that every backend walks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from s2attn.core import bad_value
from s2attn.layout.derived import Derived
from s2attn.layout.index import BlockIndex, Spans

T = TypeVar("T")

_LIVE: WeakValueDictionary[int, Layout] = WeakValueDictionary()
"""Layouts by the identity of their first tensor: an op that is handed tensors finds the object, and what is cached on it."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which key blocks each query block reads, per head: CSR rows, CSC columns, and a small table of mask tiles.

    A pair of blocks is *full* when every (query, key) pair in it is allowed, *partial* when some are; a partial one points to a mask
    tile. A layout never knows who made it, and it is independent of batch: every batch entry of an unpacked call uses it. Layout head
    ``h * heads // num_heads`` serves query head h, so a layout has G heads (a pattern per KV head), H heads, or any divisor of H.

    Attributes:
        block: tokens per block, on both axes.
        causal: no listed pair has its key after its query.
        rows: for each (head, query block) the key blocks.
        tiles: ``(num_tiles, block, block)`` bool, ``[query, key]``; False beyond the end of a sequence.
        q_spans, k_spans: where query and key blocks lie in the (packed) tensors.
        packed: the spans describe several sequences that lie one after another.
        seqlen_q, seqlen_k: query and key tokens (of all sequences together when packed); read off the spans when left out.

    Invariants, checked by :meth:`validate`:
        I1  all tensors have the documented shape and dtype and lie on one device
        I2  ``ptr`` never decreases inside a head and stays inside ``idx``
        I3  ``0 <= full <=`` length of the line
        I4  block numbers are in range, ascending, and no block is listed twice in a line
        I5  tile numbers and ``tile_ptr`` are in range
        I6  spans are consecutive and cover seqlen_q and seqlen_k; each holds 1 to ``block`` tokens, only a sequence's last one fewer
        I7  a row lists key blocks of its own sequence only
        I8  a key block shorter than ``block`` is never listed as full, and tiles are False beyond it
        I9  when ``causal``, no listed pair has its key after its query
    """

    block: int
    causal: bool
    rows: BlockIndex
    tiles: Tensor
    q_spans: Spans
    k_spans: Spans
    packed: bool = False
    seqlen_q: int = -1
    seqlen_k: int = -1

    def __post_init__(self) -> None:
        # Plain numbers, so that nobody has to ask the device (or a compiler) for them later.
        for name, spans in (("seqlen_q", self.q_spans), ("seqlen_k", self.k_spans)):
            if getattr(self, name) < 0:
                object.__setattr__(self, name, spans.total)
        if any(tensor.is_inference() for tensor in self.tensors()):
            self._leave_inference_mode()
        _LIVE[id(self.rows.ptr)] = self

    def _leave_inference_mode(self) -> None:
        """Copy tensors that were made under inference_mode, which autograd could not save when the layout is used in training."""
        with torch.inference_mode(False):
            parts = (self.rows, self.q_spans, self.k_spans)
            copies = [type(part)(*(tensor.clone() for tensor in part.tensors())) for part in parts]
            for name, copied in zip(("rows", "q_spans", "k_spans", "tiles"), (*copies, self.tiles.clone()), strict=True):
                object.__setattr__(self, name, copied)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies derive what they need anew.
        return Layout, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def heads(self) -> int:
        return self.rows.heads

    @property
    def device(self) -> torch.device:
        return self.tiles.device

    @cached_property
    def nbytes(self) -> int:
        """Bytes of rows and mask tiles, without what is derived from them."""
        return self.rows.nbytes + self.tiles.numel() * self.tiles.element_size()

    @property
    def nbytes_held(self) -> int:
        """Bytes of everything that lives as long as the layout: rows, tiles, spans, and what was derived so far."""
        return self.nbytes + self.q_spans.nbytes + self.k_spans.nbytes + self.derived.nbytes

    @cached_property
    def derived(self) -> Derived:
        """Where everything is kept that is derived from this layout: see :meth:`derive`."""
        return Derived(self.tensors(), self.nbytes)

    def derive(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make()`` returns, made on first use and kept with the layout.

        Backends keep here what their kernels read of a layout, and nowhere else: it is counted
        in :attr:`nbytes_held`, the least recently used is dropped when it becomes too much, and
        all of it is freed with the layout. So a value must not hold the layout itself, nor grow
        after it was made; derive its parts under keys of their own instead.

        Args:
            key: all that the value depends on besides the layout, beginning with who asks:
                ``("cpu", heads, kv_heads)``.
            make: takes no arguments; may derive other values.

        >>> from s2attn.layout import build_layout
        >>> from s2attn.patterns import Dense
        >>> layout = build_layout(Dense(), num_heads=1, seqlen_q=64)
        >>> before = layout.nbytes_held
        >>> counts = layout.derive(("mine", "counts"), lambda: layout.rows.counts)
        >>> layout.nbytes_held - before, layout.derive(("mine", "counts"), lambda: None) is counts
        (8, True)
        """
        return self.derived.get(key, make)

    @property
    def columns(self) -> BlockIndex:
        """The same entries by key block (CSC): for each (head, key block) the query blocks. Derived on first use."""
        from s2attn.layout.transpose import transpose_index

        return self.derive("columns", lambda: transpose_index(self.rows, len(self.k_spans)))

    @property
    def pairs(self) -> Tensor:
        """Allowed (query, key) pairs per head, ``(heads,)`` int64."""
        from s2attn.layout.count import count_pairs

        return self.derive("pairs", lambda: count_pairs(self))

    def tensors(self) -> list[Tensor]:
        """Everything as a flat list, heads first; :meth:`from_tensors` is its inverse."""
        return [*self.rows.tensors(), self.tiles, *self.q_spans.tensors(), *self.k_spans.tensors()]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor], *, causal: bool, packed: bool) -> Layout:
        """The layout of which these are the tensors; the very same object when it is still alive."""
        alive = _LIVE.get(id(tensors[0]))
        if alive is not None and alive.causal == causal and all(a is b for a, b in zip(alive.tensors(), tensors, strict=True)):
            return alive
        index, tiles, q_spans, k_spans = tensors[:5], tensors[5], tensors[6:10], tensors[10:14]
        return cls(tiles.shape[-1], causal, BlockIndex(*index), tiles, Spans(*q_spans), Spans(*k_spans), packed)

    @property
    def checked(self) -> Layout:
        """Self, once :meth:`validate` has passed: what an op asks before it walks a layout that somebody handed in."""
        return self if "_proven" in self.__dict__ else self.validate()

    def proven(self) -> Layout:
        """Self, marked as a layout that holds its invariants: for code whose tests prove it."""
        self.__dict__["_proven"] = True
        return self

    def to(self, device: torch.device | str) -> Layout:
        """The same layout on another device (itself when it lies there already)."""
        if torch.device(device) == self.device:
            return self
        parts = (self.rows.to(device), self.tiles.to(device), self.q_spans.to(device), self.k_spans.to(device))
        moved = Layout(self.block, self.causal, *parts, self.packed, self.seqlen_q, self.seqlen_k)
        return moved.proven() if "_proven" in self.__dict__ else moved

    def to_dense(self, head: int | None = None) -> Tensor:
        """The bool mask ``(heads, seqlen_q, seqlen_k)``, or of one head without the first axis: for tests and small drawings."""
        from s2attn.layout.convert import to_dense

        return to_dense(self, head)

    @classmethod
    def from_dense(cls, mask: Tensor, *, block: int = 64) -> Layout:
        """A layout that allows exactly the True pairs of a ``(T, S)`` or ``(heads, T, S)`` bool mask."""
        from s2attn.layout.convert import from_dense

        return from_dense(cls, mask, block=block)

    def draw(self, head: int = 0, width: int = 64) -> str:
        """One head as text: full, partial and empty blocks; see `s2attn.layout.draw.draw`."""
        from s2attn.layout.draw import draw

        return draw(self, head, width)

    def validate(self) -> Layout:
        """Check the numbered invariants; raise ``ValueError`` naming the broken one, or return self."""
        from s2attn.layout.validate import broken_invariant

        broken = broken_invariant(self)
        if broken is not None:
            raise bad_value("layout", f"must hold its invariants ({broken[0]})", broken[1])
        return self.proven()

    def __repr__(self) -> str:
        shape = f"heads={self.heads}, seqlen_q={self.seqlen_q}, seqlen_k={self.seqlen_k}, block={self.block}"
        return f"Layout({shape}, entries={self.rows.entries}, tiles={self.tiles.shape[0]}, device={str(self.device)!r})"
