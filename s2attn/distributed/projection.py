"""Attention and its output projection by rows, so that sums over processes travel while the next rows are computed.

Tensor-parallel attention ends with ``all_reduce(out @ weight.T)``. Here that is done chunk of rows by chunk of rows (tiling-all-reduce of
FastAttention, arXiv:2410.16663): the sum of one is under way while the next one attends. Causal attention makes each chunk a call of its
own, on the keys up to its last row, so the result is exact. In the backward the chunks come in the other order; after the last rows have
been differentiated nothing more is added to the gradient of their inputs, and that sum, too, travels during the rows before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from s2attn.core import bad_kind, bad_value, check_int
from s2attn.distributed.agree import Agreed, Ranks
from s2attn.layout import HeadRange
from s2attn.ops import attention
from s2attn.ops.checks import check_softcap, check_tensors
from s2attn.patterns import Pattern

Project = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""Rows of the input ``(B, t, E)``, and the position of the first one, to their q, k and v."""


def row_chunks(tokens: int, rows: int, first: int | None = None) -> list[range]:
    """Cut ``tokens`` into chunks of ``rows``, the first one of ``first``; the last one takes what is left.

    The first chunk travels with nothing before it to hide behind, and the last one with nothing after it: sizes of their own pay.

    >>> row_chunks(100, 40, first=16)
    [range(0, 16), range(16, 56), range(56, 96), range(96, 100)]
    """
    check_int("tokens", tokens, 1)
    check_int("rows", rows, 1)
    begin = min(tokens, rows if first is None else check_int("first", first, 1))
    return [range(begin), *(range(at, min(at + rows, tokens)) for at in range(begin, tokens, rows))]


def overlapped_attention(
    x: Tensor,
    project: Project,
    pattern: Pattern,
    weight: Tensor,
    *,
    rows: int,
    first: int | None = None,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    validate: bool = True,
    **options: Any,
) -> Tensor:
    """A tensor-parallel attention block from its input to its output: ``all_reduce(attention(*project(x)) @ weight.T) + bias``.

    Every process has all rows of x and some of the heads. Sums over processes run beside the work on other rows, those of the output in
    the forward, those of the gradient of x in the backward. Compilers do not follow it; it works on what they have compiled.

    Args:
        x: ``(B, T, E)``, the same on all processes. So is the result, and so must be the gradient that comes for it.
        project: from ``x[:, a:b]`` and a to q ``(B, b - a, H, D)``, k and v of these rows and of this process's heads: projections that
            are cut by columns, rotary angles, norms. It looks at no other rows.
        pattern: as of `s2attn.attention`, the same on all processes (``heads`` says which of its heads a process has); the call is causal.
        weight: ``(E, H * Dv)``, this process's columns of the output projection.
        rows, first: rows of a chunk, and of the first one (:func:`row_chunks`).
        bias: ``(E,)``, the same on all processes, added once.
        group: the processes; all of them by default.
        validate: compare the call with those of the other processes first, and its backward too: an all-gather of 192 bytes, for which
            the host waits. Without it, processes that call differently hang or compute wrong results. The same on every process.
        options: scale, softcap, sinks, block, layer, heads, backend of `s2attn.attention`.

    Raises:
        ValueError, TypeError: as `s2attn.attention`; sizes that do not fit; with ``validate``, on every process: processes that call
            differently or in another order, call another function, or have a bad argument.
    """
    ranks = Ranks.of("overlapped_attention", group, validate, x)

    def check() -> list[range]:
        if not isinstance(x, Tensor):
            raise bad_kind("x", "must be a tensor", x)
        if x.dim() != 3 or not x.shape[1]:
            raise bad_value("x", "must have shape (batch, tokens, width), one token or more", tuple(x.shape))
        _check(pattern, weight, bias, ranks, options)
        return row_chunks(x.shape[1], rows, first)

    chunks = ranks.checked(check)
    fields = {"shape of x": tuple(x.shape), "requires_grad of x": torch.is_grad_enabled() and x.requires_grad}
    agreed = ranks.agree(fields | _fields(x, pattern, weight, bias, chunks, options))
    sums = _Sums(agreed)
    k: Tensor | None = None
    v: Tensor | None = None
    parts = []
    # Chunk after chunk, from input to output: autograd goes back in the same order, last rows first.
    for chunk, piece in zip(chunks, _Cut.apply(x, [len(chunk) for chunk in chunks], sums), strict=True):
        q, new_k, new_v = project(_SumBack.apply(piece, sums), chunk.start)
        k = new_k if k is None else torch.cat((k, new_k), dim=1)
        v = new_v if v is None else torch.cat((v, new_v), dim=1)
        parts.append(_projected(q, k, v, pattern, weight, sums, options))
    out = _Joined.apply(sums, *parts)
    return out if bias is None else out + bias


