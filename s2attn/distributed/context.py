"""`context_attention`: attention over a sequence whose tokens lie on several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2attn.backends import pick
from s2attn.core import Unsupported, bad_kind, bad_value
from s2attn.distributed.agree import Ranks
from s2attn.distributed.exchange import bring, sum_dtype
from s2attn.distributed.pieces import Asked
from s2attn.distributed.plan import RingPlan, plan_on
from s2attn.distributed.ring import Circle, ring_attention
from s2attn.distributed.shards import NAMED, Shards
from s2attn.distributed.traffic import WAYS, ask, traffic_of
from s2attn.layout import HeadRange, Layout, read_cu_seqlens
from s2attn.ops.attention import attention
from s2attn.ops.checks import autocast, check_cu_seqlens, check_heads, check_scale, check_sinks, check_softcap, check_tensors
from s2attn.ops.selector import Selector
from s2attn.patterns import Pattern


@dataclass(frozen=True, eq=False)
class _Checked:
    """A call after this rank's own checks."""

    q: Tensor
    k: Tensor
    v: Tensor
    asked: Asked
    way: str
    scale: float
    softcap: float | None
    fields: dict[str, object]


@torch.compiler.disable  # plans are made on the host, and collectives with split sizes run eagerly
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    group: dist.ProcessGroup | None = None,
    shards: Shards | str = "contiguous",
    way: str = "auto",
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    block: int | None = None,
    layer: int = 0,
    heads: HeadRange | None = None,
    backend: str = "auto",
    validate: bool = True,
) -> Any:
    """`attention` over a sequence of which every rank of a group holds a part of the tokens, the same part of q, k and v.

    Collective: every rank calls it alike, and every rank runs backward or none. The result is that of one process on the whole sequence.
    What travels between ranks is known before the call, since the pattern is: see `context_traffic`. `torch.compile` goes around the call.

    * ``"all-gather"``: all K and V to everyone; gradients come back by reduce-scatter.
    * ``"exchange"``: each rank gets only the blocks that its rows list, for every KV head apart, and sends back only their gradients.
    * ``"ring"``: K and V go round, partial results merge by lse; the same bytes as all-gather (more in backward), the least memory.

    Args:
        q, k, v: this rank's tokens, ``(B, T, H, D)``, ``(B, T, G, D)``, ``(B, T, G, Dv)``; packed ``(T, H, D)`` with ``cu_seqlens``.
        pattern: a `Pattern`, over positions of the whole sequence.
        group: the ranks that share the sequence; the default group when None.
        shards: which tokens each rank holds: `Shards`, or "contiguous" or "zigzag".
        way: one of the above; "auto" takes the one whose busiest rank moves the fewest bytes (all-gather where they are equal).
        cu_seqlens: cumulative lengths of the packed sequences of all ranks together, the same on every rank; best on the CPU, where
            reading them waits for nothing.
        causal, scale, softcap, sinks, return_lse, block, layer, heads, backend: as of `attention`. The gradient of sinks is this rank's
            part, to be summed like those of other replicated parameters.
        validate: compare the call with those of the other ranks first, and its backward too: an all-gather of 192 bytes, for which the
            host waits. Without it, ranks that call differently hang or compute wrong results. The same on every rank.

    Returns:
        out ``(B, T, H, Dv)`` or ``(T, H, Dv)`` for this rank's queries, with ``return_lse`` also lse ``(B, H, T)`` or ``(H, T)``.

    Raises:
        ValueError, TypeError: a bad argument, before anything is sent; a group of another size than the shards; with ``validate``, on
            every rank: ranks that call differently or in another order, call another function, or have a bad argument.
        Unsupported: a selector or a layout in place of the pattern; or what `attention` cannot do.
        RuntimeError: another rank has died or does not answer within the timeout of the group.
    """
    ranks = Ranks.of("context_attention", group, validate, q)

    def check() -> _Checked:
        options = {"block": block, "causal": causal, "layer": layer, "heads": heads}
        numbers = {"scale": scale, "softcap": softcap, "sinks": sinks}
        return _check(ranks, (q, k, v), pattern, shards, way, cu_seqlens, numbers, options, backend)

    call = ranks.checked(check)
    agreed = ranks.agree(call.fields)
    plan = plan_on(call.asked, ranks.rank, call.way, call.q.device)
    if isinstance(plan, RingPlan):
        circle = Circle(plan, agreed, call.scale, call.softcap or 0.0, backend)
        out, lse = ring_attention(call.q, call.k, call.v, sinks, circle)
    else:
        keys, values = bring(call.k, call.v, plan, agreed)
        options: Any = {"causal": False, "scale": call.scale, "softcap": call.softcap, "sinks": sinks}
        options |= {"return_lse": True, "backend": backend}
        out, lse = attention(call.q, keys, values, plan.layout, **options)
    if cu_seqlens is not None:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _check(
    ranks: Ranks,
    tensors: tuple[Any, Any, Any],
    pattern: Any,
    shards: Any,
    way: Any,
    cu_seqlens: Tensor | None,
    numbers: dict[str, Any],
    options: dict[str, Any],
    backend: Any,
) -> _Checked:
    """The checks of one rank, and what all ranks must have alike."""
    packed, (q, k, v) = cu_seqlens is not None, tensors
    _check_pattern(pattern)
    check_tensors(q, k, v, packed)
    check_heads(options["heads"], q)
    check_sinks(numbers["sinks"], q)
    scale, softcap = check_scale(numbers["scale"], q.shape[-1]), check_softcap(numbers["softcap"])
    if q.shape[-3] != k.shape[-3]:
        raise bad_value("k", f"must have as many tokens as q, {q.shape[-3]}", k.shape[-3])
    if way != "auto" and way not in WAYS:
        raise bad_value("way", f"must be auto or one of {', '.join(WAYS)}", repr(way))
    if not isinstance(backend, str):
        raise bad_kind("backend", "must be a string", backend)
    shards = _check_shards(shards, q.shape[-3], ranks.ranks)
    lengths = _lengths(cu_seqlens, shards.seqlen)
    asked = ask(pattern, q.shape[-2], k.shape[-2], shards, lengths=lengths, **options)
    q, k, v = autocast(q, k, v)
    pick(backend, q, k, v)
    if packed:
        q, k, v = q[None], k[None], v[None]
    sinks = numbers["sinks"]
    grad = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, k, v, sinks)]
    if way == "auto":
        pair = k.shape[0] * (k.shape[-1] + v.shape[-1])
        sizes = pair * k.element_size(), pair * sum_dtype(k.dtype).itemsize
        way = traffic_of(asked).fewest(*sizes, backward=grad[1] or grad[2])
    fields = {
        "shapes": tuple(tuple(x.shape) for x in (q, k, v)),
        "dtype": str(q.dtype),
        "pattern": pattern,
        **{name: options[name] for name in ("layer", "heads", "causal")},
        "block": asked.block,
        "shards": f"{shards!r} {shards.digest}",
        "cu_seqlens": lengths,
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks is not None,
        "way": way,
        "requires_grad of q, k, v, sinks": grad,
    }
    return _Checked(q, k, v, asked, way, scale, softcap, fields)


