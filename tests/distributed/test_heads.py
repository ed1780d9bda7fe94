"""Tensor parallelism: the same recipe gives the same numbers on 1, 2 and 4 processes, from ranges of heads and from DTensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import s2attn
from s2attn import Dense, HeadRange, Local, PerHead, Recipe, Sink, Stride, Window
from s2attn.distributed.heads import head_range, kv_head_range, take_heads
from tests.support.ranks import Ended, run_here, run_ranks, values

RANKS = 4
H, T, D = 8, 70, 8
S2 = Local(1, block=16) | Stride(3, block=16)
EACH = PerHead({0: Dense(), 1: Window(5)}, default=Sink(2) | Window(9))
RECIPE = Recipe(S2, dense_layers=[1], layers={2: EACH})
BY_QUERY = Local(1, block=16) | Stride(3, block=16, heads="query")


def whole(kv_heads: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, sinks and weights of a scalar result, the same on every process."""
    made = torch.Generator().manual_seed(seed)
    shapes = ((2, T, H, D), (2, T, kv_heads, D), (2, T, kv_heads, D), (H,), (2, T, H, D), (2, H, T))
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def run(q: Any, k: Any, v: Any, sinks: Any, weights: tuple[Any, Any], pattern: Any, **how: Any) -> list[Any]:
    """out, lse and all gradients of a scalar made of both."""
    given = [x.detach().requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    out, lse = s2attn.attention(*given[:3], pattern, sinks=None if sinks is None else given[3], return_lse=True, **how)
    loss = (out * weights[0]).sum() + (lse * weights[1]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, given)]


@lru_cache
def expected_of(pattern: Any, kv_heads: int, sinks: bool, layer: int) -> list[Tensor]:
    """What one process finds."""
    q, k, v, s, *weights = whole(kv_heads)
    return run(q, k, v, s if sinks else None, (weights[0], weights[1]), pattern, layer=layer)


def error(found: list[Any], expected: list[Tensor]) -> float:
    full = [x.full_tensor() if isinstance(x, DTensor) else x for x in found]
    return max(float((a - b).abs().max()) for a, b in zip(full, expected, strict=True))


def with_dtensors(mesh: DeviceMesh, pattern: Any, kv_heads: int, placements: tuple[Any, Any], sinks: bool = True, layer: int = 0) -> float:
    """Placements of q and of k, v."""
    q, k, v, s, *weights = whole(kv_heads)
    expected = expected_of(pattern, kv_heads, sinks, layer)
    to_q, to_k = placements
    lse_at = {0: Shard(0), 2: Shard(1)}
    to_lse = [lse_at[p.dim] if isinstance(p, Shard) else p for p in to_q]
    to_s = [Shard(0) if p == Shard(2) else Replicate() for p in to_q]
    spread = [distribute_tensor(x, mesh, to) for x, to in ((q, to_q), (k, to_k), (v, to_k))]
    w = distribute_tensor(weights[0], mesh, to_q), distribute_tensor(weights[1], mesh, to_lse)
    return error(run(*spread, distribute_tensor(s, mesh, to_s) if sinks else None, w, pattern, layer=layer), expected)


