"""Context parallelism: parts of a sequence give the rows and gradients of the whole, by every way, and move the bytes that were planned."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import s2attn
from s2attn import ByRange, Dense, HeadRange, Local, Pattern, Recipe, Sink, Stride, Window, preset
from s2attn.distributed.context import context_attention
from s2attn.distributed.shards import Shards
from s2attn.distributed.traffic import WAYS, context_traffic
from s2attn.patterns import PRESETS
from s2attn.testing.ranks import Ended, run_here, run_ranks, values

H, G, D, DV = 4, 2, 8, 4
SMALL: dict[str, dict[str, int]] = {
    "s2": {"local": 2, "stride": 4, "block": 16},
    "phi3_small": {"local": 1, "stride": 3, "block": 16},
    "power_attention": {"sink": 20, "local": 1, "block": 16},
    "streaming_llm": {"sink": 4, "window": 40},
    "duo_attention": {"sink": 5, "window": 30},
    "longnet": {"segment": 2, "levels": 3, "block": 16},
    "longformer": {"window": 30, "global_tokens": 20},
    "bigbird": {"window": 3, "random": 2, "global_blocks": 2, "block": 16},
}
RANGED = ByRange([(0, 40, Dense()), (40, 150, Stride(2, block=16)), (150, None, Stride(5, block=16))])
GROUPS: dict[tuple[int, ...], Any] = {}
MEMBERS = {2: [2, 3]}


def small(name: str) -> Pattern:
    made = preset(name, **SMALL[name])
    return made.pattern(0) if isinstance(made, Recipe) else made


def shardings(seqlen: int, ranks: int) -> dict[str, Shards]:
    parts = [list(range(rank, 5 * ranks, ranks)) for rank in range(ranks)]
    return {
        "contiguous": Shards.contiguous(seqlen, ranks),
        "zigzag": Shards.zigzag(seqlen, ranks),
        "mixed": Shards.of_chunks(seqlen, parts),
    }


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = a.detach(), b.detach()
    seen = torch.isfinite(b)
    assert torch.equal(torch.isfinite(a), seen)
    return float((a - b)[seen].abs().max()) if seen.any() else 0.0


def whole(seqlen: int, dtype: torch.dtype, packed: bool) -> list[Tensor]:
    """q, k, v, sinks, and what out and lse are weighed with; the same on every rank."""
    made = torch.Generator().manual_seed(seqlen)
    batch = () if packed else (2,)
    shapes: list[tuple[int, ...]] = [(*batch, seqlen, heads, width) for heads, width in ((H, D), (G, D), (G, DV), (H, DV))]
    q, k, v, dout, dlse, sinks = (torch.randn(shape, generator=made, dtype=torch.float64) for shape in [*shapes, (*batch, H, seqlen), (H,)])
    return [x.to(dtype) for x in (q, k, v, sinks, dout, dlse)]


def case(ranks: int, pattern: Pattern, seqlen: int, shards: Shards, way: str, **how: Any) -> float:
    """The largest difference of this rank's rows and gradients from those of one process."""
    members = MEMBERS[ranks] if how.pop("last", False) else list(range(ranks))
    if dist.get_rank() not in members:
        return 0.0
    group, rank = GROUPS[tuple(members)], members.index(dist.get_rank())
    dtype, cu = how.pop("dtype", torch.float64), how.pop("cu", None)
    sinks_too, checkpointed = how.pop("sinks", False), how.pop("checkpointed", False)
    q, k, v, sinks, dout, dlse = whole(seqlen, dtype, cu is not None)
    dim = 0 if cu is not None else 1
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    mine = [shards.split(x.detach(), rank, dim).requires_grad_() for x in (q, k, v)] + [sinks.detach().requires_grad_()]
    packing = {} if cu is None else {"cu_seqlens_q": torch.tensor(cu), "cu_seqlens_k": torch.tensor(cu)}
    given = {"sinks": sinks} if sinks_too else {}
    expected = s2attn.attention(q, k, v, pattern, return_lse=True, **packing, **given, **how)
    given = {"sinks": mine[3]} if sinks_too else {}
    packed = None if cu is None else torch.tensor(cu)
    options: Any = {"group": group, "shards": shards, "way": way, "return_lse": True, "cu_seqlens": packed, **given, **how}
    call = partial(checkpoint, context_attention, use_reentrant=False) if checkpointed else context_attention
    found = call(*mine[:3], pattern, **options)
    assert found[0].shape == (*mine[0].shape[:-1], DV)
    off = [difference(found[0], shards.split(expected[0], rank, dim)), difference(found[1], shards.split(expected[1], rank, dim + 1))]
    seen = torch.isfinite(expected[1])
    loss = (expected[0] * dout).sum() + (expected[1] * dlse)[seen].sum()
    grads = torch.autograd.grad(loss, leaves if sinks_too else leaves[:3])
    seen = torch.isfinite(found[1])
    loss = (found[0] * shards.split(dout, rank, dim)).sum() + (found[1] * shards.split(dlse, rank, dim + 1))[seen].sum()
    got = list(torch.autograd.grad(loss, mine if sinks_too else mine[:3]))
    off += [difference(a, shards.split(b, rank, dim)) for a, b in zip(got[:3], grads[:3], strict=True)]
    if sinks_too:
        dist.all_reduce(got[3], group=group)
        off.append(difference(got[3], grads[3]))
    return max(off)


