"""Nothing of a call stays in the cache that it was given when the call ends early, whatever ended it."""

from __future__ import annotations

import pytest
import torch

from s2attn import Sampling, SparseCache, generate, stream
from s2attn.lab.model import LanguageModel, ModelConfig

PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig()).eval()


class Failing:
    """A model that raises at its n-th call."""

    def __init__(self, model: LanguageModel, calls: int, error: BaseException) -> None:
        self.model, self.calls, self.error = model, calls, error

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return self.model(tokens)


def is_empty(cache: SparseCache) -> bool:
    return not cache.ledger.sequences and cache.bytes_used == 0 and not cache.texts


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt("mine")])
def test_an_error_of_the_model_frees_what_the_call_opened(model: LanguageModel, calls: int, error: BaseException) -> None:
    cache = SparseCache.for_model(model, max_tokens=60, sequences=3)
    with pytest.raises(type(error), match="mine"):
        generate(Failing(model, calls, error), PROMPTS, Sampling(9), cache=cache)
    assert is_empty(cache)
    mine = cache.open()
    with pytest.raises(type(error), match="mine"):
        generate(Failing(model, calls, error), PROMPTS[:1], Sampling(9), cache=cache, sequences=[mine])
    assert cache.ledger.sequences == [mine] and len(cache.tokens(mine)) == (calls and 2 + calls)


def test_a_stream_that_is_closed_or_never_begun_frees_what_it_opened(model: LanguageModel) -> None:
    cache = SparseCache.for_model(model, max_tokens=60, sequences=3)
    steps = stream(model, PROMPTS, Sampling(9), cache=cache)
    next(steps)
    steps.close()
    assert is_empty(cache)
    del steps
    stream(model, PROMPTS, Sampling(9), cache=cache)
    assert is_empty(cache)
    for step in stream(model, PROMPTS, Sampling(9), cache=cache):
        if len(cache.tokens(step[0].sequence)) > 5:
            break
    del step
    assert is_empty(cache)
    mine = cache.open()
    for _ in stream(model, PROMPTS[:1], Sampling(9), cache=cache, sequences=[mine]):
        break
    assert cache.ledger.sequences == [mine] and cache.tokens(mine) == PROMPTS[0]


def test_a_stream_that_ends_says_which_sequences_stay(model: LanguageModel) -> None:
    cache = SparseCache.for_model(model, max_tokens=60, sequences=2)
    *_, last = stream(model, PROMPTS, Sampling(9), cache=cache)
    assert [token.sequence for token in last] == cache.ledger.sequences
    assert [token.sequence for token in next(iter(stream(model, PROMPTS, Sampling(9))))] == [None, None]


def test_a_prompt_beyond_the_cache_is_named(model: LanguageModel) -> None:
    cache = SparseCache.for_model(model, max_tokens=4)
    with pytest.raises(ValueError, match=r"prompts\[0\] must have at most 4 tokens, max_tokens of the cache; got 8"):
        generate(model, [[1] * 8], Sampling(1), cache=cache)
