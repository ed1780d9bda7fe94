"""The room that a reservation asks for is the room that it takes, copies of shared pages included: to the page."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn import Dense, HeadRange, Window
from s2attn.cache import CacheFull, Ledger, page_needs


def grown(num_pages: int, pattern, lengths: list[int], forks: list[int]) -> Ledger:
    """Two heads in two layers; sequences of these lengths, and forks of them."""
    ledger = Ledger(page_needs(pattern, HeadRange(0, 2, 2, 2), 2, 2, 200, 16), page_size=16, num_pages=num_pages, max_tokens=200)
    for length in lengths:
        ledger.reserve_step([(ledger.open(), length)])
    for origin in forks:
        ledger.fork(origin % len(lengths))
    for sequence in ledger.sequences:
        ledger.trim(sequence)
    return ledger


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([Dense(), Window(20)]),
    st.lists(st.integers(0, 60), min_size=1, max_size=2),
    st.lists(st.integers(0, 1), max_size=4),
    st.lists(st.integers(0, 40), min_size=6, max_size=6),
    st.booleans(),
)
def test_a_pool_is_large_enough_exactly_when_it_has_the_pages_that_are_taken(pattern, lengths, forks, counts, all_layers) -> None:
    roomy = grown(500, pattern, lengths, forks)
    before = roomy.used_pages
    tokens = [(sequence, counts[i]) for i, sequence in enumerate(roomy.sequences)]

    def reserve(ledger: Ledger) -> None:
        ledger.reserve_step(tokens) if all_layers else ledger.reserve(1, tokens)

    reserve(roomy)
    taken, most = roomy.used_pages - before, max(before, grown(500, pattern, lengths, forks).most_pages)
    exact = grown(max(most, roomy.used_pages), pattern, lengths, forks)
    reserve(exact)
    assert exact.used_pages == roomy.used_pages
    if roomy.used_pages > most:
        short = grown(roomy.used_pages - 1, pattern, lengths, forks)
        with pytest.raises(CacheFull, match=f"the cache is full: {taken} new pages are needed, {taken - 1} of"):
            reserve(short)
        assert short.used_pages == before


def test_two_forks_of_three_that_write_need_two_copies() -> None:
    """The owner that does not write keeps the shared page, so that both writers need one of their own in each head and layer."""
    for num_pages, fits in ((12, True), (11, False)):
        ledger = grown(num_pages, Dense(), [5], [0, 0])
        assert ledger.used_pages == 4
        if fits:
            ledger.reserve_step([(1, 1), (2, 1)])
            assert ledger.used_pages == 12
        else:
            with pytest.raises(CacheFull, match="8 new pages are needed, 7 of 11 are free"):
                ledger.reserve_step([(1, 1), (2, 1)])