def overlapped_projection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    weight: Tensor,
    *,
    rows: int,
    first: int | None = None,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    validate: bool = True,
    **options: Any,
) -> Tensor:
    """``all_reduce(attention(q, k, v) @ weight.T) + bias`` where q, k, v are there already; other keys than new ones may stand before.

    Args:
        q, k, v: ``(B, T, H, D)``, ``(B, S, G, D)``, ``(B, S, G, Dv)``, S at least T: this process's heads.
        pattern, weight, rows, first, bias, group, options: as of :func:`overlapped_attention`.

    Returns:
        ``(B, T, E)``, the same on all processes; so must be the gradient that comes for it.
    """
    ranks = Ranks.of("overlapped_projection", group, validate, q)

    def check() -> list[range]:
        _check(pattern, weight, bias, ranks, options)
        if not all(isinstance(tensor, Tensor) and tensor.dim() == 4 for tensor in (q, k, v)):
            came = [getattr(x, "shape", x) for x in (q, k, v)]
            raise bad_value("q, k and v", "must be tensors (batch, tokens, heads, head_dim)", came)
        check_tensors(q, k, v, False)
        if k.shape[1] < q.shape[1]:
            raise bad_value("k", f"must have as many tokens as q ({q.shape[1]}) or more", k.shape[1])
        _check_columns(weight, q.shape[2] * v.shape[3])
        return row_chunks(q.shape[1], rows, first)

    chunks = ranks.checked(check)
    fields = {"(batch, tokens of q, tokens of k)": (*q.shape[:2], k.shape[1])}
    sums = _Sums(ranks.agree(fields | _fields(q, pattern, weight, bias, chunks, options)))
    parts = []
    for chunk in chunks:
        seen = k.shape[1] - q.shape[1] + chunk.stop
        parts.append(_projected(q[:, chunk.start : chunk.stop], k[:, :seen], v[:, :seen], pattern, weight, sums, options))
    out = _Joined.apply(sums, *parts)
    return out if bias is None else out + bias


def _projected(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, weight: Tensor, sums: _Sums, options: dict[str, Any]) -> Tensor:
    """This process's share of a chunk of the output, which is being summed."""
    out = attention(q, k, v, pattern, **options).flatten(2)
    _check_columns(weight, out.shape[-1])
    return _Sum.apply(functional.linear(out, weight), sums)


def _check_columns(weight: Tensor, columns: int) -> None:
    if weight.shape[1] != columns:
        raise bad_value("weight", f"must have {columns} columns, heads times width of v", tuple(weight.shape))


def _fields(like: Tensor, pattern: Pattern, weight: Tensor, bias: Any, chunks: list[range], options: dict[str, Any]) -> dict[str, object]:
    """What all processes must have alike: all but the heads that each of them has."""
    known = {"layer": 0, "block": None, "scale": None, "softcap": None, "backend": "auto"}
    given = {name: options.get(name, default) for name, default in known.items()}
    heads = options.get("heads")
    return {
        "dtype": str(like.dtype),
        "pattern": pattern,
        "rows": [len(chunk) for chunk in chunks],
        "rows of weight": weight.shape[0],
        "bias": bias is not None,
        **given,
        "sinks": options.get("sinks") is not None,
        "heads": (heads.num_heads, heads.num_kv_heads) if isinstance(heads, HeadRange) else heads,
        "options": sorted(set(options) - set(known) - {"sinks", "heads"}),
    }


def _check(pattern: Any, weight: Any, bias: Any, ranks: Ranks, options: dict[str, Any]) -> None:
    if not isinstance(pattern, Pattern):
        raise bad_kind("pattern", "must be a Pattern", pattern)
    if not isinstance(weight, Tensor):
        raise bad_kind("weight", "must be a tensor", weight)
    if weight.dim() != 2:
        raise bad_value("weight", "must have shape (width, heads * width of v)", tuple(weight.shape))
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        raise bad_value("bias", f"must be a tensor ({weight.shape[0]},)", getattr(bias, "shape", bias))
    others = {"causal", "cu_seqlens_q", "cu_seqlens_k", "return_lse"} & set(options)
    if others:
        raise bad_value("options", "must be scale, softcap, sinks, block, layer, heads or backend: rows are causal, and not packed", others)
    heads = options.get("heads")
    if isinstance(heads, HeadRange) and heads.num_heads != (heads.end - heads.start) * ranks.ranks:
        rule = f"must have {heads.num_heads // (heads.end - heads.start)} processes, each with its part of the {heads.num_heads} heads"
        raise bad_value("group", rule, ranks.ranks)
    check_softcap(options.get("softcap"))


class _Sums:
    """Sums over processes that are under way."""

    def __init__(self, agreed: Agreed) -> None:
        self.agreed = agreed
        self._works: list[Any] = []

    def start(self, part: Tensor) -> None:
        """Begin to sum ``part``, contiguous, in place."""
        self._works.append(begin_sum(part.detach(), self.agreed.ranks.group))

    def start_back(self, part: Tensor) -> None:
        """The same for a gradient; before the first one of a backward, processes compare which call it belongs to."""
        if not self._works:
            self.agreed.backward()
        self.start(part)

    def wait(self) -> None:
        """Until all that was begun has ended: the stream of a GPU waits, or this thread."""
        works, self._works = self._works, []
        for work in works:
            work.wait()


def begin_sum(part: Tensor, group: dist.ProcessGroup) -> Any:
    """Start an all-reduce in place; what comes back has ``wait()``."""
    return dist.all_reduce(part, group=group, async_op=True)


class _Sum(torch.autograd.Function):
    """Start the sum of a share; its gradient is that of the sum. Nobody may read the result before `_Joined` does."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sums: _Sums) -> Tensor:
        ctx.mark_dirty(part)
        sums.start(part)
        return part

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return grads[0], None


class _Joined(torch.autograd.Function):
    """Wait for all sums, and lay their rows one after another."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, *parts: Tensor) -> Tensor:
        ctx.rows = [part.shape[1] for part in parts]
        sums.wait()
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, *grads[0].split(ctx.rows, dim=1)


class _Cut(torch.autograd.Function):
    """Rows in chunks; the backward waits for the sums of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], sums: _Sums) -> tuple[Tensor, ...]:
        ctx.sums = sums
        return tuple(piece.contiguous() for piece in x.split(rows, dim=1))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        ctx.sums.wait()
        return torch.cat(grads, dim=1), None, None


class _SumBack(torch.autograd.Function):
    """Nothing forward; the backward starts the sum of the gradient, which nobody may read before `_Cut` does."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, sums: _Sums) -> Tensor:
        ctx.sums = sums
        return piece.view_as(piece)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        ctx.sums.start_back(grad)
        return grad, None
