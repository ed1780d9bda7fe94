"""When vLLM's blocks may be given back, proved from token masks and without vLLM: what a later query reads is never gone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn import Dense, Local, Pattern, PerHead, Power, Recipe, Sink, Stride, Unsupported, Window
from s2attn.integrations.vllm import check_version
from s2attn.integrations.vllm.freeing import Lifetimes, Model, first_alike, last_reads
from s2attn.integrations.vllm.places import find_recipe, held_heads
from s2attn.layout import HeadRange
from tests.support import dense_mask
from tests.support.strategies import patterns

LONGEST = 200
HEADS, KV_HEADS = 4, 2


def model_of(recipe: Recipe | Pattern, layers: int = 2, longest: int = LONGEST) -> Model:
    return Model(Recipe.to_json(recipe if isinstance(recipe, Recipe) else Recipe(recipe)), layers, HEADS, KV_HEADS, longest)


def reads(pattern: Pattern, layer: int, size: int) -> np.ndarray:
    """Which query ``(LONGEST, blocks)`` reads a token of each block in any head, from the token mask."""
    seen = dense_mask(pattern, HEADS, KV_HEADS, LONGEST, LONGEST, layer=layer).any(0).numpy()
    return np.stack([seen[:, at : at + size].any(1) for at in range(0, LONGEST, size)], axis=1)


@given(pattern=patterns(), layer=st.integers(0, 1), size=st.sampled_from([16, 32, 48]))
@settings(max_examples=60)
def test_a_block_is_gone_exactly_when_nobody_will_read_or_write_it(pattern: Pattern, layer: int, size: int) -> None:
    lives, read = Lifetimes.of(model_of(pattern), layer, size), reads(pattern, layer, size)
    given_back: set[int] = set()
    before = 0
    for processed in sorted({0, 1, size - 1, size, 2 * size + 3, 100, LONGEST - 1, LONGEST}):
        new = set(lives.gone(processed, before).tolist())
        assert not new & given_back, "a block is given back once"
        given_back |= new
        before = processed
        later = read[processed:].any(0)
        written = (np.arange(read.shape[1]) + 1) * size <= processed
        assert given_back == set(np.flatnonzero(written & ~later).tolist())


@given(
    pattern=patterns(),
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    size=st.sampled_from([16, 32]),
    ahead=st.integers(0, 1),
)
@settings(max_examples=60)
def test_no_request_ever_holds_more_than_was_said(pattern: Pattern, steps: list[int], size: int, ahead: int) -> None:
    """In any steps, also when the next one is scheduled before the last one is processed."""
    lives = Lifetimes.of(model_of(pattern), 0, size)
    in_flight = max(a + (b if ahead else 0) for a, b in zip(steps, [*steps[1:], 0], strict=True))
    scheduled, begun = [0], 0
    for step in steps:
        gone = set(lives.gone(scheduled[-1 - ahead] if len(scheduled) > ahead else 0).tolist())
        begun = min(begun + step, LONGEST)
        scheduled.append(begun)
        held = set(range(-(-begun // size))) - gone
        assert len(held) <= lives.most_held(in_flight)


@given(pattern=patterns(), size=st.sampled_from([16, 32]), most=st.integers(0, 14), multiple=st.integers(1, 3), data=st.data())
@settings(max_examples=60)
def test_the_longest_hit_is_the_longest_that_lacks_nothing(
    pattern: Pattern, size: int, most: int, multiple: int, data: st.DataObject
) -> None:
    lives, read = Lifetimes.of(model_of(pattern), 0, size), reads(pattern, 0, size)
    blocks = read.shape[1]
    cached = data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks))
    asked: list[int] = []

    def is_cached(block: int) -> bool:
        asked.append(block)
        return cached[block]

    def goes_on(count: int) -> bool:
        later = read[count * size :].any(0)
        return count % multiple == 0 and all(cached[i] or not later[i] for i in range(count))

    assert lives.longest_hit(is_cached, most, multiple) == max(count for count in range(min(most, blocks) + 1) if goes_on(count))
    assert asked == list(range(len(asked)))


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 18, 33, 34, 35])
def test_what_is_needed_behind_a_hit_is_exact_to_the_token(tokens: int, size: int) -> None:
    """With windows of 2, 18 and 34 tokens the last query that reads a block is the first one behind a hit."""
    pattern = Window(tokens)
    lives, read = Lifetimes.of(model_of(pattern), 0, size), reads(pattern, 0, size)
    for count in range(LONGEST // size):
        assert lives.needed(count).tolist() == read[count * size :].any(0)[:count].tolist()
        # What is needed, and nothing else, must be cached for the hit.
        assert lives.longest_hit(lives.needed(count).tolist().__getitem__, count, 1) == count
        for lost in np.flatnonzero(lives.needed(count)):
            cached = np.ones(count, dtype=bool)
            cached[lost] = False
            assert lives.longest_hit(cached.tolist().__getitem__, count, 1) < count


def test_a_block_lives_as_long_as_the_head_that_needs_it_longest() -> None:
    """The price of one block table for all heads: heads with strides of their own free nothing together."""
    apart = Local(1, block=16) | Stride(2, block=16)
    assert Lifetimes.of(model_of(apart), 0, 16).most_held(1) == -(-LONGEST // 16)
    assert Lifetimes.of(model_of(Local(1, block=16) | Stride(2, offset=0, block=16)), 0, 16).most_held(1) == 7
    one_dense = PerHead({1: Dense()}, default=Window(20))
    assert Lifetimes.of(model_of(one_dense), 0, 16).most_held(1) == -(-LONGEST // 16)


def test_layers_that_read_alike_share_a_table() -> None:
    model = model_of(Recipe(Window(40), dense_layers=[1], layers={3: PerHead({0: Window(40)}, default=Window(12))}), layers=5)
    assert [first_alike(model, layer, 16) for layer in range(5)] == [0, 1, 0, 0, 0]
    model = model_of(Recipe(Window(40), dense_layers=[1], layers={3: Power(block=16)}), layers=5)
    assert [first_alike(model, layer, 16) for layer in range(5)] == [0, 1, 0, 3, 0]


def test_long_contexts() -> None:
    model = model_of(Recipe(Sink(64) | Window(4096), dense_layers=[0]), layers=32, longest=131072)
    dense, sparse = (Lifetimes.of(model, layer, 16) for layer in (0, 1))
    assert dense.most_held(8192) == 8192
    # Sink, window and tokens in flight; the window begins anywhere in a block.
    assert sparse.most_held(8192) == 4 + 4096 // 16 + 8192 // 16 + 1
    assert (last_reads(model, 16)[1] == last_reads(model, 16)[31]).all()


def test_block_sizes_are_multiples_of_16() -> None:
    with pytest.raises(ValueError, match="block_size must be a multiple of 16; got 8"):
        last_reads(model_of(Dense()), 8)


class Config:
    def __init__(self, recipe: object = None) -> None:
        if recipe is not None:
            self.s2_attention = recipe


def test_where_a_recipe_stands() -> None:
    assert find_recipe([Config("inner"), Config("outer")], None) == "inner"
    assert find_recipe([Config(), Config("outer")], {}) == "outer"
    assert find_recipe([Config()], {"s2_attention": "extra"}) == "extra"
    assert find_recipe([Config("same")], {"s2_attention": "same"}) == "same"
    with pytest.raises(ValueError, match="s2_attention must be the same in the model's configuration and in additional_config"):
        find_recipe([Config("one")], {"s2_attention": "other"})
    with pytest.raises(ValueError, match=r"s2_attention must hold a recipe .* got none"):
        find_recipe([Config(), Config()], {"other": 1})


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_hold_all_heads_once(ranks: int) -> None:
    """8 query heads over 2 KV heads; with 4 and 8 ranks, KV heads are copied."""
    held = [held_heads(rank, ranks, 8 // ranks, max(1, 2 // ranks), 2) for rank in range(ranks)]
    assert [head for part in held for head in part.query_heads] == list(range(8))
    assert {(part.num_heads, part.num_kv_heads) for part in held} == {(8, 2)}
    assert held_heads(0, 1, 8, 2, 2) == HeadRange(0, 8, 8, 2)


def test_layers_with_other_heads_are_refused() -> None:
    with pytest.raises(Unsupported, match="a layer has 4 KV heads on each of 2 ranks, the model 4"):
        held_heads(0, 2, 4, 4, 4)


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "1.0", "dev", "0.11.2"])
def test_versions_that_nobody_tested_are_refused(version: str) -> None:
    with pytest.raises(Unsupported, match=r"must be 0\.32 to 0\.33, the versions that were tested; got"):
        check_version(version)


def test_tested_versions_are_accepted() -> None:
    for version in ("0.32.0", "0.32.1+cpu", "0.33.0rc1", "0.33.2"):
        check_version(version)
