"""Every change of a cache is whole or not made: an error or an interrupt at any call inside leaves the state before."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s2attn.cache
from s2attn import Dense, HostedCache, Local, Power, Recipe, Sink, SparseAttention, SparseCache, Stride, Window
from s2attn.cache import DynamicCache
from s2attn.cache.ledger import GONE, Ledger

FOLDER = str(Path(s2attn.cache.__file__).parent)
SHAPE = {"num_kv_heads": 2, "head_dim": 4, "page_size": 16, "num_layers": 2, "dtype": torch.float32, "max_tokens": 300, "hold": 3}
PATTERNS = [Window(20), Local(2, block=16) | Stride(3, block=16), Recipe(Sink(4) | Window(16), dense_layers=[1]), Power(block=16)]
LAYERS = 2
LATER = 10_000


class Interrupt(KeyboardInterrupt):
    """What is raised, so that no handler for errors catches it by chance."""


@contextmanager
def failing_at(call: int, error: type[BaseException]) -> Iterator[None]:
    """Raise at the call with this number of those that code in s2attn/cache makes or receives."""
    left = call

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        inside = frame.f_code.co_filename.startswith(FOLDER)
        back = frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(FOLDER)
        if frame.f_code.co_name == "__exit__":
            return  # the change is whole where this call fails
        if (event == "c_call" and inside) or (event == "call" and (inside or back)):
            left -= 1
            if left < 0:
                raise error  # Python stops to call this function then

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def kept(cache: SparseCache, pages: np.ndarray, tokens: int, page_size: int) -> list[list[torch.Tensor]]:
    """Keys and values of the tokens of a layer that are still there, by head."""
    found = []
    for head in pages:
        at = [int(head[i // page_size]) * page_size + i % page_size for i in range(tokens) if head[i // page_size] != GONE]
        for pool, host in zip(cache.pools, getattr(cache, "_host", cache.pools), strict=True):
            both = [pool.flatten(0, 1)[i] if i < len(pool) * page_size else host.flatten(0, 1)[i - cache.num_pages * page_size] for i in at]
            found.append(both)
    return found


def state(cache: SparseCache) -> dict[str, Any]:
    """All that later calls depend on."""
    if isinstance(cache, HostedCache):
        cache._arrive()
    ledger = cache.ledger
    contents, tables = {}, {}
    for sequence in ledger.sequences:
        for layer in range(LAYERS):
            table, length = ledger.table(sequence, layer), ledger.length(sequence, layer)
            tables[sequence, layer] = (length, table[table != GONE].tolist(), np.argwhere(table != GONE).tolist())
            contents[sequence, layer] = kept(cache, table, length, ledger.page_size)
    free = sorted([*ledger._free, *getattr(ledger, "_free_on_host", [])])
    texts = {sequence: list(text) for sequence, text in cache.texts.items()}
    books = (ledger.references.tolist(), free, ledger._next, ledger.most_pages, texts)
    return {"tables": tables, "books": books, "contents": contents}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*both) for both in zip(one, other, strict=True))
    return one == other


def step(cache: SparseCache, sequences: list[int], count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(9, (len(sequences), count), generator=generator)
    counts = [max(1, count - i) for i in range(len(sequences))]
    outs = []
    with cache.step(sequences, rows, counts):
        for layer in range(LAYERS):
            pattern = cache.pattern.pattern(layer) if isinstance(cache.pattern, Recipe) else cache.pattern
            module = SparseAttention(pattern, 2, 2, layer=layer)
            outs.append(module(*torch.randn(3, len(sequences), count, 2, 4, generator=generator)))
    return outs


def attend(cache: SparseCache, sequences: list[int], count: int, seed: int, layer: int = 1) -> torch.Tensor:
    q, k, v = torch.randn(3, len(sequences), count, 2, 4, generator=torch.Generator().manual_seed(seed))
    return cache.attend(sequences, layer, q, k, v)


def append(cache: SparseCache, sequences: list[int], count: int, seed: int) -> None:
    _, k, v = torch.randn(3, len(sequences), count, 2, 4, generator=torch.Generator().manual_seed(seed))
    cache.append(sequences, 0, k, v)


OPERATIONS: dict[str, Callable[[SparseCache], Any]] = {
    "open": lambda cache: cache.open(),
    "fork": lambda cache: cache.fork(1),
    "free": lambda cache: cache.free(1),
    "rollback": lambda cache: cache.rollback(2, 3),
    "trim": lambda cache: cache.trim(1),
    "append": lambda cache: append(cache, [0, 1, 2], 9, 5),
    "attend": lambda cache: attend(cache, [2, 0, 1], 21, 6),
    "step": lambda cache: step(cache, [1, 2, 0], 18, 7),
}


def filled(pattern: Any, hosted: bool, lengths: tuple[int, int]) -> SparseCache:
    """Three sequences in a cache that has to grow; the last two share pages."""
    if hosted:
        cache: SparseCache = HostedCache(pattern, num_pages=90, host_pages=90, spill=16, preallocate=False, **SHAPE)
    else:
        cache = SparseCache(pattern, num_pages=180, preallocate=False, **SHAPE)
    cache.open()
    cache.open()
    step(cache, [0, 1], lengths[0], 0)
    cache.fork(1)
    step(cache, [0, 2], lengths[1], 1)
    for sequence in range(3):
        cache.trim(sequence)
    return cache


def check(cache: SparseCache, name: str, call: int, error: type[BaseException]) -> bool:
    """Whether the operation ended before the call; if not, that nothing has changed and it can be repeated."""
    for sequence in cache.ledger.sequences if name != "trim" else ():
        cache.ledger.trim(sequence)
    before, other = state(cache), copy.deepcopy(cache)
    if name == "trim":
        for both in (cache, other):
            both.ledger.hold = 0
    try:
        with failing_at(call, error):
            OPERATIONS[name](cache)
    except error:
        pass
    else:
        return True
    assert same(state(cache), before), f"{name} after call {call}"
    assert same(OPERATIONS[name](cache), OPERATIONS[name](other))
    assert same(state(cache)["contents"], state(other)["contents"])
    assert cache.texts == other.texts and cache.bytes_used == other.bytes_used
    return False


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.booleans(),
    st.tuples(st.integers(3, 70), st.integers(3, 40)),
    st.sampled_from(sorted(OPERATIONS)),
    st.integers(0, 250),
    st.sampled_from([Interrupt, RuntimeError]),
)
def test_a_failure_at_any_call_changes_nothing(pattern, hosted, lengths, name, call, error) -> None:
    check(filled(pattern, hosted, lengths), name, call, error)


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_failure_at_each_call_changes_nothing(name: str, hosted: bool) -> None:
    cache = filled(PATTERNS[2], hosted, (40, 5))
    ended = [check(copy.deepcopy(cache), name, call, Interrupt) for call in [*range(0, 60, 5), *range(60, 900, 70), 900]]
    assert not ended[0]


@pytest.mark.parametrize("pattern", [Dense(), Window(20)])
def test_a_ledger_alone_changes_as_a_whole(pattern) -> None:
    cache = filled(pattern, False, (40, 5))
    changes: list[Callable[[Ledger], Any]] = [
        lambda ledger: ledger.reserve(0, [(0, 20), (1, 3), (2, 3)]),
        lambda ledger: ledger.reserve_step([(1, 30)]),
        lambda ledger: ledger.fork(0),
        lambda ledger: ledger.close(2),
        lambda ledger: ledger.rollback(0, 2),
    ]
    for change in changes:
        for call in range(LATER):
            ledger = copy.deepcopy(cache.ledger)
            tables = {(s, layer): ledger.table(s, layer).tolist() for s in ledger.sequences for layer in range(LAYERS)}
            before = ledger.references.tolist(), sorted(ledger._free), ledger.most_pages, ledger._next
            try:
                with failing_at(call, Interrupt):
                    change(ledger)
            except Interrupt:
                now = {(s, layer): ledger.table(s, layer).tolist() for s in ledger.sequences for layer in range(LAYERS)}
                for key, table in now.items():  # wider tables hold the same
                    assert [line[: len(old)] for line, old in zip(table, tables[key], strict=True)] == tables[key]
                assert before == (ledger.references.tolist(), sorted(ledger._free), ledger.most_pages, ledger._next)
            else:
                break


def test_a_plain_cache_changes_as_a_whole() -> None:
    k, v = torch.randn(2, 2, 9, 2, 4)
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(k[:, :5], v[:, :5], layer)
    changes = [
        lambda cache: cache.update(k[:, 5:], v[:, 5:], 0),
        lambda cache: cache.update(k, v, 2),
        lambda cache: cache.crop(2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0, 0])),
    ]
    for change in changes:
        for call in range(LATER):
            mine = copy.deepcopy(cache)
            try:
                with failing_at(call, Interrupt):
                    change(mine)
            except Interrupt:
                assert [mine.get_seq_length(layer) for layer in range(3)] == [5, 5, 0] and mine.bytes_used == cache.bytes_used
                for layer in range(LAYERS):
                    for found, right in zip(mine.update(k[:, 5:], v[:, 5:], layer), (k, v), strict=True):
                        assert torch.equal(found, right)
            else:
                break


def test_a_step_undoes_itself_and_nothing_else() -> None:
    """In the block another sequence is opened, and one is freed."""
    cache = filled(Window(20), False, (40, 5))
    with pytest.raises(Interrupt), cache.step([0], torch.zeros(1, 4, dtype=torch.int64)):
        other = cache.open()
        cache.free(2)
        raise Interrupt
    assert cache.ledger.sequences == [0, 1, other] and (cache.length(0), len(cache.tokens(0))) == (45, 45)


def test_pools_that_grow_in_inference_mode_serve_outside_of_it() -> None:
    cache, plain = SparseCache(Dense(), num_pages=200, preallocate=False, **SHAPE), DynamicCache()
    sequence = cache.open()
    k, v = torch.randn(2, 1, 150, 2, 4)
    with torch.inference_mode():
        attend(cache, [sequence], 150, 0)
        plain.update(k, v)
        plain.reorder_cache(torch.tensor([0, 0]))
    assert cache.bytes_allocated > 16 * cache.page_bytes
    attend(cache, [sequence], 3, 1)
    plain.update(*torch.randn(2, 2, 1, 2, 4))
