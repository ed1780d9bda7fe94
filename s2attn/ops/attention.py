"""`attention`: the one function that users call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from s2attn.core import bad_kind, bad_value, check_block, check_int
from s2attn.layout import HeadRange, Layout, pattern_hint
from s2attn.ops.checks import (
    autocast,
    check_backend,
    check_causal,
    check_cu_seqlens,
    check_heads,
    check_layout,
    check_scale,
    check_sinks,
    check_softcap,
    check_tensors,
    own_lengths,
    warn_swapped,
)
from s2attn.ops.selector import Selector
from s2attn.ops.source import layout_text, pattern_text
from s2attn.ops.transforms import call_attention
from s2attn.patterns import Pattern


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Layout | Selector,
    *,
    causal: bool | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    block: int | None = None,
    layer: int = 0,
    heads: HeadRange | None = None,
    backend: str = "auto",
) -> Any:
    """Exact softmax attention over the keys that a pattern lets each query see.

    ``out[i] = sum_j softmax_j(scale * q[i].k[j]) v[j]`` over the allowed j. Queries sit at the end of the keys: query i of T has
    position ``i + S - T``, so prefill, a chunk of it, and decoding follow one rule. Differentiable in q, k, v and sinks, through out and
    lse.

    Args:
        q: ``(B, T, H, D)``, or packed ``(total_q, H, D)``; any strides. All of q, k, v may be DTensors that are cut by heads or by batch.
            They have one dtype; under autocast they are cast first, as for torch's own attention. Tensors in the order of
            torch's scaled_dot_product_attention, ``(B, H, T, D)``, are passed as ``q.transpose(1, 2)``; what looks like them
            gives a warning.
        k, v: ``(B, S, G, D)`` and ``(B, S, G, Dv)``, or packed; H is a multiple of G, and query head h reads KV head ``h * G // H``.
        pattern: which keys are seen: a `Pattern`; a `Layout` from `build_layout` (``block``, ``layer``, ``heads`` then do not apply); or a
            selector such as `XAttention`, which chooses for every sample of the batch (``block``, ``heads`` then do not apply).
        causal: cut keys after the query, True by default. A `Layout` is causal or not by itself: what is given must say the same.
        scale: factor on q.k; ``D ** -0.5`` by default.
        softcap: bound on logits: ``x = scale * q.k`` becomes ``softcap * tanh(x / softcap)``, before the mask (as in Gemma 2).
        sinks: ``(H,)``, any floating dtype: one logit for each query head, which joins the softmax denominator and has no value (as in
            gpt-oss). Not the pattern `Sink`. When partial results are going to be merged, give the sinks to exactly one part.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``(sequences + 1,)`` cumulative lengths of packed sequences, on any device. Every call
            reads them, since memory may change unseen: on a GPU it waits for the device, so give them on the CPU.
        return_lse: return ``(out, lse)``.
        block: tokens per block of the layout that is built from a pattern; by default the pattern's finest grid, at most 128, or 64.
        layer: number of the layer, for patterns that differ by layer.
        heads: the global heads that these are, under tensor parallelism.
        backend: "auto", or the name of one; an explicit choice never falls back to another.

    Returns:
        out ``(B, T, H, Dv)`` or ``(total_q, H, Dv)`` in q's dtype; with ``return_lse`` also the natural log of the softmax denominator,
        ``(B, H, T)`` or ``(H, total_q)``, float32 (float64 for float64). A query that sees no key gives 0, and -inf or its head's sink.

    Raises:
        ValueError, TypeError: a bad argument, named with its rule, before any work.
        Unsupported: no backend, or not the named one, can serve the call; with every reason. Also a second derivative, and forward-mode
            AD (`torch.func.jvp`); `torch.func.grad`, `vjp` and `vmap` have rules.

    >>> import torch, s2attn
    >>> q, k, v = (torch.randn(1, 256, heads, 32) for heads in (4, 2, 2))
    >>> s2attn.attention(q, k, v, s2attn.Sink(4) | s2attn.Window(64)).shape
    torch.Size([1, 256, 4, 32])
    """
    given = own_lengths(check_cu_seqlens(cu_seqlens_q, cu_seqlens_k))
    packed = bool(given)
    check_tensors(q, k, v, packed)
    check_causal(causal)
    scale, softcap = check_scale(scale, q.shape[-1]), check_softcap(softcap)
    check_sinks(sinks, q)
    check_backend(backend)
    warn_swapped(q, k, packed)
    q, k, v = autocast(q, k, v)
    if (sharded := _sharded(q, k, v)) is not None:
        sharded.check(q, k, v, sinks, pattern, heads)
    layout = pattern if isinstance(pattern, Layout) else None
    if isinstance(pattern, Selector):
        if block is not None or heads is not None:
            raise bad_value("block and heads", "must be left out when a selector is given", (block, heads))
        cut: Any = {"causal": causal is not False, "scale": scale, "softcap": softcap, "layer": layer, "backend": backend}
        cut |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), given, strict=False))
        layout = pattern.layout(q, k, **cut)
        source, index = layout_text(layout), layout.tensors()
    elif layout is not None:
        if block is not None or layer or heads is not None:
            raise bad_value("block, layer and heads", "must be left out when a Layout is given", (block, layer, heads))
        check_layout(layout, q, k, causal, packed)
        source, index = layout_text(layout), layout.tensors() + given
    else:
        source, index = _pattern_source(pattern, block, causal is not False, layer, heads, q), given
    batch = q.shape[0]
    joined = layout is not None and layout.packed and not packed  # samples that differ in their blocks run as sequences of one call
    if joined:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if packed or joined:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if sharded is not None:
        source, index = sharded.call(source, index, q, k)
    out, lse = call_attention(q, k, v, sinks, index, source, scale, softcap or 0.0, backend)
    if isinstance(pattern, Selector):
        _hold(layout, out)
    if packed or joined:
        out, lse = out.squeeze(0), lse.squeeze(0)
    if joined:
        out, lse = out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)
    return (out, lse) if return_lse else out


def _hold(layout: Any, out: Tensor) -> None:
    """Keep a selector's layout, which no one else holds, until the backward has read it."""
    node: Any = out.grad_fn
    if node is not None:
        node.metadata["s2attn.layout"] = layout


def _sharded(*tensors: Tensor) -> Any:
    """The module for calls on DTensors where one of these is one: nobody else waits for torch's code for them."""
    if not any(hasattr(x, "device_mesh") for x in tensors):
        return None
    from s2attn.ops import sharded

    return sharded


def _pattern_source(pattern: Any, block: int | None, causal: bool, layer: int, heads: HeadRange | None, q: Tensor) -> str:
    if not isinstance(pattern, Pattern):
        raise bad_kind("pattern", f"must be a Pattern, a Layout or a selector{pattern_hint(pattern)}", pattern)
    if block is not None:
        check_block("block", block)
    check_heads(heads, q)
    return pattern_text(pattern, block, bool(causal), check_int("layer", layer, 0), heads)
