"""Objections that every backend in plain torch shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from s2attn.backends.base import Pages, Writes

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plain_objections(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why strided torch operations in float32 or float64 cannot serve these tensors."""
    why = []
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.layout != torch.strided or tensor.is_nested:
            why.append(f"{name} is {'nested' if tensor.is_nested else tensor.layout}, not a plain strided tensor")
        if tensor.dtype not in FLOATS:
            why.append(f"{name} has dtype {tensor.dtype}, not one of {', '.join(str(d).removeprefix('torch.') for d in FLOATS)}")
        if tensor.is_meta:
            why.append(f"{name} is on the meta device and has no values")
    if len({t.device for t in (q, k, v)}) > 1:
        why.append(f"q, k and v lie on several devices: {q.device}, {k.device}, {v.device}")
    if len({t.dtype for t in (q, k, v)}) > 1:
        why.append(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    return why


def paged_objections(q: Tensor, pages: Pages) -> list[str]:
    """The same for queries whose keys lie in pages; pages of float8_e4m3fn are converted where they are read."""
    why = plain_objections(q, q, q)
    for name, tensor in (("k_pages", pages.k), ("v_pages", pages.v)):
        if tensor.dtype not in (q.dtype, torch.float8_e4m3fn):
            why.append(f"{name} has dtype {tensor.dtype}, neither that of q, {q.dtype}, nor float8_e4m3fn")
        if tensor.device != q.device:
            why.append(f"{name} lies on {tensor.device}, q on {q.device}")
    return why


def store_objections(new: Writes) -> list[str]:
    """Why new keys and values like these cannot be written into such pages."""
    why = plain_objections(new.k, new.k, new.v)
    for name, tensor, pages in (("k_pages", new.k, new.k_pages), ("v_pages", new.v, new.v_pages)):
        if pages.dtype not in (tensor.dtype, torch.float8_e4m3fn):
            why.append(f"{name} has dtype {pages.dtype}, neither that of what is written, {tensor.dtype}, nor float8_e4m3fn")
    return why


def is_captured(*tensors: Tensor) -> bool:
    """Whether work on these tensors is being captured into a CUDA graph, so that no number can be looked at."""
    return any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing()


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, and of all arithmetic, for inputs of this dtype: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_arithmetic(device: torch.device) -> AbstractContextManager[Any]:
    """No autograd and no autocast: products stay in the dtype that they were asked for.

    Entering torch's contexts takes 20 microseconds: they are left out where they change nothing.
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return _no_grad_and_no_autocast(kind)
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


@contextmanager
def _no_grad_and_no_autocast(kind: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        yield
