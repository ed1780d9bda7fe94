"""Host work of `decode` before a backend runs: constant per call, and no number read without need."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import s2attn
from s2attn import Dense, Layout, Local, Pattern, PerHead, Sink, Stride, Window, build_layout
from s2attn.backends import Backend, Pages, Requests, Scoring, registry
from tests.support import dense_mask
from tests.support.problems import random_mask

PAGE, HEADS, KV_HEADS, WIDTH = 16, 4, 2, 8
S2 = Local(2, 16) | Stride(3, block=16)


class ByPosition(Backend):
    """Takes layouts by position, keeps what it was given, and computes nothing."""

    name = "by-position"
    by_position = True

    def __init__(self) -> None:
        self.calls: list[tuple[Requests, Layout]] = []

    def objections(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        return ["it decodes only"]

    def paged_objections(self, q: Tensor, pages: Pages) -> list[str]:
        return []

    def forward(self, *call: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("only decode is called")

    def backward(self, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("only decode is called")

    def forward_paged(self, q: Tensor, pages: Pages, requests: Requests, layout: Layout, scoring: Scoring) -> tuple[Tensor, Tensor]:
        self.calls.append((requests, layout))
        return torch.zeros_like(q), q.new_zeros(1, q.shape[2], q.shape[1])


@pytest.fixture
def by_position(monkeypatch: pytest.MonkeyPatch) -> Iterator[ByPosition]:
    made = ByPosition()
    monkeypatch.setitem(registry._LOADERS, made.name, lambda: made)
    registry._load.cache_clear()
    yield made
    registry._load.cache_clear()


def one_sequence(tokens: int, room: int, pattern: Pattern | Layout = S2, **call: Any) -> Callable[[], Any]:
    pages = torch.zeros(2, room // PAGE, PAGE, KV_HEADS, WIDTH)
    table, q = torch.arange(room // PAGE, dtype=torch.int32)[None], torch.zeros(1, 1, HEADS, WIDTH)
    where: dict[str, Any] = {"block_table": table, "seq_lens": torch.tensor([tokens]), "backend": "by-position", **call}
    return lambda: s2attn.decode(q, *pages, pattern, **where)


def calls_made(what: Callable[[], Any]) -> int:
    """Calls of Python and C functions: a measure of host work that does not depend on the machine."""
    made = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        what()
    finally:
        sys.setprofile(before)
    return made


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("pattern", [S2, Dense(), Sink(4) | Window(100)], ids=repr)
def test_the_work_of_a_step_does_not_depend_on_the_length(by_position: ByPosition, pattern: Pattern, validate: bool) -> None:
    room = 1 << 13
    one_sequence(1, room, pattern, validate=validate)()  # builds the layout that serves all lengths
    work = {calls_made(one_sequence(tokens, room, pattern, validate=validate)) for tokens in (2, 3, 17, 64, 65, 1000, 5001, room)}
    assert len({layout for _, layout in by_position.calls}) == 1
    assert len(work) == 1 and max(work) < 200, work


def test_one_step_with_evicted_pages_does_constant_work(by_position: ByPosition) -> None:
    room = 1 << 13

    def step(tokens: int) -> int:
        table = torch.full((1, room // PAGE), -1, dtype=torch.int32)
        table[0, [0, *range((tokens - 100) // PAGE, -(-tokens // PAGE))]] = 3
        call = one_sequence(tokens, room, Sink(4) | Window(100), block_table=table)
        call()
        return calls_made(call)

    work = [step(tokens) for tokens in (200, 1000, 5001, room)]
    assert max(work) < 350 and max(work) - min(work) <= 4, work


def test_without_validation_no_number_is_read(by_position: ByPosition, monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = torch.full((1, 8), 10**6, dtype=torch.int32)
    call = one_sequence(-7, 128, block_table=garbage, validate=False)
    call()
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero", "cpu", "numpy", "unique", "max", "min"):
        monkeypatch.setattr(Tensor, name, lambda *given, name=name, **more: pytest.fail(f"{name} reads numbers"))
    call()
    monkeypatch.undo()
    requests, layout = by_position.calls[-1]
    assert not requests.checked and not layout.packed and layout.seqlen_k >= 128


def units_read(mask: Tensor, kv_heads: int) -> Tensor:
    """``(kv_heads, pages)``: whether some query of a mask ``(H, T, S)`` sees a key of the page."""
    room = -mask.shape[-1] % PAGE
    seen = torch.nn.functional.pad(mask, (0, room)).any(1).unflatten(-1, (-1, PAGE)).any(-1)
    return seen.unflatten(0, (kv_heads, -1)).any(1)


PATTERNS = [S2, Window(40) | Sink(3), PerHead({0: Window(9), 3: Dense()}, default=S2, heads="query"), Stride(2, block=32, offset=1)]


@pytest.mark.parametrize("backend", ["by-position", "auto"])
@pytest.mark.parametrize("pattern", [*PATTERNS, "random layout"], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_exactly_the_entries_that_are_read_must_name_pages(by_position: ByPosition, pattern: Any, per_head: bool, backend: str) -> None:
    """-1 or a page beyond the cache, in each entry in turn: refused if a query reads it, else accepted."""
    lengths, room = [(1, 100), (3, 37), (0, 50), (20, 64)], 7
    if pattern == "random layout":
        square = random_mask(2, 112, 112, 16, causal=True)
        made = Layout.from_dense(square, block=16)
        pattern = Layout(16, True, made.rows, made.tiles, made.q_spans, made.k_spans)
        masks = [square.repeat_interleave(2, 0)[:, m - n : m, :m] for n, m in lengths]
    else:
        masks = [dense_mask(pattern, HEADS, KV_HEADS, n, m) for n, m in lengths]
    q, pages = torch.zeros(24, HEADS, WIDTH), torch.zeros(2, 30, PAGE, KV_HEADS, WIDTH)
    shape = (4, KV_HEADS, room) if per_head else (4, room)
    table = torch.arange(28).view(4, 1, room).expand(4, KV_HEADS, room).clone() if per_head else torch.arange(28).view(shape)
    where = {"cu_seqlens_q": torch.tensor([0, 1, 4, 4, 24]), "seq_lens": torch.tensor([m for _, m in lengths]), "backend": backend}
    s2attn.decode(q, *pages, pattern, block_table=table, **where)
    for sequence, mask in enumerate(masks):
        read = units_read(mask, KV_HEADS) if mask.numel() else torch.zeros(KV_HEADS, 0, dtype=torch.bool)
        read = torch.nn.functional.pad(read, (0, room - read.shape[1]))
        for entry in range(room):
            for head in range(KV_HEADS if per_head else 1):
                broken = table.clone()
                broken[(sequence, head, entry) if per_head else (sequence, entry)] = [-1, 30][entry % 2]
                if bool(read[head, entry] if per_head else read[:, entry].any()):
                    with pytest.raises(ValueError, match=rf"block_table must name one of the 30 pages .* for sequence {sequence}, KV head"):
                        s2attn.decode(q, *pages, pattern, block_table=broken, **where)
                else:
                    s2attn.decode(q, *pages, pattern, block_table=broken, **where)


@pytest.mark.parametrize("packed", [False, True])
def test_one_list_for_all_heads_is_checked_in_the_table_of_each(by_position: ByPosition, packed: bool) -> None:
    cu = torch.tensor([0, 1]), torch.tensor([0, 100])
    layout = build_layout(S2, 1, 1, block=16, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1]) if packed else build_layout(S2, 1, 1, 112, block=16)
    table = torch.arange(7).expand(1, KV_HEADS, 7).clone()
    q, pages = torch.zeros(1, HEADS, WIDTH), torch.zeros(2, 7, PAGE, KV_HEADS, WIDTH)
    where = {"cu_seqlens_q": cu[0], "seq_lens": torch.tensor([100]), "backend": "by-position"}
    s2attn.decode(q, *pages, layout, block_table=table, **where)
    table[0, 1, 6] = 7
    with pytest.raises(ValueError, match="got 7 for sequence 0, KV head 1, entry 6"):
        s2attn.decode(q, *pages, layout, block_table=table, **where)