def with_ranges(rank: int, ranks: int, pattern: Any, kv_heads: int, layer: int) -> float:
    """Every process has its own heads alone, as behind the projections of Megatron or vLLM."""
    q, k, v, s, *weights = whole(kv_heads)
    expected = expected_of(pattern, kv_heads, True, layer)
    heads = head_range(rank, ranks, num_heads=H, num_kv_heads=kv_heads)
    mine, kv = slice(heads.start, heads.end), kv_head_range(heads)
    local = take_heads(q, heads), take_heads(k, heads, kv=True), take_heads(v, heads, kv=True), s[mine]
    w = take_heads(weights[0], heads), weights[1][:, mine]
    out, lse, dq, dk, dv, ds = run(*local, w, pattern, layer=layer, heads=heads)
    parts = [expected[0][:, :, mine], expected[1][:, mine], expected[2][:, :, mine], expected[5][mine]]
    found = error([out, lse, dq, ds], parts)
    if kv_heads >= ranks:  # otherwise several processes hold a part of the gradient
        own = slice(kv.start, kv.stop)
        found = max(found, error([dk, dv], [expected[3][:, :, own], expected[4][:, :, own]]))
    return found


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    q, k, v, s, *_ = whole(4)
    by_heads, repeated, by_tokens = [Shard(2)], [Replicate()], [Shard(1)]

    def spread(x: Tensor, to: Any) -> DTensor:
        return distribute_tensor(x, mesh, to)

    every = [spread(x, by_heads) for x in (q, k, v)]
    calls: dict[str, Any] = {
        "tokens": lambda: s2attn.attention(*(spread(x, by_tokens) for x in (q, k, v)), S2),
        "unlike": lambda: s2attn.attention(every[0], spread(k, repeated), spread(v, repeated), S2),
        "mixed": lambda: s2attn.attention(every[0], k, v, S2),
        "mixed sinks": lambda: s2attn.attention(*every, S2, sinks=s),
        "range": lambda: s2attn.attention(*every, S2, heads=HeadRange(0, H, H, 4)),
        "layout": lambda: s2attn.attention(*every, s2attn.build_layout(S2, H, 4, T)),
        "partial": lambda: s2attn.attention(*(DTensor.from_local(x, mesh, [Partial()]) for x in (q, k, v)), S2),
        "batch": lambda: s2attn.attention(*(spread(x[:1], [Shard(0)]) for x in (q, k, v)), S2),
        "uneven": lambda: s2attn.attention(*(spread(x[:, :, :h], by_heads) for x, h in ((q, 6), (k, 3), (v, 3))), S2),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, TypeError, s2attn.Unsupported) as raised:
            said[name] = f"{type(raised).__name__}: {raised}"
    return said


def compiled(mesh: DeviceMesh) -> float:
    """A compiled function that gets DTensors and gives one back."""
    q, k, v, *_ = whole(4)
    function = torch.compile(lambda q, k, v: s2attn.attention(q, k, v, S2, layer=1), backend="aot_eager", fullgraph=True)
    return error([function(*(distribute_tensor(x, mesh, [Shard(2)]) for x in (q, k, v)))], [s2attn.attention(q, k, v, S2, layer=1)])


def module(mesh: DeviceMesh) -> float:
    """What `SparseAttention` gives for DTensors."""
    q, k, v, *_ = whole(4)
    layer = s2attn.SparseAttention(EACH, num_heads=H, num_kv_heads=4, layer=1)
    return error([layer(*(distribute_tensor(x, mesh, [Shard(2)]) for x in (q, k, v)))], [layer(q, k, v)])


def packed(mesh: DeviceMesh) -> float:
    q, k, v, *_ = whole(4)
    cu = torch.tensor([0, 40, 40, 2 * T], dtype=torch.int32)
    how: Any = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    found = s2attn.attention(*(distribute_tensor(x, mesh, [Shard(1)]) for x in flat), S2, **how)
    return error([found], [s2attn.attention(*flat, S2, **how)])


