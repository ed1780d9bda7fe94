"""`warmup`: compile before the first call."""

from __future__ import annotations

import torch

from s2attn.backends import Scoring, pick
from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.layout import HeadRange, pattern_hint
from s2attn.ops.checks import check_scale, check_softcap
from s2attn.ops.source import find_layout, pattern_text
from s2attn.patterns import Pattern


def warmup(
    pattern: Pattern,
    *,
    seqlen: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int,
    v_dim: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    backward: bool = True,
    block: int | None = None,
    layer: int = 0,
    heads: HeadRange | None = None,
    backend: str = "auto",
) -> None:
    """Build the layout and compile the kernels of a call of `attention` ahead of it; nothing is computed, no tensor is allocated.

    One compilation serves all lengths and batches of one kind (dtype, head widths, block); calls of another length only build a layout
    of their own. The kinds of calls that are compiled apart: ``softcap``, ``sinks``, ``backward``, and with it a gradient through lse.

    Args:
        pattern: which keys are seen.
        seqlen: tokens of queries and of keys.
        num_heads, num_kv_heads: H, and G (H by default).
        head_dim, v_dim: widths of q and k, and of v (the same by default).
        device: where calls will run; the current CUDA device if there is one, else the CPU.
        sinks: with a sink logit per head.
        backward: the gradients too.
        batch, dtype, causal, scale, softcap, block, layer, heads, backend: as in `attention`.

    Raises:
        ValueError, TypeError: a bad argument.
        Unsupported: no backend, or not the named one, could serve such a call.

    >>> from s2attn import Window
    >>> warmup(Window(8), seqlen=64, num_heads=2, head_dim=16, device="cpu")
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check_shapes(pattern, dtype, num_heads, kv_heads, {"batch": batch, "seqlen": seqlen, "head_dim": head_dim})
    width = head_dim if v_dim is None else check_int("v_dim", v_dim, 1)
    if block is not None:
        check_block("block", block)
    where = usual_device(device)
    shapes = [(batch, seqlen, h, d) for h, d in ((num_heads, head_dim), (kv_heads, head_dim), (kv_heads, width))]
    # One number stands for all of them where tensors of this device are asked for, none where kernels are compiled.
    q, k, v = (torch.empty(1, dtype=dtype, device=where).expand(shape) for shape in shapes)
    chosen = pick(backend, q, k, v)
    text = pattern_text(pattern, block, bool(causal), check_int("layer", layer, 0), heads)
    layout = find_layout(text, [], q, k)
    logits = torch.empty(num_heads, dtype=torch.float32, device="meta") if sinks else None
    scoring = Scoring(check_scale(scale, head_dim), check_softcap(softcap) or None, logits)
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    chosen.warmup(q, k, v, layout, scoring, backward)


def check_shapes(pattern: Pattern, dtype: torch.dtype, num_heads: int, num_kv_heads: int, sizes: dict[str, int]) -> None:
    """What every warm-up is told: the kinds of a pattern and a dtype, and ``sizes`` by their names."""
    if not isinstance(pattern, Pattern):
        raise bad_kind("pattern", f"must be a Pattern{pattern_hint(pattern)}", pattern)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise bad_kind("dtype", "must be a floating point torch.dtype", dtype)
    for name, size in {**sizes, "num_heads": num_heads, "num_kv_heads": num_kv_heads}.items():
        check_int(name, size, 1)
    if num_heads % num_kv_heads:
        raise bad_value("num_kv_heads", f"must divide num_heads ({num_heads})", num_kv_heads)


def usual_device(device: torch.device | str | None) -> torch.device:
    """The device that is named, or the current CUDA device if there is one, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