def everything() -> dict[str, Any]:
    for members in ((0,), (0, 1), (2, 3), (0, 1, 2, 3)):
        GROUPS[members] = dist.new_group(list(members))
    errors = {}
    for number, name in enumerate(PRESETS):
        for ranks in (2, 4):
            for kind, shards in shardings(320, ranks).items():
                way, causal = WAYS[(number + ranks // 2) % 3] if kind == "mixed" else "exchange", bool(len(errors) % 3)
                errors[f"{name}, {ranks} ranks, {kind}, {way}"] = case(ranks, small(name), 320, shards, way, causal=causal)
    for way in WAYS:
        for kind, shards in shardings(360, 4).items():  # 90 tokens a rank: no multiple of a block
            errors[f"{way}, {kind}, uneven"] = case(4, RANGED, 360, shards, way, block=16)
            cu = [0, 100, 100, 131, 300, 360]
            errors[f"{way}, {kind}, packed"] = case(4, small("s2"), 360, shards, way, cu=cu, causal=kind != "zigzag")
        contiguous = Shards.contiguous(128, 4)
        errors[f"{way}, sinks and softcap"] = case(4, Sink(4) | Window(20), 128, contiguous, way, sinks=True, softcap=2.0, scale=0.5)
        errors[f"{way}, rows without keys"] = case(4, ByRange([(40, 80, Dense())]), 128, contiguous, way)
        errors[f"{way}, one rank"] = case(1, small("s2"), 128, Shards.contiguous(128, 1), way)
        errors[f"{way}, heads of their own"] = case(2, Stride(3, block=16, heads="query"), 96, Shards.zigzag(96, 2), way, layer=1)
        # Half of the heads, as under tensor parallelism, in a group whose ranks are not the numbers of the processes.
        tensor: dict[str, Any] = {"heads": HeadRange(4, 8, 8, 4), "last": True}
        errors[f"{way}, half of the heads"] = case(2, small("s2"), 320, Shards.zigzag(320, 2), way, **tensor)
        errors[f"{way}, checkpointed"] = case(2, small("s2"), 320, Shards.zigzag(320, 2), way, checkpointed=True)
    errors["auto"] = case(4, small("s2"), 320, Shards.zigzag(320, 4), "auto")
    single = {way: case(4, RANGED, 360, Shards.zigzag(360, 4), way, block=16, dtype=torch.float32) for way in WAYS}
    return {"errors": errors, "float32": single, "bytes": bytes_on_the_wire(), "bits": same_bits(), "refused": refusals()}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank hands to the collectives for others, while inside."""
    total = {"sent": 0}
    rank, kept = dist.get_rank(), {}

    def count(name: str, of: Any) -> None:
        kept[name] = getattr(dist, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            total["sent"] += of(*args, **kwargs)
            return kept[name](*args, **kwargs)

        setattr(dist, name, counting)

    def size(x: Tensor) -> int:
        return x.numel() * x.element_size()

    def by_splits(out: Tensor, given: Tensor, get: list[int], give: list[int], group: Any) -> int:
        return size(given) - sum(size(x) for i, x in enumerate(given.split(give)) if i == rank)

    count("all_to_all_single", by_splits)
    renamed = hasattr(dist, "all_gather_single")  # in torch 2.13
    count(
        "all_gather_single" if renamed else "all_gather_into_tensor",
        lambda out, given, group: size(given) * (dist.get_world_size(group) - 1),
    )
    count("reduce_scatter_single" if renamed else "reduce_scatter_tensor", lambda out, given, group: size(given) - size(out))
    count("batch_isend_irecv", lambda moves: sum(size(move.tensor) for move in moves if move.op is dist.isend))
    try:
        yield total
    finally:
        for name, one in kept.items():
            setattr(dist, name, one)


def bytes_on_the_wire() -> dict[str, tuple[int, int]]:
    """For each way and direction the bytes that were sent, and those that were planned."""
    found = {}
    rank, group = dist.get_rank(), GROUPS[0, 1, 2, 3]
    for dtype in (torch.float32, torch.bfloat16):
        for kind, shards in shardings(320, 4).items():
            traffic = context_traffic(RANGED, H, G, shards=shards)
            for way in WAYS:
                q, k, v = (shards.split(x, rank).requires_grad_() for x in whole(320, dtype, False)[:3])
                how: Any = {"group": group, "shards": shards, "way": way}
                context_attention(q, k, v, RANGED, **how)  # ranks compare what they ask for the first time
                pair, total = 2 * (D + DV) * k.element_size(), 2 * (D + DV) * 4
                with counted() as there:
                    out = context_attention(q, k, v, RANGED, **how)
                with counted() as back:
                    out.sum().backward()
                for name, sent, backward in (("forward", there, False), ("backward", back, True)):
                    planned = int(traffic.moved(way, pair, total, backward=backward)[0][rank])
                    found[f"{dtype}, {kind}, {way}, {name}"] = (sent["sent"], planned)
    return found


def same_bits() -> bool:
    """Twice the same, bit for bit, by every way."""
    rank, shards = dist.get_rank(), Shards.zigzag(320, 4)
    made = []
    for way in WAYS:
        for _ in range(2):
            q, k, v = (shards.split(x, rank).requires_grad_() for x in whole(320, torch.float32, False)[:3])
            out = context_attention(q, k, v, RANGED, group=GROUPS[0, 1, 2, 3], shards=shards, way=way)
            made.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    return all(torch.equal(x, y) for a, b in zip(made[::2], made[1::2], strict=True) for x, y in zip(a, b, strict=True))


def refusals() -> dict[str, str]:
    rank = dist.get_rank()
    q, k = torch.randn(1, 32, H, D), torch.randn(1, 32, G, D)
    contiguous = Shards.contiguous(128, 4)
    packed = (q[0], k[0], k[0])
    xattention = s2attn.XAttention(stride=16, threshold=0.9)
    calls: dict[str, Any] = {
        "size": lambda: context_attention(q, k, k, Window(8), shards=Shards.contiguous(64, 2)),
        "tokens": lambda: context_attention(q, k, k, Window(8), shards=Shards.contiguous(64, 4)),
        "keys": lambda: context_attention(q, k[:, :16], k[:, :16], Window(8)),
        "selector": lambda: context_attention(q, k, k, xattention),
        "layout": lambda: context_attention(q, k, k, s2attn.build_layout(Window(8), H, G, 32)),
        "recipe": lambda: context_attention(q, k, k, Recipe(Window(8))),
        "way": lambda: context_attention(q, k, k, Window(8), way="broadcast"),
        "backend": lambda: context_attention(q, k, k, Window(8), backend="magic"),
        "name": lambda: context_attention(q, k, k, Window(8), shards="striped"),
        "odd": lambda: context_attention(q[:, :31], k[:, :31], k[:, :31], Window(8), shards="zigzag"),
        "packed": lambda: context_attention(*packed, Window(8), cu_seqlens=torch.tensor([0, 32])),
        "other pattern": lambda: context_attention(q, k, k, Window(8 + rank // 2), shards=contiguous),
        "other batch": lambda: context_attention(*(x.expand(1 + rank % 2, -1, -1, -1) for x in (q, k, k)), Window(8)),
        "other gradients": lambda: context_attention(q, k.requires_grad_(rank == 1), k, Window(9)),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, TypeError, s2attn.Unsupported) as raised:
            said[name] = f"{type(raised).__name__}: {raised}"
    return said


def one_dies() -> float:
    q, k = torch.randn(1, 32, H, D), torch.randn(1, 32, G, D)
    context_attention(q, k, k, Local(3, block=16), way="exchange")
    if dist.get_rank() == 1:
        os._exit(3)
    context_attention(q, k, k, Local(3, block=16), way="exchange")
    return 0.0


def one_is_late() -> str:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    q, k = torch.randn(1, 32, H, D), torch.randn(1, 32, G, D)
    if dist.get_rank() == 1:
        time.sleep(5)
        return "late"
    try:
        context_attention(q, k, k, Local(3, block=16), group=group)
    except RuntimeError as raised:
        return type(raised).__name__
    return "nothing"


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return run_ranks(__file__, "everything", 4)


def test_parts_of_a_sequence_give_the_rows_and_gradients_of_the_whole(ended: list[Ended]) -> None:
    for found in values(ended):
        assert {name: off for name, off in found["errors"].items() if not off < 1e-12} == {}
        assert len(found["errors"]) > 60


def test_float32_differs_by_its_rounding(ended: list[Ended]) -> None:
    for found in values(ended):
        assert all(off < 2e-5 for off in found["float32"].values()), found["float32"]


def test_the_bytes_on_the_wire_are_those_of_the_plan(ended: list[Ended]) -> None:
    for found in values(ended):
        assert {name: pair for name, pair in found["bytes"].items() if pair[0] != pair[1]} == {}


def test_the_same_call_gives_the_same_bits(ended: list[Ended]) -> None:
    assert all(found["bits"] for found in values(ended))


ALIKE = "ValueError: context_attention must be called alike on all ranks"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("size", "ValueError: group must have as many ranks as the shards, 2; got 4"),
        ("tokens", "ValueError: q must have the tokens that the shards give every rank, 16; got 32"),
        ("keys", "ValueError: k must have as many tokens as q, 32; got 16"),
        ("selector", "Unsupported: context_attention cannot run\n  XAttention: it chooses"),
        ("layout", "Unsupported: context_attention cannot run\n  Layout: every rank"),
        ("recipe", "TypeError: pattern must be a Pattern; take recipe.pattern(layer); got Recipe"),
        ("way", "ValueError: way must be auto or one of all-gather, exchange, ring; got 'broadcast'"),
        ("backend", "ValueError: backend must be"),
        ("name", "ValueError: shards must be Shards or one of contiguous, zigzag; got 'striped'"),
        ("odd", "ValueError: seqlen must be a multiple of 8 (8 equal parts for 4 ranks); got 124"),
        ("packed", "ValueError: cu_seqlens must end at the number of tokens, 128; got 32"),
        ("other pattern", f"{ALIKE} (pattern, shards, shapes, dtype, way, requires_grad); got another call on ranks [2, 3] than on rank 0"),
        ("other batch", f"{ALIKE} (pattern, shards, shapes, dtype, way, requires_grad); got another call on ranks [1, 3] than on rank 0"),
        ("other gradients", f"{ALIKE} (pattern, shards, shapes, dtype, way, requires_grad); got another call on ranks [1] than on rank 0"),
    ],
)
def test_what_cannot_be_right_is_refused_on_every_rank(ended: list[Ended], name: str, said: str) -> None:
    for found in values(ended):
        assert found["refused"][name].startswith(said)


def test_a_rank_that_dies_is_an_error_on_the_others() -> None:
    died = run_ranks(__file__, "one_dies", 2, seconds=60)
    assert died[1] == Ended()
    assert died[0].error is not None and "RuntimeError" in died[0].error


def test_a_rank_that_does_not_come_is_an_error_after_the_timeout_of_the_group() -> None:
    assert values(run_ranks(__file__, "one_is_late", 2, seconds=60)) == ["RuntimeError", "late"]


def one_rank() -> float:
    """Compiled code goes around the call, and back into compiled code behind it; under autocast it runs in the autocast dtype."""
    q, k, v = (torch.randn(1, 64, heads, 8, requires_grad=True) for heads in (H, G, G))

    def layer(*parts: Tensor) -> Tensor:
        return context_attention(*(2 * part for part in parts), Window(20)).sin()

    expected, found = layer(q, k, v), torch.compile(layer, backend="eager")(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert context_attention(q, k, v, Window(20)).dtype == torch.bfloat16
    (found.sum() - expected.sum()).backward()
    return difference(found, expected) + max(float(x.grad.abs().max()) for x in (q, k, v) if x.grad is not None)


def test_compiled_code_goes_around_it() -> None:
    assert values(run_ranks(__file__, "one_rank", 1)) == [0.0]


def test_without_a_process_group_it_says_so() -> None:
    q = torch.randn(1, 32, H, D)
    with pytest.raises(ValueError, match=r"group must be a process group; call torch.distributed.init_process_group first"):
        context_attention(q, q, q, Window(8))


if __name__ == "__main__":
    run_here(globals())
