"""`attention` on tensors that are spread over a device mesh (DTensor): every process sees the patterns of the heads that it holds.

Registered with torch for forward and backward, an axis of the mesh may cut the heads or the batch, or repeat everything. The numbers of
the heads travel as a tensor that is cut with them, so nothing inside of the op asks for the rank of its process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from s2attn.core import Unsupported, bad_kind, bad_value
from s2attn.layout import HeadRange
from s2attn.ops.register import attention_op
from s2attn.ops.source import with_named_heads
from s2attn.patterns import Pattern

_BATCH, _HEADS = 0, 2


def check(q: Any, k: Any, v: Any, sinks: Any, pattern: Any, heads: HeadRange | None) -> None:
    """Kinds, meshes and placements of the tensors of a call of which one is a DTensor.

    Raises:
        TypeError: another one is not.
        ValueError: other meshes; placements that would need other keys than those that a process has; or a range of heads besides.
        Unsupported: a layout or a selector in the place of a pattern.
    """
    if heads is not None:
        raise bad_value("heads", "must be left out for DTensors, which know their place", heads)
    given = {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
    for name, tensor in given.items():
        if not isinstance(tensor, DTensor):
            raise bad_kind(name, "must be a DTensor, as the others are", tensor)
        if tensor.device_mesh != q.device_mesh:
            raise bad_value(name, f"must lie on the mesh of q, {q.device_mesh}", tensor.device_mesh)
    if not isinstance(pattern, Pattern):
        why = "its lists are those of one process: give a Pattern, or call it on local tensors"
        raise Unsupported("attention on DTensors needs a pattern", {type(pattern).__name__: [why]})
    kv_heads, heads_at, parts, rows = k.shape[-2], q.dim() - 2, 1, 1
    rule = f"must be cut alike along an axis of the mesh: by heads (Shard({heads_at})), by batch, or not at all"
    for axis, placed in enumerate(zip(*(x.placements for x in (q, k, v)), strict=True)):
        by_heads, by_batch = placed[0].is_shard(heads_at), q.dim() == 4 and placed[0].is_shard(_BATCH)
        shared = by_heads and kv_heads == 1 and placed[1] == placed[2] == Replicate()
        if not (by_heads or by_batch or placed[0].is_replicate()) or not (shared or placed[0] == placed[1] == placed[2]):
            raise bad_value("q, k and v", rule, placed)
        parts *= q.device_mesh.size(axis) if by_heads else 1
        rows *= q.device_mesh.size(axis) if by_batch else 1
        if q.shape[0] % rows:
            raise bad_value("q, k and v", f"must have a multiple of {rows} in their batch, which is cut so often", q.shape[0])
        if q.shape[-2] % parts or (kv_heads % parts and not shared):
            rule = f"must have a multiple of {parts} heads, one part for each process (one KV head may also be replicated)"
            raise bad_value("q and k", rule, f"{q.shape[-2]} over {kv_heads}")


def call(source: str, index: Sequence[Tensor], q: Any, k: Any) -> tuple[str, list[Tensor]]:
    """The text and tensors of a call of the op, for DTensors q ``(B, T, H, D)`` and k ``(B, S, G, D)``."""
    mesh = q.device_mesh
    cut = tuple(Shard(0) if placement.is_shard(_HEADS) else Replicate() for placement in q.placements)
    # A graph makes them anew and looks at them in every run; elsewhere they are made once, and looked at once.
    named = (_head_numbers if torch.compiler.is_compiling() else _kept_head_numbers)(mesh, cut, q.shape[_HEADS])
    return with_named_heads(source, q.shape[_HEADS], k.shape[_HEADS]), [*(_on_mesh(tensor, mesh) for tensor in index), named]


def _head_numbers(mesh: DeviceMesh, placements: tuple[Placement, ...], num_heads: int) -> Tensor:
    # Every process has all numbers, and keeps its own: nothing is sent.
    everyone = torch.arange(num_heads, device=mesh.device_type)
    return DTensor.from_local(everyone, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(mesh, placements)


_kept_head_numbers: Any = lru_cache(maxsize=64)(_head_numbers)


def _on_mesh(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


class _Ways:
    """How tensors may lie along one axis of a mesh: as they are in forward and backward; keys by name, in the order of ``names``."""

    names = ("repeated", "heads", "one KV head", "batch")
    q = out = (Replicate(), Shard(_HEADS), Shard(_HEADS), Shard(_BATCH))
    lse = (Replicate(), Shard(1), Shard(1), Shard(_BATCH))
    kv = (Replicate(), Shard(_HEADS), Replicate(), Shard(_BATCH))
    dkv = (Replicate(), Shard(_HEADS), Partial(), Shard(_BATCH))
    sinks = (Replicate(), Shard(0), Shard(0), Replicate())
    dsinks = (Replicate(), Shard(0), Shard(0), Partial())
    none = lengths = (Replicate(),) * 4
    heads = (Replicate(), Shard(0), Shard(0), Replicate())

    @classmethod
    def of(cls, results: Sequence[str], arguments: Sequence[str], kv_heads: int) -> list[tuple[list[Placement], list[Placement]]]:
        ways = [i for i, name in enumerate(cls.names) if kv_heads == 1 or name != "one KV head"]
        return [([getattr(cls, name)[i] for name in results], [getattr(cls, name)[i] for name in arguments]) for i in ways]


def _index_names(index: Sequence[Any]) -> list[str]:
    return ["lengths"] * (len(index) - 1) + ["heads"]


@register_sharding(attention_op)
def _forward_ways(q: Any, k: Any, v: Any, sinks: Any, index: Sequence[Any], *call: Any) -> list[tuple[list[Placement], list[Placement]]]:
    arguments = ["q", "kv", "kv", *([] if sinks is None else ["sinks"]), *_index_names(index)]
    return _Ways.of(["out", "lse"], arguments, k.shape[_HEADS])


@register_sharding(torch.ops.s2attn.attention_backward.default)
def _backward_ways(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, sinks: Any, out: Any, lse: Any, index: Sequence[Any], *call: Any
) -> list[tuple[list[Placement], list[Placement]]]:
    grads = [*([] if dout is None else ["out"]), *([] if dlse is None else ["lse"])]
    given = [] if sinks is None else ["sinks"]
    arguments = [*grads, "q", "kv", "kv", *given, "out", "lse", *_index_names(index)]
    return _Ways.of(["q", "dkv", "dkv", "none" if sinks is None else "dsinks"], arguments, k.shape[_HEADS])
