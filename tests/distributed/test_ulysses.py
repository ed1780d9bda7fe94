"""Heads for tokens and back: parts of a sequence give the rows and gradients of the whole, whatever the processes hold."""

from __future__ import annotations

import os
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import s2attn
from s2attn import Dense, HeadRange, Local, PerHead, Recipe, Sink, Stride, Window
from s2attn.distributed.ulysses import ulysses_attention
from tests.support.ranks import Ended, run_here, run_ranks, values

H, D = 8, 8
RECIPE = Recipe(Local(1, block=16) | Stride(3, block=16), dense_layers=[1], layers={2: PerHead({0: Dense()}, default=Sink(2) | Window(9))})


def part(x: Tensor, tokens: list[int], rank: int, dim: int) -> Tensor:
    return x.narrow(dim, list(accumulate([0, *tokens]))[rank], tokens[rank])


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max()) if a.numel() else 0.0


def case(ranks: int, tokens: list[int], layer: int, kv_heads: int, *, past: int = 0, validate: bool = True, **how: Any) -> float:
    """The largest difference of this process's rows and gradients from those of one process; ``past`` more keys on the first one."""
    group, rank = GROUPS[ranks], dist.get_rank()
    if rank >= ranks:
        return 0.0
    total = sum(tokens)
    made = torch.Generator().manual_seed(0)
    shapes = ((2, total, H, D), (2, total + past, kv_heads, D), (2, total + past, kv_heads, 4), (H,), (2, total, H, 4), (2, H, total))
    q, k, v, sinks, *weights = (torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes)
    keys = [tokens[0] + past, *tokens[1:]]
    packed = how.pop("cu", None)
    dim = 1
    if packed is not None:
        dim, how = 0, {"cu_seqlens_q": torch.tensor(packed), "cu_seqlens_k": torch.tensor(packed)}
        q, k, v, weights = q[0], k[0], v[0], [w[0] for w in weights]
    whole = [x.requires_grad_() for x in (q, k, v, sinks)]
    mine = [part(x.detach(), n, rank, dim).requires_grad_() for x, n in ((q, tokens), (k, keys), (v, keys))] + [
        sinks.detach().requires_grad_()
    ]
    pattern = RECIPE.pattern(layer)
    expected = s2attn.attention(q, k, v, pattern, sinks=sinks, layer=layer, return_lse=True, **how)
    options: Any = {"sinks": mine[3], "layer": layer, "return_lse": True, "validate": validate, **how}
    found = ulysses_attention(*mine[:3], pattern, group=group, **options)
    parts = [(tokens, dim), (tokens, weights[1].dim() - 1)]
    off = [difference(f, part(e, at[0], rank, at[1])) for f, e, at in zip(found, expected, parts, strict=True)]
    loss = sum((x * w).sum() for x, w in zip(expected, weights, strict=True))
    grads = torch.autograd.grad(loss, whole)
    loss = sum((x * part(w, at[0], rank, at[1])).sum() for x, w, at in zip(found, weights, parts, strict=True))
    got = list(torch.autograd.grad(loss, mine))
    dist.all_reduce(got[3], group=group)
    wanted = [part(grads[0], tokens, rank, dim), part(grads[1], keys, rank, dim), part(grads[2], keys, rank, dim), grads[3]]
    return max(off + [difference(a, b) for a, b in zip(got, wanted, strict=True)])


GROUPS: dict[int, Any] = {}


def everything() -> dict[str, Any]:
    GROUPS.update({ranks: dist.new_group(list(range(ranks))) for ranks in (1, 2, 4)})
    errors = {}
    for ranks in (1, 2, 4):
        for layer in range(3):
            errors[f"{ranks} ranks, layer {layer}"] = case(ranks, [20] * ranks, layer, 4)
    errors["fewer KV heads than processes"] = case(4, [20] * 4, 2, 2)
    errors["one KV head"] = case(4, [20] * 4, 0, 1)
    errors["parts of all sizes"] = case(4, [33, 1, 0, 20], 2, 4)
    errors["keys of a past"] = case(4, [10] * 4, 2, 4, past=37)
    errors["without a look"] = case(4, [20] * 4, 2, 8, validate=False)
    errors["packed"] = case(4, [33, 1, 6, 20], 0, 4, cu=[0, 17, 17, 60])
    errors["both ways"] = case(2, [30] * 2, 0, 4, causal=False)
    return {"errors": errors, "refused": refusals()}


def refusals() -> dict[str, str]:
    rank = dist.get_rank()
    q, k = torch.randn(1, 8, H, D), torch.randn(1, 8, 4, D)
    calls: dict[str, Any] = {
        "batch": lambda: ulysses_attention(*(x.expand(1 + rank % 2, -1, -1, -1) for x in (q, k, k)), Window(4)),
        "heads": lambda: ulysses_attention(q[:, :, :6], k[:, :, :3], k[:, :, :3], Window(4)),
        "range": lambda: ulysses_attention(q, k, k, Window(4), heads=HeadRange(0, H, H, 4)),
        "layout": lambda: ulysses_attention(q, k, k, s2attn.build_layout(Window(4), H, 4, 8)),  # pyrefly: ignore
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, TypeError) as raised:
            said[name] = f"{type(raised).__name__}: {raised}"
    return said


def one_dies() -> float:
    q, k = torch.randn(1, 8, H, D), torch.randn(1, 8, 4, D)
    ulysses_attention(q, k, k, Window(4))
    if dist.get_rank() == 1:
        os._exit(3)
    ulysses_attention(q, k, k, Window(4))
    return 0.0


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return run_ranks(__file__, "everything", 4)


def test_parts_of_a_sequence_give_the_rows_and_gradients_of_the_whole(ended: list[Ended]) -> None:
    for found in values(ended):
        assert {name: off for name, off in found["errors"].items() if not off < 1e-12} == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("batch", "ValueError: ulysses_attention must be called alike on all ranks; got (batch, heads, head_dim, KV heads, width of v)"),
        ("heads", "ValueError: num_heads must be a multiple of ranks (4); got 6"),
        ("range", "ValueError: heads must be left out"),
        ("layout", "TypeError: pattern must be a Pattern; got Layout"),
    ],
)
def test_what_cannot_be_right_is_refused_on_every_process(ended: list[Ended], name: str, said: str) -> None:
    for found in values(ended):
        assert found["refused"][name].startswith(said)


def test_a_process_that_dies_is_an_error_on_the_others() -> None:
    first, second = run_ranks(__file__, "one_dies", 2, seconds=60)
    assert second == Ended()
    assert first.error is not None and "RuntimeError" in first.error


if __name__ == "__main__":
    run_here(globals())
