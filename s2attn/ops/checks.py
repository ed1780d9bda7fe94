"""What every attention call must satisfy before any kernel runs, in words that name the argument, the rule and what came."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from s2attn.backends.checks import is_captured
from s2attn.core import Unsupported, bad_kind, bad_value
from s2attn.layout import HeadRange, Layout

MANY_HEADS = 64
"""So many KV heads, of fewer keys each, are rather the tokens of tensors with swapped axes."""


def is_cast(tensor: Tensor) -> bool:
    """Whether autocast is on for a tensor: it casts floating point tensors, but leaves float64."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    device = tensor.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return enabled and tensor.dtype != torch.float64


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast runs attention on a tensor; its own dtype where it is not cast."""
    return torch.get_autocast_dtype(tensor.device.type) if is_cast(tensor) else tensor.dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype in which autocast runs attention."""
    return tuple(tensor.to(autocast_dtype(tensor)) for tensor in tensors)


def autocast_to_pages(new: Tensor, *pages: Tensor) -> Tensor:
    """Under autocast, queries, keys or values in the dtype of the pages that they meet.

    Casting the pages instead would copy the whole cache. float8 pages meet any dtype.
    """
    wide = [x.dtype for x in pages if isinstance(x, Tensor) and x.dtype != torch.float8_e4m3fn]
    return new.to(wide[0]) if is_cast(new) and wide and wide[0].is_floating_point else new


def check_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    """Kinds, dtypes, devices and shapes of q, k, v; under autocast the dtypes after its cast.

    Raises:
        TypeError: not a tensor, not floating point, or dtypes that differ.
        ValueError: shapes or devices that do not fit.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise bad_kind(name, "must be a tensor", tensor)
        axes = "(total, heads, head_dim) with cu_seqlens" if packed else "(batch, seq, heads, head_dim)"
        if tensor.dim() != (3 if packed else 4):
            raise bad_value(name, f"must have shape {axes}", tuple(tensor.shape))
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating point dtype; got {tensor.dtype}")
        if tensor.dtype != q.dtype and autocast_dtype(tensor) != autocast_dtype(q):
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}; got {tensor.dtype}")
        if tensor.device != q.device:
            raise bad_value(name, f"must lie on the device of q, {q.device}", tensor.device)
    if k.shape[:-1] != v.shape[:-1]:
        raise bad_value("v", f"must have the shape of k but for the last axis, {tuple(k.shape[:-1])}", tuple(v.shape[:-1]))
    if not packed and q.shape[0] != k.shape[0]:
        raise bad_value("k", f"must have the batch of q, {q.shape[0]}", k.shape[0])
    if q.shape[-1] != k.shape[-1] or not q.shape[-1] or not v.shape[-1]:
        raise bad_value("k", f"must have the head_dim of q, {q.shape[-1]}, and no head_dim may be 0", (k.shape[-1], v.shape[-1]))
    if not q.shape[-2] or not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise bad_value("q", f"must have a multiple of the {k.shape[-2]} heads of k{_order_hint(packed)}", q.shape[-2])


def _order_hint(packed: bool) -> str:
    """How tensors in the order of torch's scaled_dot_product_attention are passed."""
    return "" if packed else "; shapes are (batch, seq, heads, head_dim): pass (batch, heads, seq, head_dim) as x.transpose(1, 2)"


def warn_swapped(q: Tensor, k: Tensor, packed: bool) -> None:
    """Warn of tensors that look like ``(B, H, T, D)``: at least `MANY_HEADS` KV heads, and fewer tokens than heads in q and in k.

    One new token over a long cache has many keys, and a short prompt few KV heads: neither is warned of.
    """
    if torch.compiler.is_compiling() or packed or k.shape[2] < MANY_HEADS or k.shape[1] >= k.shape[2] or q.shape[1] >= q.shape[2]:
        return
    came = f"{q.shape[1]} queries of {q.shape[2]} heads and {k.shape[1]} keys of {k.shape[2]} heads"
    warnings.warn(f"q and k look swapped, with {came}{_order_hint(packed)}", UserWarning, stacklevel=3)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor on q.k: ``head_dim ** -0.5`` when None, otherwise a finite number."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise bad_kind("scale", "must be a number", scale)
    if not -math.inf < scale < math.inf:  # compilers follow comparisons of a dynamic size, not isfinite
        raise bad_value("scale", "must be finite", scale)
    return float(scale)


