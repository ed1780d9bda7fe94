"""`Triton`: the kernels behind the common face of backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from s2attn.backends.base import Backend, Pages, Reduction, Requests, Scoring, Writes
from s2attn.backends.checks import exact_arithmetic, paged_objections, plain_objections, store_objections
from s2attn.backends.triton.decode import Rows, decode, plan_decode
from s2attn.backends.triton.start import Starts
from s2attn.backends.triton.store import store
from s2attn.backends.triton.table import Situation, density_class, tuned_tiles
from s2attn.backends.triton.tiles import Tiles, choose_tiles
from s2attn.backends.triton.ways import Prepared, Way
from s2attn.layout import Layout
from s2attn.schedule import CUTS

WIDEST = 256
ABSENT = "triton is not installed; the extra named triton brings it"
MOST = 65535
"""Programs along the second and the third axis of a grid: batch entries, and heads."""
LARGEST = 232448
"""Shared memory, in bytes, that stands for the interpreter's."""
INTERPRETED_PROCESSORS = 3
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


Choose = Callable[[Situation, torch.device, bool], Tiles]


class Triton(Backend):
    """Triton kernels on CUDA devices; under ``TRITON_INTERPRET=1`` also on the CPU, for tests.

    Args:
        choose: the tiles for a situation, a device, and whether there is a soft-cap; by default the tuned table, then `choose_tiles`.
    """

    name = "triton"
    by_position = True
    capturable = True

    def __init__(self, choose: Choose | None = None) -> None:
        self._choose = choose or find_tiles
        self._prepared: WeakKeyDictionary[Layout, Prepared] = WeakKeyDictionary()
        self._stores: Starts = {}
        self._rows: WeakKeyDictionary[Layout, Rows] = WeakKeyDictionary()

    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        """Every reason why the kernels cannot serve such tensors here."""
        if find_spec("triton") is None:
            return [ABSENT]
        return plain_objections(q, k, v) or _objections(q, v, ("forward", "dq", "dkv"))

    def paged_objections(self, q: Tensor, pages: Pages) -> list[str]:
        """Every reason why the kernels cannot serve such pages here."""
        if find_spec("triton") is None:
            return [ABSENT]
        return paged_objections(q, pages) or _objections(q, pages.v, ("decode",))

    def mass_objections(self, q: Tensor, k: Tensor) -> list[str]:
        return self.objections(q, k, k)

    def antidiagonal(self, q: Tensor, k: Tensor, reduction: Reduction) -> Tensor:
        from s2attn.backends.triton.score import antidiagonal, choose_score_tiles

        limit = gpu_facts(q.device.index or 0)[1] if q.is_cuda else LARGEST
        return antidiagonal(q, k, reduction, choose_score_tiles(q.shape[-1], q.element_size(), limit))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        return self._way("forward", q, k, v, layout, scoring).forward(q, k, v, layout, scoring)

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: Layout,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from s2attn.backends.triton import launch

        out, lse = out.contiguous(), lse.contiguous()  # as forward made them; the kernels know no other lse
        by_row, by_column = (self._way(op, q, k, v, layout, scoring) for op in ("dq", "dkv"))
        delta = launch.delta(out, dout, lse, dlse, by_row.prepared.starts)
        given = (q, k, v, dout, lse, delta, layout, scoring)
        return by_row.dq(*given), *by_column.dkv(*given)

    def forward_paged(self, q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        rows, tiles = self._listed(q, pages, layout, scoring)
        with exact_arithmetic(q.device):
            return decode(plan_decode(q, pages, requests, layout, scoring, tiles, rows, processors(q.device)))

    def warmup_paged(self, q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring) -> None:
        """Started on real tensors, since a kernel that is compiled alone would be loaded in the middle of a capture.

        Where the table does not say how lists are cut, the batch does, so every way is taken.
        """
        rows, tiles = self._listed(q, pages, layout, scoring)
        for cut in [tiles.cut] if tiles.cut else CUTS:
            with exact_arithmetic(q.device):
                decode(plan_decode(q, pages, requests, layout, scoring, replace(tiles, cut=cut), rows, processors(q.device)))

    def _listed(self, q: Tensor, pages: Pages, layout: Layout, scoring: Scoring) -> tuple[Rows, Tiles]:
        """What decoding reads of a layout, found once for each, and the tiles for such a call."""
        rows = self._rows.get(layout)
        if rows is None:
            rows = self._rows[layout] = Rows(layout)
        return rows, self._choose(situation("decode", q, pages.v, layout, rows.density), q.device, scoring.softcap is not None)

    def store_objections(self, new: Writes) -> list[str]:
        """Every reason why the kernel cannot write such tokens here."""
        if find_spec("triton") is None:
            return [ABSENT]
        why = store_objections(new)
        if new.k.dtype == torch.float64:
            why.append("float64 is not one of float16, bfloat16, float32")
        if not (new.k_pages.is_cuda or _interpreting()):
            why.append(f"needs a CUDA device, or TRITON_INTERPRET=1 for tests; the pages lie on {new.k_pages.device}")
        return why

    def store(self, new: Writes) -> None:
        if new.k.numel() or new.v.numel():
            store(new, self._stores)

    def warmup(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring, backward: bool) -> None:
        """Kernels that are started on tensors without memory are compiled only."""
        from s2attn.backends.triton import launch

        with launch.on_device(layout.rows.ptr):
            out, lse = self.forward(q, k, v, layout, scoring)
            if backward:
                self.backward(torch.empty_like(out), None, q, k, v, out, lse, layout, scoring)
                launch.delta(out, out, lse, torch.empty_like(lse), self._prepared[layout].starts)

    def _way(self, op: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Scoring) -> Way:
        """How one kernel goes over a layout, found once for each layout and kind of tensors."""
        prepared = self._prepared.get(layout)
        if prepared is None:
            prepared = self._prepared[layout] = Prepared()
        key = (op, q.dtype, q.shape[0], q.shape[-1], v.shape[-1], q.shape[2], k.shape[2], scoring.softcap is None, scoring.scale > 0)
        way = prepared.ways.get(key)
        if way is None:
            capped = scoring.softcap is not None
            tiles = self._choose(situation(op, q, v, layout, prepared.density_of(layout)), layout.device, capped)
            way = prepared.ways[key] = Way.of(op, tiles, q, k, v, layout, scoring, prepared)
        return way


def situation(op: str, q: Tensor, v: Tensor, layout: Layout, density: float) -> Situation:
    """The row of a tuned table that such a call looks for."""
    dtype = str(q.dtype).removeprefix("torch.")
    return Situation(op, dtype, q.shape[-1], v.shape[-1], layout.block, density_class(density))


def find_tiles(wanted: Situation, device: torch.device, capped: bool) -> Tiles:
    """The tuned tiles of this GPU and this Triton, or those that follow from what the GPU has.

    Tables are measured without a soft-cap, whose arithmetic needs registers of its own.
    """
    itemsize = 4 if wanted.dtype == "float32" else 2
    limit = LARGEST
    if device.type == "cuda":
        name, limit = gpu_facts(device.index or 0)
        tuned = None if capped else tuned_tiles(name, triton_version(), wanted)
        if tuned is not None:
            return tuned
    return choose_tiles(wanted.op, wanted.head_dim, wanted.v_dim, itemsize, wanted.block, limit, capped)


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _objections(q: Tensor, v: Tensor, ops: tuple[str, ...]) -> list[str]:
    """What stands against kernels of these names, for queries like q and values as wide as v."""
    why = []
    if q.dtype not in DTYPES:
        why.append(f"dtype {q.dtype} is not one of float16, bfloat16, float32")
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        why.append(f"head widths up to {WIDEST}, not {max(q.shape[-1], v.shape[-1])}")
    if max(q.shape[0], q.shape[2]) > MOST:
        why.append(f"up to {MOST} batch entries and heads, not {max(q.shape[0], q.shape[2])}")
    if _interpreting():
        if q.dtype == torch.bfloat16:
            why.append("Triton's interpreter multiplies bfloat16 wrongly")
    elif not q.is_cuda:
        why.append(f"needs a CUDA device, or TRITON_INTERPRET=1 for tests; the tensors lie on {q.device}")
    else:
        why += _device_objections(torch.cuda.get_device_capability(q.device), q.dtype)
        why += _width_objections(q, v, ops) if not why else []
    return why


def _device_objections(capability: tuple[int, int], dtype: torch.dtype) -> list[str]:
    if capability < (7, 5):
        return [f"needs compute capability 7.5 or more, not {capability[0]}.{capability[1]}"]
    if dtype == torch.bfloat16 and capability < (8, 0):
        return ["this device has no bfloat16; float16 works"]
    return []


def _width_objections(q: Tensor, v: Tensor, ops: tuple[str, ...]) -> list[str]:
    """Head widths of which no tile fits into this device's shared memory."""
    try:
        for op in ops:
            choose_tiles(op, q.shape[-1], v.shape[-1], q.element_size(), 64, gpu_facts(q.device.index or 0)[1])
    except ValueError:
        return [f"head widths {q.shape[-1]} and {v.shape[-1]} in {q.dtype} need more shared memory than this device has"]
    return []


@lru_cache(maxsize=64)
def gpu_facts(index: int) -> tuple[str, int]:
    """Name, and shared memory in bytes that one program can have."""
    from triton.runtime import driver

    return torch.cuda.get_device_name(index), driver.active.utils.get_device_properties(index)["max_shared_mem"]


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED_PROCESSORS


@lru_cache(maxsize=1)
def triton_version() -> str:
    import triton

    return triton.__version__
