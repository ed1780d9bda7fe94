"""Drawing: which tokens may come, how often they do, and from which number."""

from __future__ import annotations

import math

import pytest
import torch

from s2attn.nn.sampling import Sampling, draw, per_text, uniform

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.0, -torch.inf])


def drawn(how: Sampling, count: int = 4000) -> torch.Tensor:
    """How often each token came, over ``count`` positions."""
    tokens = draw(LOGITS.expand(count, -1), [how] * count, range(count))
    return torch.bincount(torch.tensor(tokens), minlength=6) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    assert (drawn(Sampling(temperature=temperature)) - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_zero_temperature_takes_the_likeliest() -> None:
    assert drawn(Sampling()).tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.7}, {1, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_k": 2, "top_p": 0.99}, {1, 2}),
    ],
)
def test_only_the_likeliest_tokens_may_come(how: dict, left: set[int]) -> None:
    found = drawn(Sampling(temperature=1.0, **how))
    assert set(found.nonzero()[:, 0].tolist()) == left
    expected = torch.where(torch.isin(torch.arange(6), torch.tensor(sorted(left))), LOGITS, -torch.inf).softmax(0)
    assert (found - expected).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_a_number_belongs_to_its_seed_and_position() -> None:
    numbers = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(20)], dtype=torch.float64)
    assert len(numbers.unique()) == 4000 and numbers.min() >= 0 and numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.02
    assert [one.seed for one in per_text(Sampling(seed=4), 3)] == [4, 5, 6]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1; got 0"),
        ({"temperature": -1.0}, "temperature must be a number, 0 or more; got -1.0"),
        ({"temperature": math.nan}, "temperature must be a number, 0 or more; got nan"),
        ({"top_k": 0}, "top_k must be an integer >= 1; got 0"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1; got 0.0"),
        ({"top_p": "most"}, "top_p must be a number above 0 and at most 1; got most"),
        ({"stop": [-1]}, "stop must be an integer >= 0; got -1"),
        ({"seed": -1}, "seed must be an integer >= 0; got -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