def _check_pattern(pattern: Any) -> None:
    if isinstance(pattern, Selector):
        why = "it chooses from all of q and k, which no rank holds; only a Pattern says what a rank needs before it has it"
        raise Unsupported("context_attention cannot run", {type(pattern).__name__: [why]})
    if isinstance(pattern, Layout):
        raise Unsupported("context_attention cannot run", {"Layout": ["every rank needs lists of its own, which it makes from a Pattern"]})


def _check_shards(shards: Any, tokens: int, ranks: int) -> Shards:
    if isinstance(shards, str):
        if not tokens:
            raise bad_value("q", "must have at least one token on every rank", tokens)
        return Shards.named(shards, tokens * ranks, ranks)
    if not isinstance(shards, Shards):
        raise bad_kind("shards", f"must be Shards or one of {', '.join(NAMED)}", shards)
    if shards.ranks != ranks:
        raise bad_value("group", f"must have as many ranks as the shards, {shards.ranks}", ranks)
    if shards.tokens != tokens:
        raise bad_value("q", f"must have the tokens that the shards give every rank, {shards.tokens}", tokens)
    return shards


def _lengths(cu_seqlens: Tensor | None, total: int) -> tuple[int, ...] | None:
    if cu_seqlens is None:
        return None
    check_cu_seqlens(cu_seqlens, cu_seqlens)
    return tuple(after - before for before, after in pairwise(read_cu_seqlens("cu_seqlens", cu_seqlens, total)))
