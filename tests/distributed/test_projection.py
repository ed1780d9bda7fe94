"""Attention and its output projection by rows: the same numbers, and sums that travel while other rows are computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

import s2attn
from s2attn import Dense, Local, PerHead, Recipe, Sink, Stride, Window
from s2attn.distributed import projection
from s2attn.distributed.heads import head_range, take_heads
from s2attn.distributed.projection import overlapped_attention, overlapped_projection, row_chunks
from tests.support.ranks import Ended, run_here, run_ranks, values

RANKS = 2
H, G, D, T, E = 4, 2, 8, 70, 24
RECIPE = Recipe(Local(1, block=16) | Stride(3, block=16), dense_layers=[1], layers={2: PerHead({0: Dense()}, default=Sink(2) | Window(9))})
SECONDS = 15.0
"""A sum that waits so long for something that ought to happen beside it gives up."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 4


def weights() -> list[Tensor]:
    """Of q, k, v and the output, of all heads; and a bias."""
    shapes = ((H * D, E), (G * D, E), (G * D, E), (E, H * D), (E,))
    return [normal(i + 1, *shape).requires_grad_() for i, shape in enumerate(shapes)]


def projected(x: Tensor, w: list[Tensor], begin: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of rows that begin at a position, which they are marked with."""
    at = torch.arange(begin, begin + x.shape[1], dtype=x.dtype)[None, :, None, None] / T
    q, k, v = (functional.linear(x, one).unflatten(-1, (-1, D)) for one in w[:3])
    return q + at, k - at, v


def local(w: list[Tensor], rank: int) -> list[Tensor]:
    """The part of all weights that a process holds, as leaves."""
    heads = head_range(rank, RANKS, num_heads=H, num_kv_heads=G)
    cut = [
        take_heads(one.unflatten(0, (-1, D)).movedim(0, -2), heads, kv=i > 0).movedim(-2, 0).flatten(0, 1) for i, one in enumerate(w[:3])
    ]
    out = take_heads(w[3].unflatten(1, (-1, D)), heads).flatten(1)
    return [one.detach().clone().requires_grad_() for one in (*cut, out, w[4])]


def block(layer: int, rows: int, first: int | None) -> float:
    """A whole block against one process: its output and every gradient."""
    rank, pattern, w = dist.get_rank(), RECIPE.pattern(layer), weights()
    x, dout = normal(7, 2, T, E).requires_grad_(), normal(8, 2, T, E)
    q, k, v = projected(x, w, 0)
    expected = functional.linear(s2attn.attention(q, k, v, pattern, layer=layer).flatten(2), w[3], w[4])
    grads = torch.autograd.grad((expected * dout).sum(), [x, *w])
    mine, my_x = local(w, rank), x.detach().clone().requires_grad_()
    heads = head_range(rank, RANKS, num_heads=H, num_kv_heads=G)
    how: Any = {"rows": rows, "first": first, "bias": mine[4], "layer": layer, "heads": heads}
    found = overlapped_attention(my_x, lambda piece, begin: projected(piece, mine, begin), pattern, mine[3], **how)
    got = torch.autograd.grad((found * dout).sum(), [my_x, *mine])
    wanted = [grads[0], *(one.detach() for one in local([*grads[1:]], rank))]
    return largest([found, *got], [expected, *wanted])


def tail(layer: int, past: int) -> float:
    """From q, k, v on, with keys before the first query."""
    rank, pattern, w = dist.get_rank(), RECIPE.pattern(layer), weights()
    heads = head_range(rank, RANKS, num_heads=H, num_kv_heads=G)
    whole = [normal(9, 1, T, H, D), normal(10, 1, past + T, G, D), normal(11, 1, past + T, G, D)]
    whole = [x.requires_grad_() for x in whole]
    expected = functional.linear(s2attn.attention(*whole, pattern, layer=layer).flatten(2), w[3])
    mine = [take_heads(x.detach(), heads, kv=i > 0).requires_grad_() for i, x in enumerate(whole)]
    found = overlapped_projection(*mine, pattern, local(w, rank)[3], rows=16, first=5, layer=layer, heads=heads)
    grads = torch.autograd.grad(expected.square().sum(), whole)
    got = torch.autograd.grad(found.square().sum(), mine)
    return largest([found, *got], [expected, *(take_heads(x, heads, kv=i > 0) for i, x in enumerate(grads))])


def largest(found: list[Any], expected: list[Any]) -> float:
    assert [a.shape for a in found] == [b.shape for b in expected]
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True))


class Slow:
    """A sum over processes that takes until something else has happened, which it can only see if nobody waits for it."""

    last: Slow | None = None

    def __init__(self, log: list[str], chunk: int, until: threading.Event, part: Tensor, group: Any) -> None:
        self.error: BaseException | None = None
        before, Slow.last = Slow.last, self  # sums are begun in the same order on all processes

        def run() -> None:
            try:
                if not until.wait(SECONDS):
                    raise TimeoutError(f"nothing was computed while chunk {chunk} was being summed")
                if before is not None:
                    before.wait()
                dist.all_reduce(part, group=group)
                log.append(f"summed {chunk}")
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def wait(self) -> None:
        self.thread.join()
        if self.error is not None:
            raise self.error


def events() -> dict[str, Any]:
    """What happens in which order when the sum of each chunk takes until the next chunk has been computed."""
    log: list[str] = []
    reached = {name: [threading.Event() for _ in range(6)] for name in ("forward", "backward")}
    x, w = normal(7, 1, 64, E).requires_grad_(), local(weights(), dist.get_rank())
    order = {"forward": [0, 1, 2, 3], "backward": [3, 2, 1, 0]}
    stage, started = "forward", 0

    def begin(part: Tensor, group: Any) -> Slow:
        nonlocal started
        chunk = order[stage][started]
        log.append(f"{stage} {chunk} computed")
        reached[stage][started].set()
        after = reached[stage][started + 1]
        if started == 3:
            after.set()  # nothing comes after the last one
        started += 1
        return Slow(log, chunk, after, part, group)

    plain, projection.begin_sum = projection.begin_sum, begin
    try:
        out = overlapped_attention(
            x,
            lambda piece, at: projected(piece, w, at),
            Window(9),
            w[3],
            rows=16,
            heads=head_range(dist.get_rank(), 2, num_heads=4, num_kv_heads=2),
        )
        summed = list(log)
        stage, started = "backward", 0
        out.sum().backward()
    finally:
        projection.begin_sum = plain
    return {"forward": summed, "backward": log[len(summed) :]}


def everything() -> dict[str, Any]:
    sizes = [(16, None), (16, 3), (7, 30), (1000, None), (70, 70)]
    errors = {f"rows {rows}, first {first}, layer {layer}": block(layer, rows, first) for rows, first in sizes for layer in range(3)}
    errors |= {f"from q, k, v; {past} before, layer {layer}": tail(layer, past) for past in (0, 37) for layer in range(3)}
    return {"errors": errors, "events": events(), "refused": refused()}


def refused() -> str:
    try:
        q = torch.zeros(1, 8, 4, 8)
        overlapped_projection(q, q, q, Window(4), torch.zeros(5, 32), rows=4, heads=s2attn.HeadRange(0, 4, 16, 16))
    except ValueError as raised:
        return str(raised)
    return "nothing was wrong"


@pytest.fixture(scope="module")
def ended() -> list[Ended]:
    return run_ranks(__file__, "everything", RANKS)


def test_outputs_and_gradients_are_those_of_one_process(ended: list[Ended]) -> None:
    for found in values(ended):
        assert {name: off for name, off in found["errors"].items() if not off < 1e-12} == {}


def test_sums_travel_while_other_rows_are_computed(ended: list[Ended]) -> None:
    """Chunk i cannot have been summed before chunk i + 1 was computed; whoever waited for it would never get there."""
    for found in values(ended):
        for stage, order in (("forward", [0, 1, 2, 3]), ("backward", [3, 2, 1, 0])):
            log = found["events"][stage]
            assert [line for line in log if line.endswith("computed")] == [f"{stage} {chunk} computed" for chunk in order]
            assert sorted(line for line in log if line.startswith("summed")) == [f"summed {chunk}" for chunk in range(4)]
            for now, after in pairwise(order):
                assert log.index(f"{stage} {after} computed") < log.index(f"summed {now}")


def test_a_group_of_another_size_is_refused(ended: list[Ended]) -> None:
    for found in values(ended):
        assert found["refused"] == "group must have 4 processes, each with its part of the 16 heads; got 2"


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_process_group_it_says_so() -> None:
    q = torch.zeros(1, 8, 4, 8)
    with pytest.raises(ValueError, match=r"group must be a process group; call torch.distributed"):
        overlapped_projection(q, q, q, Window(4), torch.zeros(5, 32), rows=4)


def test_chunks_cover_all_rows_once() -> None:
    for tokens in (1, 5, 64, 65):
        for rows in (1, 16, 100):
            for first in (None, 1, 7, 200):
                chunks = row_chunks(tokens, rows, first)
                assert [row for chunk in chunks for row in chunk] == list(range(tokens))
                assert len(chunks[0]) == min(tokens, first or rows)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"pattern": 3}, TypeError, "pattern must be a Pattern"),
        ({"weight": torch.zeros(5)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(5, 3)}, ValueError, "weight must have 32 columns"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must be a tensor"),
        ({"causal": False}, ValueError, "options must be scale"),
        ({"rows": 0}, ValueError, "rows must be an integer >= 1"),
        ({"first": 0}, ValueError, "first must be an integer >= 1"),
        ({"k": torch.zeros(1, 3, 2, 8), "v": torch.zeros(1, 3, 2, 8)}, ValueError, "k must have as many tokens as q"),
        ({"q": torch.zeros(8, 4, 8)}, ValueError, "q, k and v must be tensors"),
    ],
)
@pytest.mark.usefixtures("group_of_one")
def test_what_cannot_be_right_is_refused(change: dict[str, Any], error: type[Exception], said: str) -> None:
    call: dict[str, Any] = {"q": torch.zeros(1, 8, 4, 8), "k": torch.zeros(1, 8, 2, 8), "v": torch.zeros(1, 8, 2, 8)}
    call |= {"pattern": Window(4), "weight": torch.zeros(5, 32), "rows": 4} | change
    with pytest.raises(error, match=said):
        overlapped_projection(**call)
    with pytest.raises(ValueError, match="x must have shape"):
        overlapped_attention(torch.zeros(1, 0, 5), lambda x, at: (x, x, x), Window(4), torch.zeros(5, 32), rows=4)


if __name__ == "__main__":
    run_here(globals())