def everything() -> dict[str, Any]:
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for ranks in (1, 2, 4):
        for layer in range(3):
            for kv_heads in (8, 4, 2):
                if rank < ranks:
                    found[f"range, {ranks} ranks, {kv_heads} KV heads, layer {layer}"] = with_ranges(
                        rank, ranks, RECIPE.pattern(layer), kv_heads, layer
                    )
    meshes = {1: DeviceMesh("cpu", [[0], [1], [2], [3]], mesh_dim_names=("a", "b"))["b"]}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    meshes |= {2: square["model"], 4: init_device_mesh("cpu", (4,))}
    by_heads = [Shard(2)], [Shard(2)]
    for ranks, mesh in meshes.items():
        for layer in range(3):
            found[f"mesh, {ranks} ranks, layer {layer}"] = with_dtensors(mesh, RECIPE.pattern(layer), 4, by_heads, layer=layer)
    found["by query head"] = with_dtensors(meshes[4], BY_QUERY, 4, by_heads)
    found["without sinks"] = with_dtensors(meshes[4], S2, 4, by_heads, sinks=False)
    found["one KV head"] = with_dtensors(meshes[4], S2, 1, ([Shard(2)], [Replicate()]))
    found["by batch"] = with_dtensors(meshes[2], S2, 2, ([Shard(0)], [Shard(0)]))
    found["by batch and heads"] = with_dtensors(square, EACH, 4, ([Shard(0), Shard(2)],) * 2)
    found["repeated"] = with_dtensors(meshes[2], EACH, 4, ([Replicate()], [Replicate()]))
    found["module"] = module(meshes[4])
    found["packed"] = packed(meshes[4])
    found["compiled"] = compiled(meshes[4])
    return {"errors": found, "refused": refusals(meshes[2])}


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return run_ranks(__file__, "everything", RANKS)


def test_every_split_gives_the_numbers_of_one_process(ended: list[Ended]) -> None:
    for rank, found in enumerate(values(ended)):
        assert len(found["errors"]) >= 26
        wrong = {name: off for name, off in found["errors"].items() if not off < 1e-12}
        assert not wrong, f"rank {rank}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokens", "ValueError: q, k and v must be cut alike along an axis of the mesh: by heads"),
        ("unlike", "ValueError: q, k and v must be cut alike"),
        ("mixed", "TypeError: k must be a DTensor"),
        ("mixed sinks", "TypeError: sinks must be a DTensor"),
        ("range", "ValueError: heads must be left out for DTensors"),
        ("layout", "Unsupported: attention on DTensors needs a pattern"),
        ("partial", "ValueError: q, k and v must be cut alike"),
        ("batch", "ValueError: q, k and v must have a multiple of 2 in their batch"),
        ("uneven", "ValueError: q and k must have a multiple of 2 heads"),
    ],
)
def test_what_cannot_be_right_is_refused(ended: list[Ended], name: str, said: str) -> None:
    for found in values(ended):
        assert found["refused"][name].startswith(said)


def test_ranges_cover_all_heads_once() -> None:
    for ranks in (1, 2, 4, 8):
        ranges = [head_range(rank, ranks, num_heads=8, num_kv_heads=4) for rank in range(ranks)]
        assert [head for one in ranges for head in one.query_heads] == list(range(8))
        kv = [kv_head_range(one) for one in ranges]
        assert sorted({head for one in kv for head in one}) == list(range(4))
        assert all(h // 2 in mine for one, mine in zip(ranges, kv, strict=True) for h in one.query_heads)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rank": 2, "ranks": 2, "num_heads": 8, "num_kv_heads": 4}, "rank must be below ranks"),
        ({"rank": 0, "ranks": 3, "num_heads": 8, "num_kv_heads": 4}, "num_heads must be a multiple of ranks"),
        ({"rank": 0, "ranks": 4, "num_heads": 12, "num_kv_heads": 6}, "num_kv_heads must be a multiple of ranks"),
        ({"rank": 0, "ranks": 0, "num_heads": 8, "num_kv_heads": 4}, "ranks must be an integer >= 1"),
    ],
)
def test_heads_that_cannot_be_cut(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        head_range(**arguments)


def test_parts_of_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="whole groups of 4"):
        kv_head_range(HeadRange(2, 6, num_heads=8, num_kv_heads=2))
    with pytest.raises(ValueError, match="x must have shape"):
        take_heads(torch.zeros(3, 7, 4), HeadRange(0, 4, 8, 2))


if __name__ == "__main__":
    run_here(globals())
