"""How kernels go over one layout: tiles, walks, and what the specialised kernels need, each made once and on first use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.backends.base import Scoring
from s2attn.backends.triton import hopper, hopper_backward, launch, specialised
from s2attn.backends.triton.hopper import HopperWay, choose_hopper_form, has_hopper, hopper_objections, hopper_way
from s2attn.backends.triton.hopper_backward import HopperColumns, choose_column_form, choose_dq_form, hopper_columns
from s2attn.backends.triton.installed import allocator_objections, gluon_objections
from s2attn.backends.triton.specialised import SpecialisedWay, choose_form, form_objections, specialised_way
from s2attn.backends.triton.tiles import Tiles
from s2attn.backends.triton.walk import Walk, walk_columns, walk_rows
from s2attn.layout import Layout, dense_pairs

Special = SpecialisedWay | HopperWay | HopperColumns


def density_of(layout: Layout) -> float:
    """Listed blocks over those of dense attention."""

    def measure() -> float:
        dense = layout.heads * dense_pairs(layout)
        return layout.rows.entries * layout.block**2 / dense if dense else 0.0

    return layout.derive(("triton", "density"), measure)


def walk_of(
    op: str, layout: Layout, heads: int, kv_heads: int, factor: int, listed_tokens: int, key_range: int = 0, cut: bool = True
) -> Walk:
    """The walk of ``op`` for tiles of ``factor`` blocks against ``listed_tokens``; ``key_range`` and ``cut`` are for rows."""
    unit = max(listed_tokens // layout.block, 1)

    def make() -> Walk:
        if op == "dkv":
            return walk_columns(layout, factor, unit, heads, kv_heads)
        return walk_rows(layout, factor, unit, heads // layout.heads, key_range, cut)

    return layout.derive(("triton", "walk", op == "dkv", factor, unit, heads, kv_heads, key_range, cut), make)


def special_of(op: str, name: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> Special | None:
    """What the kernel of ``op`` in the form ``name`` needs; None for the plain one, and where the form cannot serve."""
    if name == "plain" or objections(op, name, q, k, v, layout, scoring):
        return None
    heads, kv_heads = q.shape[2], k.shape[2]
    shared = heads // max(layout.heads, kv_heads)
    if name == "hopper" and op == "dkv":
        form = choose_column_form(q.shape[-1], v.shape[-1], layout.block, scoring.softcap is not None)
        walk = walk_of(op, layout, heads, kv_heads, form.factor(layout.block), form.listed_tokens)
        return hopper_columns(form, layout, walk, kv_heads)
    if name == "hopper":
        shape = q.shape[-1], v.shape[-1], layout.block, shared
        form = choose_dq_form(*shape) if op == "dq" else choose_hopper_form(*shape)
        walk = walk_of(op, layout, heads, kv_heads, form.factor(layout.block), hopper.WORD, cut=False)
        return hopper_way(op, form, layout, walk)
    form = choose_form(op, max(q.shape[-1], v.shape[-1]), layout.block, shared)
    walk = walk_of(op, layout, heads, kv_heads, form.factor(layout.block), form.listed_tokens, cut=op == "dkv")
    return specialised_way(op, form, layout, walk)


@dataclass(eq=False)
class Way:
    """One kernel over one layout, in the plain form or in another one.

    Attributes:
        tiles: of the plain kernel.
        special: what the kernel of another form needs, or None where none is wanted or it cannot serve.
        heads, kv_heads: of the calls.
    """

    op: str
    tiles: Tiles
    special: Special | None
    heads: int
    kv_heads: int
    _plain_slots: int = 0

    @classmethod
    def of(cls, op: str, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> Way:
        """The way for such tensors."""
        wanted = can_take(tiles.form, layout.device, q.dtype)
        special = special_of(op, tiles.form, q, k, v, layout, scoring) if wanted else None
        return cls(op, tiles, special, q.shape[2], k.shape[2])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        special = self._special(q, k, v)
        if isinstance(special, HopperWay):
            return hopper.hopper_forward(q, k, v, special, scoring)
        if isinstance(special, SpecialisedWay):
            return specialised.specialised_forward(q, k, v, special, scoring)
        return launch.forward(q, k, v, self._plain(layout), self.tiles, layout.block, scoring)

    def dq(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, layout: Layout, scoring: Scoring
    ) -> Tensor:  # fmt: skip
        special = self._special(q, k, v)
        if isinstance(special, HopperWay):
            return hopper_backward.hopper_dq(q, k, v, dout, lse, delta, special, scoring)
        if isinstance(special, SpecialisedWay):
            return specialised.specialised_dq(q, k, v, aligned_copy(dout), lse, delta, special, scoring)
        return launch.dq(q, k, v, dout, lse, delta, self._plain(layout), self.tiles, layout.block, scoring)

    def dkv(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, layout: Layout, scoring: Scoring
    ) -> tuple[Tensor, Tensor]:
        special = self._special(q, k, v)
        if isinstance(special, HopperColumns):
            return hopper_backward.hopper_dkv(q, k, v, dout, lse, delta, special, scoring)
        if isinstance(special, SpecialisedWay) and specialised.fits_columns(q, dout, groups=k.shape[2]):
            return specialised.specialised_dkv(q, k, v, aligned_copy(dout), lse, delta, special, scoring)
        return launch.dkv(q, k, v, dout, lse, delta, self._plain(layout), self.tiles, layout.block, scoring)

    @property
    def slots(self) -> int:
        """Pieces of cut lists in the walks that calls have taken so far."""
        return self._plain_slots + (0 if self.special is None else self.special.walk.slots)

    def _special(self, *tensors: Tensor) -> Special | None:
        readable = hopper.can_copy if isinstance(self.special, (HopperWay, HopperColumns)) else specialised.is_aligned
        usable = self.special is not None and not self.special.lost and readable(*tensors)
        return self.special if usable else None

    def _plain(self, layout: Layout) -> Walk:
        key_range = 0 if self.op == "dkv" else self.tiles.key_range
        factor, listed = self.tiles.factor(layout.block), self.tiles.listed_tokens
        walk = walk_of(self.op, layout, self.heads, self.kv_heads, factor, listed, key_range)
        self._plain_slots = walk.slots
        return walk


def aligned_copy(dout: Tensor) -> Tensor:
    """A gradient that descriptors can read: that of a sum is one number expanded, and any may begin at an odd address."""
    return dout if specialised.is_aligned(dout) else dout.clone(memory_format=torch.contiguous_format)


def can_take(form: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device can run kernels in this form.

    Both special forms are for Hopper and 16-bit numbers. The interpreter runs the source of the specialised one without its cut, in
    float32 too; Gluon's it cannot run.
    """
    if device.type != "cuda":
        return form != "hopper"
    return form == "plain" or (has_hopper(device) and dtype != torch.float32)


def objections(op: str, form: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> list[str]:
    """Every reason why the kernel of ``op`` in another form than the plain one cannot serve such tensors and this layout."""
    installed = [*allocator_objections(), *(gluon_objections() if form == "hopper" else ())]
    return installed + (hopper_objections if form == "hopper" else form_objections)(op, q, k, v, layout, scoring)
