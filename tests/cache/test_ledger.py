"""Pages given out and taken back: exact against dense masks, references, copy on write, a full cache, and bytes at 128k."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn import Dense, HeadRange, Local, Pattern, PerHead, Power, Recipe, Stride, Window, build_layout, preset
from s2attn.cache import CacheFull, Ledger, page_needs, pages_needed
from s2attn.cache.ledger import GONE
from s2attn.layout import dense_pairs
from tests.support import dense_mask
from tests.support.strategies import patterns

LONGEST = 260


def make(pattern, *, heads=4, kv_heads=2, layers=2, page_size=16, num_pages=600, max_tokens=LONGEST) -> Ledger:
    needs = page_needs(pattern, HeadRange(0, heads, heads, kv_heads), kv_heads, layers, max_tokens, page_size)
    return Ledger(needs, page_size=page_size, num_pages=num_pages, max_tokens=max_tokens)


def check_references(ledger: Ledger) -> None:
    """P1: every page is free, or held by as many tables as its count says."""
    held = np.zeros(ledger.num_pages, int)
    for sequence in ledger.sequences:
        for layer in range(len(ledger.needs)):
            table = ledger.table(sequence, layer)
            np.add.at(held, table[table != GONE], 1)
    assert (held == ledger.references).all()
    assert ledger.used_pages == int((held > 0).sum())


def needed_pages(pattern: Pattern, length: int, layer: int, heads: int, kv_heads: int, page_size: int) -> np.ndarray:
    """Pages ``(kv_heads, pages)`` that have begun and of which a query from ``length`` on reads a token, from the token mask."""
    mask = dense_mask(pattern, heads, kv_heads, LONGEST, LONGEST, layer=layer).numpy()
    read = mask[:, length:].any(1).reshape(kv_heads, heads // kv_heads, LONGEST).any(1)  # (kv_heads, tokens)
    ends = range(0, length, page_size)
    return np.stack([read[:, at : at + page_size].any(1) for at in ends], axis=1) if length else np.zeros((kv_heads, 0), bool)


@settings(max_examples=60)
@given(patterns(), st.sampled_from([(1, 1), (4, 2), (6, 3)]), st.sampled_from([16, 32, 48]), st.lists(st.integers(0, 70), max_size=8))
def test_exactly_the_pages_stay_that_a_later_query_reads(pattern, group, page_size, steps) -> None:
    ledger = make(pattern, heads=group[0], kv_heads=group[1], page_size=page_size)
    sequence = ledger.open()
    for tokens in steps:
        begin = ledger.length(sequence)
        tokens = min(tokens, LONGEST - begin)
        for layer in range(2):
            (room,) = ledger.reserve(layer, [(sequence, tokens)])
            mask = dense_mask(pattern, *group, tokens, begin + tokens, layer=layer).numpy()
            read = mask.any(1).reshape(group[1], group[0] // group[1], begin + tokens).any(1)
            table = ledger.table(sequence, layer)
            for head, key in np.argwhere(read):
                assert table[head, key // page_size] != GONE  # whatever the new queries read is there
            stored = room.slots != GONE
            assert (room.slots[stored] // page_size == table.T[np.arange(begin, begin + tokens) // page_size][stored]).all()
            ledger.trim(sequence, layer)
            needed = needed_pages(pattern, begin + tokens, layer, *group, page_size)
            now = ledger.table(sequence, layer) != GONE
            assert (now[:, : needed.shape[1]] == needed).all() and not now[:, needed.shape[1] :].any()
        check_references(ledger)
    ledger.close(sequence)
    assert ledger.used_pages == 0


def test_pages_live_from_their_first_query_to_their_last() -> None:
    """Each query sees itself alone: a page lives while it fills, and the 257th token has a page for one step."""
    ledger = make(Window(1), layers=1, kv_heads=1, heads=1, max_tokens=257)
    sequence = ledger.open()
    for length in range(1, 258):
        (room,) = ledger.reserve(0, [(sequence, 1)])
        assert room.slots.item() != GONE
        ledger.trim(sequence)
        assert ledger.used_pages == (length % 16 > 0 and length < 257)


@settings(max_examples=60)
@given(st.data(), st.sampled_from([Dense(), Window(20), Local(2, 16) | Stride(3, block=16), Power(block=16)]))
def test_any_order_of_calls_keeps_the_books(data, pattern) -> None:
    """Open, append, fork, trim, free, at random, in a pool that is often full."""
    ledger, model = make(pattern, num_pages=30, layers=1), {}
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["open", "append", "append", "append", "fork", "trim", "free"]))
        if what == "open" or not model:
            model[ledger.open()] = 0
            continue
        some = data.draw(st.lists(st.sampled_from(sorted(model)), min_size=1, unique=True))
        if what == "append":
            wanted = [(sequence, data.draw(st.integers(0, 40))) for sequence in some]
            wanted = [(sequence, min(count, LONGEST - model[sequence])) for sequence, count in wanted]
            try:
                rooms = ledger.reserve(0, wanted)
            except CacheFull:
                assert [ledger.length(sequence) for sequence in model] == list(model.values())
            else:
                model.update({sequence: model[sequence] + count for sequence, count in wanted})
                written = np.concatenate([room.slots[room.slots != GONE] for room in rooms])
                assert len(np.unique(written)) == len(written)
                assert (ledger.references[written // ledger.page_size] == 1).all()  # P3
        elif what == "fork":
            model[ledger.fork(some[0])] = model[some[0]]
        elif what == "trim":
            ledger.trim(some[0])
        else:
            ledger.close(some[0])
            del model[some[0]]
        check_references(ledger)
        assert {sequence: ledger.length(sequence) for sequence in ledger.sequences} == model


@settings(max_examples=40)
@given(patterns(), st.sampled_from([16, 32]), st.integers(0, 40), st.data())
def test_what_is_held_serves_the_queries_before(pattern, page_size, hold, data) -> None:
    """P2 with ``hold``: after any steps and roll-backs, the pages are those of every query from ``length - hold`` on."""
    ledger = make(pattern, page_size=page_size)
    ledger.hold = hold
    sequence = ledger.open()
    for tokens in data.draw(st.lists(st.integers(1, 50), max_size=8)):
        ledger.reserve_step([(sequence, min(tokens, LONGEST - ledger.length(sequence)))])
        ledger.trim(sequence)
        back = data.draw(st.integers(0, min(hold, ledger.length(sequence))))
        ledger.rollback(sequence, back)
        length = ledger.length(sequence)
        for layer in range(2):
            held = ledger.table(sequence, layer) != GONE
            needed = needed_pages(pattern, length, layer, 4, 2, page_size)
            assert (held[:, : needed.shape[1]] >= needed).all()
        check_references(ledger)


def test_a_fork_costs_nothing_until_it_writes_and_then_one_page_per_head() -> None:
    ledger = make(Dense(), layers=1)
    parent = ledger.open()
    ledger.reserve(0, [(parent, 40)])  # 3 pages of 2 heads, the last one half full
    child = ledger.fork(parent)
    assert ledger.used_pages == 6
    (room,) = ledger.reserve(0, [(child, 1)])
    assert ledger.used_pages == 8 and len(room.copies) == 2
    assert (ledger.table(child, 0)[:, :2] == ledger.table(parent, 0)[:, :2]).all()
    assert (ledger.table(child, 0)[:, 2] == room.copies[:, 1]).all() and (ledger.table(parent, 0)[:, 2] == room.copies[:, 0]).all()
    (room,) = ledger.reserve(0, [(parent, 1)])
    assert ledger.used_pages == 8 and not len(room.copies)


def test_forks_that_write_together_need_one_copy_less_than_they_are() -> None:
    ledger = make(Dense(), layers=1, kv_heads=1, heads=1, num_pages=3)
    first = ledger.open()
    ledger.reserve(0, [(first, 5)])
    forks = [first, ledger.fork(first), ledger.fork(first)]
    rooms = ledger.reserve(0, [(sequence, 1) for sequence in forks])
    assert ledger.used_pages == 3
    assert sorted(len(room.copies) for room in rooms) == [0, 1, 1]


def test_a_full_cache_changes_nothing_and_goes_on_after_room_is_made() -> None:
    ledger = make(Dense(), layers=1, kv_heads=1, heads=1, num_pages=4)
    a, b = ledger.open(), ledger.open()
    ledger.reserve(0, [(a, 30), (b, 20)])
    with pytest.raises(CacheFull, match="the cache is full: 1 new pages are needed, 0 of 4 are free"):
        ledger.reserve(0, [(a, 1), (b, 13)])
    assert (ledger.length(a), ledger.length(b)) == (30, 20)
    ledger.close(a)
    ledger.reserve(0, [(b, 13)])
    assert ledger.length(b) == 33
    check_references(ledger)


def test_pages_that_are_dead_make_room_without_being_asked() -> None:
    ledger = make(Window(16), layers=1, kv_heads=1, heads=1, num_pages=3, max_tokens=LONGEST)
    sequence = ledger.open()
    for _ in range(LONGEST // 10):
        ledger.reserve(0, [(sequence, 10)])
    assert ledger.used_pages <= 3


@settings(max_examples=60)
@given(patterns(), st.integers(1, 70), st.sampled_from([16, 48]), st.data())
def test_the_pages_that_are_said_to_be_needed_are_enough(pattern, chunk, page_size, data) -> None:
    """Steps of any lengths up to ``chunk``, with and without trimming between the layers."""
    shape = {"num_kv_heads": 2, "num_heads": 4, "num_layers": 2, "page_size": page_size}
    enough = pages_needed(pattern, tokens=LONGEST, chunk=chunk, **shape)
    ledger = make(pattern, page_size=page_size, num_pages=enough)
    sequence, trim = ledger.open(), data.draw(st.booleans())
    while ledger.length(sequence) < LONGEST:
        step = min(data.draw(st.integers(1, chunk)), LONGEST - ledger.length(sequence))
        for layer in range(2):
            ledger.reserve(layer, [(sequence, step)])
            if trim:
                ledger.trim(sequence, layer)
    assert enough <= make(pattern, page_size=page_size).needs.size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.reserve(2, [(0, 1)]), r"layer must be below num_layers \(2\); got 2"),
        (lambda x: x.reserve(0, [(7, 1)]), "sequence must be one that is open in this cache; got 7"),
        (lambda x: x.reserve(0, [(0, 1), (0, 1)]), "sequences must not repeat"),
        (lambda x: x.reserve(0, [(0, LONGEST + 1)]), r"tokens must not make sequence 0 longer than max_tokens \(260\); got 261"),
        (lambda x: (x.reserve(1, [(0, 3)]), x.fork(0)), "sequence must have the same length in all layers to be forked"),
        (lambda x: (x.close(0), x.close(0)), "sequence must be one that is open"),
    ],
)
def test_wrong_calls_are_refused(call, message) -> None:
    ledger = make(Dense())
    ledger.open()
    with pytest.raises(ValueError, match=message):
        call(ledger)


PER_KV_HEAD = {
    "s2": preset("s2"),
    "s2 with few local blocks": preset("s2", local=4, stride=16),
    "streaming_llm": preset("streaming_llm"),
    "duo_attention": preset("duo_attention", retrieval_heads=[1]),
    "mixed": PerHead({0: Dense(), 1: Window(512)}, default=preset("s2")),
    "hybrid": Recipe(preset("s2"), dense_layers=[1]),
}


@pytest.mark.parametrize("name", sorted(PER_KV_HEAD))
def test_bytes_at_128k_follow_the_density(name) -> None:
    """At most 1.05 x density x dense, where density is over the causal pairs of the same 128k tokens."""
    given_pattern, seqlen, layers, kv_heads, heads, page = PER_KV_HEAD[name], 131072, 2, 8, 32, 64
    ledger = make(given_pattern, heads=heads, kv_heads=kv_heads, layers=layers, page_size=page, num_pages=60_000, max_tokens=seqlen + 8192)
    sequence = ledger.open()
    for _ in range(seqlen // 8192):
        for layer in range(layers):
            ledger.reserve(layer, [(sequence, 8192)])
            ledger.trim(sequence, layer)
    of_layer = [given_pattern.pattern(i) if isinstance(given_pattern, Recipe) else given_pattern for i in range(layers)]
    layouts = [build_layout(pattern, heads, kv_heads, seqlen, layer=i) for i, pattern in enumerate(of_layer)]
    density = np.mean([float(layout.pairs.double().mean()) / dense_pairs(layout) for layout in layouts])
    dense_pages = layers * kv_heads * seqlen // page
    assert ledger.used_pages <= 1.05 * density * dense_pages
    assert ledger.used_pages > 0
