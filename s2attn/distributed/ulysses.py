"""`ulysses_attention`: parts of a sequence become parts of the heads, attend to all of it, and become parts of the sequence again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2attn.core import bad_kind, bad_value
from s2attn.distributed.agree import Agreed, Ranks
from s2attn.distributed.heads import head_range
from s2attn.layout import HeadRange
from s2attn.ops import attention
from s2attn.ops.checks import autocast, check_scale, check_sinks, check_softcap, check_tensors
from s2attn.patterns import Pattern


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    group: dist.ProcessGroup | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    validate: bool = True,
    **options: Any,
) -> Any:
    """Attention over a sequence that is cut into contiguous parts, one on each process, by two exchanges of heads for tokens.

    Every process calls it with its part. Inside, process r holds the whole sequence for heads ``r * H/n .. (r+1) * H/n - 1``, and calls
    `s2attn.attention` with that range of global heads (DeepSpeed-Ulysses, arXiv:2309.14509). The result is the process's part of
    `s2attn.attention` on the whole; differentiable. Where ranks outnumber KV heads, each KV head goes to several processes.

    Args:
        q, k, v: ``(B, t, H, D)``, ``(B, s, G, D)``, ``(B, s, G, Dv)``, all heads of this process's tokens; or packed, ``(t, H, D)``
            where ``cu_seqlens_q`` and ``cu_seqlens_k`` are those of the whole. Processes may hold different numbers of tokens.
        pattern: which keys are seen; `s2attn.attention` on one process takes the same.
        group: the processes, in the order of their parts; all of them by default.
        sinks: all heads' ``(H,)``, the same on every process. Like a weight's, its gradient is a sum over processes.
        return_lse: also return the lse, ``(B, H, t)`` or ``(H, t)``.
        validate: exchange shapes and compare the call with those of the other processes first, and the backward of each exchange too: an
            all-gather of 192 bytes, for which the host waits. Without it, processes that call differently hang or compute wrong results,
            and all must have the same number of tokens. The same on every process.
        options: causal, scale, softcap, cu_seqlens_q, cu_seqlens_k, block, layer, backend of `s2attn.attention`.

    Raises:
        ValueError, TypeError: as `s2attn.attention`; heads that the number of processes does not divide; with ``validate``, on every
            process: processes that call differently or in another order, call another function, or have a bad argument.
    """
    ranks = Ranks.of("ulysses_attention", group, validate, q)
    packed = options.get("cu_seqlens_q") is not None
    heads = ranks.checked(lambda: _check(ranks, q, k, v, pattern, sinks, packed, options))
    q, k, v = autocast(q, k, v)
    fields = _fields(q, k, v, pattern, sinks, packed, options)
    agreed = ranks.agree(fields, (q.shape[-3], k.shape[-3]))
    tokens = agreed.own or [[q.shape[-3], k.shape[-3]]] * ranks.ranks
    to_q, to_k = (_Parts(tuple(row[i] for row in tokens), agreed) for i in (0, 1))
    if packed:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if k.shape[2] < ranks.ranks:  # a KV head for each process: autograd sums what comes back for it
        k, v = (x.repeat_interleave(ranks.ranks // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (heads_for_tokens(x, parts, name) for x, parts, name in ((q, to_q, "q"), (k, to_k, "k"), (v, to_k, "v")))
    mine = None if sinks is None else sinks[heads.start : heads.end]
    if packed:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
    result = attention(q, k, v, pattern, heads=heads, sinks=mine, return_lse=return_lse, **options)
    out, lse = result if return_lse else (result, None)
    out = _back(out, to_q, packed, "out")
    if lse is None:
        return out
    lse = _back(lse.transpose(-1, -2).unsqueeze(-1), to_q, packed, "lse")
    return out, lse.squeeze(-1).transpose(-1, -2)


def _check(ranks: Ranks, q: Any, k: Any, v: Any, pattern: Any, sinks: Any, packed: bool, options: dict[str, Any]) -> HeadRange:
    """The checks of one process, and the heads that it computes."""
    if not isinstance(pattern, Pattern):
        raise bad_kind("pattern", "must be a Pattern", pattern)
    if "heads" in options:
        rule = "must be left out: every process holds all heads of its tokens"
        raise bad_value("heads", rule, options["heads"])
    check_tensors(q, k, v, packed)
    check_sinks(sinks, q)
    check_scale(options.get("scale"), q.shape[-1])
    check_softcap(options.get("softcap"))
    return head_range(ranks.rank, ranks.ranks, num_heads=q.shape[-2], num_kv_heads=k.shape[-2])


def _fields(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, sinks: Any, packed: bool, options: dict[str, Any]) -> dict[str, object]:
    """What all processes must have alike."""
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, k, v, sinks)]
    shape = (None if packed else q.shape[0], *q.shape[-2:], k.shape[-2], v.shape[-1])
    known = {"layer": 0, "block": None, "causal": True, "scale": None, "softcap": None, "backend": "auto"}
    given = {name: options.get(name, default) for name, default in known.items()}
    packing = [options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    others = {name for name in options if name not in known and not name.startswith("cu_seqlens_")}
    return {
        "(batch, heads, head_dim, KV heads, width of v)": shape,
        "dtype": str(q.dtype),
        "pattern": pattern,
        **given,
        "cu_seqlens": [x.tolist() if isinstance(x, Tensor) else x for x in packing],
        "sinks": sinks is not None,
        "requires_grad of q, k, v, sinks": needed,
        "options": sorted(others),
    }


def _back(x: Tensor, parts: _Parts, packed: bool, name: str) -> Tensor:
    if packed:
        return tokens_for_heads(x.unsqueeze(0), parts, name).squeeze(0)
    return tokens_for_heads(x, parts, name)


@dataclass(frozen=True)
class _Parts:
    """How a sequence is cut: tokens of each process of a group."""

    tokens: tuple[int, ...]
    agreed: Agreed

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def group(self) -> dist.ProcessGroup:
        return self.agreed.ranks.group

    @property
    def mine(self) -> int:
        return self.tokens[self.agreed.ranks.rank]


def heads_for_tokens(x: Tensor, parts: _Parts, name: str) -> Tensor:
    """``(B, t, H, D)`` of all heads and a part of the tokens -> ``(B, T, H / n, D)`` of a part of the heads and all tokens."""
    return _Exchange.apply(x, parts, True, name)


def tokens_for_heads(x: Tensor, parts: _Parts, name: str) -> Tensor:
    """``(B, T, H / n, D)`` -> ``(B, t, H, D)``, the inverse."""
    return _Exchange.apply(x, parts, False, name)


class _Exchange(torch.autograd.Function):
    """Either exchange; each is the other's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: _Parts, to_heads: bool, name: str) -> Tensor:
        ctx.parts, ctx.to_heads, ctx.name = parts, to_heads, name
        return _to_heads(x, parts) if to_heads else _to_tokens(x, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        ctx.parts.agreed.backward(ctx.name)
        return _Exchange.apply(grads[0], ctx.parts, not ctx.to_heads, ctx.name), None, None, None


def _to_heads(x: Tensor, parts: _Parts) -> Tensor:
    batch, mine, heads, width = x.shape
    each = heads // parts.ranks
    # What a process sends to another is contiguous, (B, t, H / n, D); what it gets from it as well, with the other's number of tokens.
    sent = x.unflatten(2, (parts.ranks, each)).movedim(2, 0).contiguous()
    sizes = [batch * tokens * each * width for tokens in parts.tokens]
    got = x.new_empty(sum(sizes))
    dist.all_to_all_single(got, sent.flatten(), sizes, [batch * mine * each * width] * parts.ranks, group=parts.group)
    pieces = [piece.view(batch, -1, each, width) for piece in got.split(sizes)] if got.numel() else []
    return torch.cat(pieces, dim=1) if pieces else x.new_empty(batch, sum(parts.tokens), each, width)


def _to_tokens(x: Tensor, parts: _Parts) -> Tensor:
    batch, _, each, width = x.shape
    sizes = [batch * tokens * each * width for tokens in parts.tokens]
    sent = torch.cat([piece.flatten() for piece in x.split(list(parts.tokens), dim=1)])
    got = x.new_empty(parts.ranks, batch, parts.mine, each, width)
    dist.all_to_all_single(got.view(-1), sent, [batch * parts.mine * each * width] * parts.ranks, sizes, group=parts.group)
    return got.movedim(0, 2).flatten(2, 3)
