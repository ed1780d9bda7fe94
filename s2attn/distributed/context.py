"""`context_attention`: attention over a sequence whose tokens lie on several ranks."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from s2attn.backends import pick
from s2attn.core import Unsupported, bad_kind, bad_value
from s2attn.distributed.exchange import all_gather, bring, sum_dtype
from s2attn.distributed.pieces import Asked
from s2attn.distributed.plan import RingPlan, plan_on
from s2attn.distributed.ring import Circle, ring_attention
from s2attn.distributed.shards import NAMED, Shards
from s2attn.distributed.traffic import WAYS, ask, traffic_of
from s2attn.layout import HeadRange, Layout, read_cu_seqlens
from s2attn.ops.attention import attention, autocast
from s2attn.ops.checks import check_cu_seqlens, check_heads, check_scale, check_sinks, check_softcap, check_tensors
from s2attn.ops.selector import Selector
from s2attn.patterns import Pattern

_agreed: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()
"""For each group the hashes of calls that its ranks have found to be alike."""
_KEEP_CALLS = 4096


@torch.compiler.disable(reason="plans are made on the host, and collectives with split sizes run as they are")
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

    Returns:
        out ``(B, T, H, Dv)`` or ``(T, H, Dv)`` for this rank's queries, with ``return_lse`` also lse ``(B, H, T)`` or ``(H, T)``.

    Raises:
        ValueError, TypeError: a bad argument, before anything is sent; a group of another size than the shards; ranks that call differently
            (found when a call is new to the group: each rank then sends a hash of what it asked for).
        Unsupported: a selector or a layout in place of the pattern; or what `attention` cannot do.
        RuntimeError: another rank has died or does not answer within the timeout of the group.
    """
    packed = cu_seqlens is not None
    _check_pattern(pattern)
    check_tensors(q, k, v, packed)
    check_heads(heads, q)
    check_sinks(sinks, q)
    number, cap = check_scale(scale, q.shape[-1]), check_softcap(softcap)
    if q.shape[-3] != k.shape[-3]:
        raise bad_value("k", f"must have as many tokens as q, {q.shape[-3]}", k.shape[-3])
    if way != "auto" and way not in WAYS:
        raise bad_value("way", f"must be auto or one of {', '.join(WAYS)}", repr(way))
    if not isinstance(backend, str):
        raise bad_kind("backend", "must be a string", backend)
    group, rank, ranks = _check_group(group)
    shards = _check_shards(shards, q.shape[-3], ranks)
    lengths = _lengths(cu_seqlens, shards.seqlen)
    settings: Any = {"lengths": lengths, "block": block, "causal": causal, "layer": layer, "heads": heads}
    asked = ask(pattern, q.shape[-2], k.shape[-2], shards, **settings)
    q, k, v = autocast(q, k, v)
    pick(backend, q, k, v)  # what no backend here can do is said before anything is sent
    if packed:
        q, k, v = q[None], k[None], v[None]
    grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if way == "auto":
        pair = k.shape[0] * (k.shape[-1] + v.shape[-1])
        way = traffic_of(asked).fewest(pair * k.element_size(), pair * sum_dtype(k.dtype).itemsize, backward=grad)
    _agree(group, asked, q, k, v, f"{way};{grad};{q.requires_grad}")
    plan = plan_on(asked, rank, way, q.device)
    if isinstance(plan, RingPlan):
        out, lse = ring_attention(q, k, v, sinks, Circle(plan, group, rank, number, cap or 0.0, backend))
    else:
        keys, values = bring(k, v, plan, group)
        options: Any = {"causal": False, "scale": number, "softcap": cap, "sinks": sinks, "return_lse": True, "backend": backend}
        out, lse = attention(q, keys, values, plan.layout, **options)
    if packed:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _check_pattern(pattern: Any) -> None:
    if isinstance(pattern, Selector):
        why = "it chooses from all of q and k, which no rank holds; only a Pattern says what a rank needs before it has it"
        raise Unsupported("context_attention cannot run", {type(pattern).__name__: [why]})
    if isinstance(pattern, Layout):
        raise Unsupported("context_attention cannot run", {"Layout": ["every rank needs lists of its own, which it makes from a Pattern"]})


def _check_group(group: Any) -> tuple[dist.ProcessGroup, int, int]:
    """The group, this process's rank in it, and its size."""
    if not dist.is_available() or not dist.is_initialized():
        raise bad_value("group", "must be a process group; call torch.distributed.init_process_group first", "no process group")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise bad_kind("group", "must be a ProcessGroup or None", group)
    return group, dist.get_rank(group), dist.get_world_size(group)


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


def _agree(group: dist.ProcessGroup, asked: Asked, q: Tensor, k: Tensor, v: Tensor, how: str) -> None:
    """Make sure, once for every kind of call, that all ranks ask for the same: otherwise they would wait for each other for ever."""
    shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape), str(q.dtype))
    plan = (asked.num_heads, asked.num_kv_heads, asked.lengths, asked.block, asked.causal, *(one.to_json() for one in asked.resolved))
    call = f"{how};{shapes};{plan};{asked.shards.digest}"
    mine = int.from_bytes(hashlib.sha256(call.encode()).digest()[:7], "big")
    known = _agreed.setdefault(group, set())
    if mine in known:
        return
    if len(known) >= _KEEP_CALLS:  # on every rank at the same call, as they all make the same ones
        known.clear()
    everyone = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=q.device)
    all_gather(everyone, torch.tensor([mine], device=q.device), group)
    numbers = everyone.tolist()
    if len(set(numbers)) > 1:
        other = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
        rule = "must be called alike on all ranks (pattern, shards, shapes, dtype, way, requires_grad)"
        raise bad_value("context_attention", rule, f"another call on ranks {other[:8]} than on rank 0")
    known.add(mine)
