"""`ulysses_attention`: parts of a sequence become parts of the heads, attend to all of it, and become parts of the sequence again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from s2attn.core import bad_kind, bad_value
from s2attn.distributed.heads import head_range
from s2attn.ops import attention
from s2attn.ops.checks import autocast, check_tensors
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
        validate: exchange shapes first and wait for them, so that processes that disagree raise an error. Without it all processes must
            have the same number of tokens.
        options: causal, scale, softcap, cu_seqlens_q, cu_seqlens_k, block, layer, backend of `s2attn.attention`.

    Raises:
        ValueError, TypeError: as `s2attn.attention`; heads that the number of processes does not divide; or processes that disagree, which
            each of them is told.
    """
    if not isinstance(pattern, Pattern):
        raise bad_kind("pattern", "must be a Pattern", pattern)
    if "heads" in options:
        raise bad_value("heads", "must be left out: every process holds all heads of its tokens", options["heads"])
    packed = options.get("cu_seqlens_q") is not None
    check_tensors(q, k, v, packed)
    q, k, v = autocast(q, k, v)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    heads = head_range(rank, ranks, num_heads=q.shape[-2], num_kv_heads=k.shape[-2])
    tokens_q, tokens_k = _tokens(q, k, v, ranks, group, packed) if validate else ((q.shape[-3],) * ranks, (k.shape[-3],) * ranks)
    if packed:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if k.shape[2] < ranks:  # a KV head for each process: autograd sums what comes back for it
        k, v = (x.repeat_interleave(ranks // x.shape[2], dim=2) for x in (k, v))
    to_q, to_k = _Parts(tokens_q, group), _Parts(tokens_k, group)
    q, k, v = heads_for_tokens(q, to_q), heads_for_tokens(k, to_k), heads_for_tokens(v, to_k)
    mine = None if sinks is None else sinks[heads.start : heads.end]
    if packed:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
    result = attention(q, k, v, pattern, heads=heads, sinks=mine, return_lse=return_lse, **options)
    out, lse = result if return_lse else (result, None)
    out = _back(out, to_q, packed)
    if lse is None:
        return out
    lse = _back(lse.transpose(-1, -2).unsqueeze(-1), to_q, packed)
    return out, lse.squeeze(-1).transpose(-1, -2)


def _back(x: Tensor, parts: _Parts, packed: bool) -> Tensor:
    return tokens_for_heads(x.unsqueeze(0), parts).squeeze(0) if packed else tokens_for_heads(x, parts)


@dataclass(frozen=True)
class _Parts:
    """How a sequence is cut: tokens of each process of a group."""

    tokens: tuple[int, ...]
    group: dist.ProcessGroup | None

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def mine(self) -> int:
        return self.tokens[dist.get_rank(self.group)]


def heads_for_tokens(x: Tensor, parts: _Parts) -> Tensor:
    """``(B, t, H, D)`` of all heads and a part of the tokens -> ``(B, T, H / n, D)`` of a part of the heads and all tokens."""
    return _Exchange.apply(x, parts, True)


def tokens_for_heads(x: Tensor, parts: _Parts) -> Tensor:
    """``(B, T, H / n, D)`` -> ``(B, t, H, D)``, the inverse."""
    return _Exchange.apply(x, parts, False)


class _Exchange(torch.autograd.Function):
    """Either exchange; each is the other's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: _Parts, to_heads: bool) -> Tensor:
        ctx.parts, ctx.to_heads = parts, to_heads
        return _to_heads(x, parts) if to_heads else _to_tokens(x, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return _Exchange.apply(grads[0], ctx.parts, not ctx.to_heads), None, None


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


def _tokens(
    q: Tensor, k: Tensor, v: Tensor, ranks: int, group: dist.ProcessGroup | None, packed: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of q and of k on every process, once all other sizes are known to agree."""
    place = 0 if packed else 1
    sizes = [0 if packed else q.shape[0], *q.shape[-2:], k.shape[-2], v.shape[-1], q.element_size()]
    said = torch.tensor([*sizes, q.shape[place], k.shape[place]], device=q.device)
    everyone = [torch.empty_like(said) for _ in range(ranks)]
    dist.all_gather(everyone, said, group=group)
    rows = torch.stack(everyone).tolist()
    if any(row[: len(sizes)] != rows[0][: len(sizes)] for row in rows):
        rule = "must agree in (batch, heads, head_dim, KV heads, width of values, bytes of a number) on all processes"
        raise bad_value("q, k and v", rule, [tuple(row[: len(sizes)]) for row in rows])
    return tuple(row[-2] for row in rows), tuple(row[-1] for row in rows)
