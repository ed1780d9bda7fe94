"""Drawing for many rows together: against a plain reference, row by row, and the amount that is sorted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.nn.sampling import Sampling, draw, uniform


def allowed_shares(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """Probability of each token, in float64 numpy: the definition of top_k and then top_p, ties to the lowest token."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    scaled = logits[order].astype(np.float64) / how.temperature
    kept = np.arange(len(logits)) < (len(logits) if how.top_k is None else how.top_k)
    shares = np.where(kept, np.exp(scaled - scaled[0]), 0.0)
    shares /= shares.sum()
    if how.top_p is not None:
        shares = np.where(np.cumsum(shares) - shares < how.top_p, shares, 0.0)
        shares /= shares.sum()
    found = np.zeros(len(logits))
    found[order] = shares
    return found


def rows() -> st.SearchStrategy[Sampling]:
    return st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        top_k=st.none() | st.sampled_from([1, 3, 50, 5000]),
        top_p=st.none() | st.sampled_from([0.05, 0.5, 0.9, 0.999]),
        seed=st.integers(0, 3),
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=6), st.sampled_from([7, 700, 3000]), st.integers(0, 9), st.booleans())
def test_a_row_is_drawn_as_alone_and_never_outside_of_what_it_may_take(how, vocabulary, seed, ties) -> None:
    logits = 4 * torch.randn(len(how), vocabulary, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if ties else logits
    positions = list(range(len(how)))
    together = draw(logits, how, positions)
    assert together == [draw(logits[i : i + 1], how[i : i + 1], [i])[0] for i in positions]
    for token, one, row in zip(together, how, logits.numpy(), strict=True):
        if one.temperature:
            assert allowed_shares(row, one)[token] > 0
        else:
            assert row[token] == row.max()


@pytest.mark.parametrize("how", [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8}, {"top_p": 0.9999}])
def test_frequencies_are_those_of_the_reference(how: dict) -> None:
    """Kolmogorov-Smirnov distance of 20,000 draws from 600 tokens with many ties; 1.63 / sqrt(n) is its 99 % quantile."""
    count = 20_000
    logits = (torch.randn(600, generator=torch.Generator().manual_seed(0)) * 4).round() / 2
    one = Sampling(temperature=0.9, **how)
    found = [draw(logits.expand(2000, -1), [one] * 2000, range(at, at + 2000)) for at in range(0, count, 2000)]
    frequency = np.bincount(np.concatenate(found), minlength=600) / count
    expected = allowed_shares(logits.numpy(), one)
    assert np.abs(np.cumsum(frequency) - np.cumsum(expected)).max() < 1.63 / np.sqrt(count)
    assert not frequency[expected == 0].any()


@pytest.mark.parametrize(("how", "most"), [({"top_k": 50}, 50), ({"top_k": 50, "top_p": 0.9}, 50), ({"top_p": 0.9}, 2048), ({}, 0)])
def test_the_vocabulary_is_not_sorted(how: dict, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_tokens: list[int] = []
    for name in ("sort", "argsort"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *a, m=method, **k: (sorted_tokens.append(x.shape[-1]), m(x, *a, **k))[1])
    logits = 3 * torch.randn(4, 128_000, generator=torch.Generator().manual_seed(0))
    draw(logits, [Sampling(temperature=0.7, **how)] * 4, range(4))
    assert max(sorted_tokens, default=0) <= most


def test_extreme_numbers_pick_a_token_that_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest number below 1 meets tokens of probability 0 at the end of the vocabulary."""
    monkeypatch.setattr("s2attn.nn.sampling.uniform", lambda *_: 1.0 - 2.0**-53)
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    for how in ({}, {"top_k": 4}, {"top_p": 1.0}, {"top_k": 3, "top_p": 0.99}):
        assert draw(logits, [Sampling(temperature=1.0, **how)], [0])[0] in (0, 1)


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 80.0, 79.0]])
    for how in ({}, {"top_k": 2}, {"top_p": 0.9}):
        assert draw(logits, [Sampling(temperature=1e-30, **how)], [0]) == [1]


def test_logits_that_cannot_be_drawn_from_are_refused() -> None:
    for value, message in ((torch.nan, "logits must hold no NaN"), (torch.inf, "must have a finite largest"), (-torch.inf, "must have")):
        with pytest.raises(ValueError, match=message):
            draw(torch.full((1, 4), value), [Sampling(temperature=1.0)], [0])
    assert 0 <= uniform(0, 0) < 1