def check_softcap(softcap: float | None) -> float | None:
    """The bound on logits: None, or a positive finite number."""
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise bad_kind("softcap", "must be a number or None", softcap)
    if not 0 < softcap < math.inf:
        raise bad_value("softcap", "must be positive and finite", softcap)
    return float(softcap)


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Kind, dtype, shape and device of the sinks; their numbers are not looked at, since that would wait for the device."""
    if sinks is None:
        return
    if not isinstance(sinks, Tensor):
        raise bad_kind("sinks", "must be a tensor or None", sinks)
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must have a floating point dtype; got {sinks.dtype}")
    if sinks.shape != (q.shape[-2],):
        raise bad_value("sinks", f"must have shape ({q.shape[-2]},), one number for each head of q", tuple(sinks.shape))
    if sinks.device != q.device:
        raise bad_value("sinks", f"must lie on the device of q, {q.device}", sinks.device)


def check_causal(causal: bool | None) -> None:
    """None is "not given"."""
    if causal is not None and not isinstance(causal, bool):
        raise bad_kind("causal", "must be True, False or None", causal)


def check_backend(backend: str) -> None:
    """The name of a backend; whether there is one of that name is found where it is picked."""
    if not isinstance(backend, str):
        raise bad_kind("backend", "must be a string", backend)


def check_heads(heads: HeadRange | None, q: Tensor) -> None:
    """The global heads that q's heads are."""
    if heads is None:
        return
    if not isinstance(heads, HeadRange):
        raise bad_kind("heads", "must be a HeadRange", heads)
    if heads.end - heads.start != q.shape[-2]:
        raise bad_value("heads", f"must name as many heads as q has ({q.shape[-2]})", f"({heads.start}, {heads.end})")


def check_cu_seqlens(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> list[Tensor]:
    """Kinds and shapes of the cumulative lengths; their numbers are checked where they are read, before any kernel runs."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return []
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise bad_value("cu_seqlens_q and cu_seqlens_k", "must be given together", f"no {missing}")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor):
            raise bad_kind(name, "must be an int32 or int64 tensor", cu)
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor; got {cu.dtype}")
        if cu.dim() != 1 or cu.shape[0] < 2:
            raise bad_value(name, "must have shape (sequences + 1,)", tuple(cu.shape))
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise bad_value("cu_seqlens_k", f"must have as many numbers as cu_seqlens_q ({cu_seqlens_q.shape[0]})", cu_seqlens_k.shape[0])
    return [cu_seqlens_q, cu_seqlens_k]


def own_lengths(given: list[Tensor]) -> list[Tensor]:
    """Copies of cumulative lengths on the CPU, which no one else writes to: forward and backward read the same numbers.

    Whether memory has changed cannot be known without reading it: torch does not see writes of NumPy, other processes, other
    libraries and CUDA graphs. So nothing that was read in an earlier call is used again.

    Raises:
        Unsupported: lengths on a GPU while work is captured into a CUDA graph.
    """
    if not given:
        return given
    if not torch.compiler.is_compiling() and is_captured(*given):
        why = "cu_seqlens lie on the GPU, and a stream that is being captured cannot wait for them: give them on the CPU"
        raise Unsupported("packed sequences cannot be captured into a CUDA graph", {"attention": [why]})
    first = given[0].detach().to("cpu", copy=True)
    return [first, first if given[1] is given[0] else given[1].detach().to("cpu", copy=True)]


def check_layout(layout: Layout, q: Tensor, k: Tensor, causal: bool | None, packed: bool) -> None:
    """An explicit layout against the call: lengths, heads, device, causality, packing."""
    seq = 0 if packed else 1
    if layout.packed != packed:
        kind = (
            "packed sequences, so q must be (total, heads, head_dim) with cu_seqlens" if layout.packed else "one sequence, not packed ones"
        )
        raise bad_value("layout", f"must describe the call; it is of {kind}", "packed tensors" if packed else "unpacked tensors")
    if (layout.seqlen_q, layout.seqlen_k) != (q.shape[seq], k.shape[seq]):
        came = f"({layout.seqlen_q}, {layout.seqlen_k})"
        raise bad_value("layout", f"must have the lengths of q and k, ({q.shape[seq]}, {k.shape[seq]})", came)
    check_layout_place(layout, q)
    if causal is not None and causal != layout.causal:
        rule = f"must be left out or {layout.causal}, as the layout is: it was built so"
        raise bad_value("causal", rule, causal)


def check_layout_place(layout: Layout, q: Tensor) -> None:
    """Heads and device of an explicit layout."""
    if q.shape[-2] % layout.heads:
        raise bad_value("layout", f"must have a number of heads that divides the {q.shape[-2]} heads of q", layout.heads)
    if layout.device != q.device:
        raise bad_value("layout", f"must lie on the device of q, {q.device}; layout.to(q.device) moves it", layout.device)
