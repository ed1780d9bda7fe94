"""Texts from models with `SparseAttention`: equal with and without a cache, alone and in company, at once and in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import s2attn
from s2attn import Dense, Local, Power, Recipe, Sampling, Sink, SparseAttention, SparseCache, Stride, Window
from s2attn.cache import CacheFull
from s2attn.lab.generate import cache_error
from s2attn.lab.generate import generate as write_bytes
from s2attn.lab.model import LanguageModel, ModelConfig
from s2attn.nn.generation import Generated, generate, stream

S2 = Local(2, block=16) | Stride(2, block=16)
SMALL = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48, recipe=Recipe(S2, dense_layers=[0]))


class Other(nn.Module):
    """A model unlike the lab's: learned positions, sinks, a soft-cap, values of their own width, float64."""

    def __init__(self, vocabulary: int = 50, longest: int = 200):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, 24), nn.Embedding(longest, 24)
        self.qkv = nn.ModuleList(nn.Linear(24, 4 * 8 + 2 * 8 + 2 * 6) for _ in range(3))
        patterns = [Sink(3) | Window(20), S2, Power(block=16)]
        self.attend = nn.ModuleList(SparseAttention(p, 4, 2, layer=i, sinks=True, softcap=5.0) for i, p in enumerate(patterns))
        self.out = nn.ModuleList(nn.Linear(4 * 6, 24) for _ in range(3))
        self.head = nn.Linear(24, vocabulary)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(s2attn.nn.positions(tokens))
        for qkv, attend, out in zip(self.qkv, self.attend, self.out, strict=True):
            q, k, v = qkv(x).split([32, 16, 12], dim=-1)
            x = x + out(attend(q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8)), v.unflatten(-1, (2, 6))).flatten(2))
        return self.head(x)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(SMALL).eval()


@pytest.fixture(scope="module")
def other() -> Other:
    torch.manual_seed(3)
    return Other().eval()


def tokens_of(length: int, seed: int = 0, vocabulary: int = 256) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def poison(cache: SparseCache) -> None:
    """NaN in every page that is free: what was evicted can no longer help."""
    free = torch.from_numpy(cache.ledger.references == 0)
    for pool in cache.pools:
        pool[free[: len(pool)]] = torch.nan


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """What the model writes without a cache, one whole run for each token."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("recipe", [Recipe(Dense()), SMALL.recipe, Recipe(Sink(4) | Window(40)), Recipe(Power(block=16))], ids=str)
def test_logits_equal_those_without_a_cache(recipe: Recipe) -> None:
    model = LanguageModel(SMALL.with_recipe(recipe)).eval()
    made = write_bytes(model, bytes(tokens_of(120)), Sampling(40, temperature=0.9), chunk=50)
    assert cache_error(model, made) < 1e-5


def test_any_module_writes_what_it_writes_without_a_cache(other: Other) -> None:
    prompt = tokens_of(70, vocabulary=50)
    expected = greedy(other, prompt, 60)
    assert len(set(expected)) > 3
    cache, new = SparseCache.for_model(other, max_tokens=140, chunk=16), []
    for (token,) in stream(other, [prompt], Sampling(60), chunk=16, cache=cache):
        new.append(token.token)
        poison(cache)
    assert new == expected
    assert cache.k_pages.dtype == torch.float64 and cache.v_pages.shape[-1] == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_does_not_depend_on_its_neighbours(other: Other, temperature: float) -> None:
    """Prompts of different lengths, each with its own end, together, alone, and in another order."""
    prompts = [tokens_of(length, seed=length, vocabulary=50) for length in (5, 61, 1, 33, 16)]
    how = [Sampling(count, temperature=temperature, top_k=20, top_p=0.95, seed=9 * count) for count in (20, 3, 31, 9, 1)]
    together = generate(other, prompts, how, chunk=16)
    assert [len(text.new) for text in together] == [20, 3, 31, 9, 1] and [text.prompt for text in together] == prompts
    assert together == [generate(other, [prompt], [one], chunk=7)[0] for prompt, one in zip(prompts, how, strict=True)]
    assert together[::-1] == generate(other, prompts[::-1], how[::-1])


def test_each_text_ends_at_its_own_stop_token(other: Other) -> None:
    prompts = [tokens_of(20, seed=i, vocabulary=50) for i in range(3)]
    long = generate(other, prompts, Sampling(30, temperature=1.5))
    stops = [text.new[place] for text, place in zip(long, (4, 11, 2), strict=True)]
    how = [Sampling(30, stop=[stop], temperature=1.5, seed=i) for i, stop in enumerate(stops)]
    short = generate(other, prompts, how)
    for text, whole, stop in zip(short, long, stops, strict=True):
        assert text.finish == "stop" and text.new == whole.new[: whole.new.index(stop) + 1]
    assert {text.finish for text in long} == {"length"}


def test_tokens_come_as_they_are_written(other: Other) -> None:
    prompts = [tokens_of(9, vocabulary=50), tokens_of(4, vocabulary=50)]
    how = [Sampling(2), Sampling(4)]
    steps = list(stream(other, prompts, how))
    assert [[token.text for token in step] for step in steps] == [[0, 1], [0, 1], [1], [1]]
    assert [token.finish for step in steps for token in step] == [None, None, "length", None, None, "length"]
    assert [step[-1].token for step in steps] == generate(other, prompts, how)[1].new
    assert all(int(token.logits.argmax()) == token.token for step in steps for token in step)


def test_four_thousand_tokens_with_eviction_equal_those_without() -> None:
    """Greedy bytes behind a long prompt, once with pages given back and once with everything kept."""
    config = SMALL.with_recipe(Recipe(Local(4, block=16) | Stride(8, block=16)))
    model, prompt, how = LanguageModel(config, seed=1).eval(), tokens_of(3840), Sampling(256)
    shape = {"num_layers": 2, "num_kv_heads": 2, "num_heads": 4, "head_dim": 8, "page_size": 16, "dtype": torch.float32}
    evicting = SparseCache.for_model(model, max_tokens=4096, chunk=64)
    keeping = SparseCache(Dense(), num_pages=1024, max_tokens=4096, **shape)
    sparse, kept = (generate(model, [prompt], how, chunk=64, cache=cache)[0] for cache in (evicting, keeping))
    assert sparse.new == kept.new and len(sparse.new) == 256
    assert len(set(sparse.new)) > 1
    assert evicting.bytes_most < 0.35 * evicting.bytes_dense and evicting.bytes_waiting == 0
    assert keeping.bytes_used >= keeping.bytes_dense == evicting.bytes_dense


def test_a_text_goes_on_from_its_cache(other: Other) -> None:
    """What was written and what follows later is what one call writes, seeds included; forks go their own ways."""
    prompt, how = tokens_of(40, vocabulary=50), Sampling(30, temperature=1.0, seed=5)
    (whole,) = generate(other, [prompt], how)
    cache = SparseCache.for_model(other, max_tokens=80, sequences=3)
    (first,) = generate(other, [prompt], Sampling(12, temperature=1.0, seed=5), cache=cache)
    assert cache.tokens(first.sequence) == first.tokens[:-1]
    forks = [cache.fork(first.sequence), cache.fork(first.sequence)]
    more = [Sampling(18, temperature=1.0, seed=5), Sampling(18, temperature=1.0, seed=6)]
    second, third = generate(other, [first.tokens, first.tokens], more, cache=cache, sequences=forks)
    assert first.new + second.new == whole.new
    assert third.new != second.new
    assert cache.length(first.sequence) == 51 and cache.length(forks[0]) == 69


def test_forks_that_read_their_prompt_together_write_what_each_writes(other: Other) -> None:
    """A cascade over sequences of different lengths, some of which end early."""
    prompt, ends = tokens_of(100, vocabulary=50), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    how = [Sampling(count, temperature=1.0, seed=count) for count in (30, 9, 20)]
    alone = generate(other, [prompt + end for end in ends], how)
    cache = SparseCache.for_model(other, max_tokens=140, sequences=3)
    (first,) = generate(other, [prompt], Sampling(1), cache=cache)
    sequences = [cache.fork(first.sequence) for _ in ends]
    together = generate(other, [prompt + end for end in ends], how, cache=cache, sequences=sequences, cascade=True)
    assert [text.new for text in together] == [text.new for text in alone]


def test_a_stream_that_is_left_can_be_taken_up(model: LanguageModel) -> None:
    prompt = tokens_of(30)
    (whole,) = generate(model, [prompt], Sampling(12))
    cache, new = SparseCache.for_model(model, max_tokens=50), []
    sequence = cache.open()
    for (token,) in stream(model, [prompt], Sampling(12), cache=cache, sequences=[sequence]):
        new.append(token.token)
        if len(new) == 5:
            break
    (rest,) = generate(model, [prompt + new], Sampling(7), cache=cache, sequences=[sequence])
    assert new + rest.new == whole.new and rest.sequence == sequence


def test_a_sequence_that_holds_the_whole_text_reads_its_last_token_again(model: LanguageModel) -> None:
    prompt = tokens_of(48)
    (whole,) = generate(model, [prompt], Sampling(12))
    cache = SparseCache.for_model(model, max_tokens=60, hold=1)
    sequence, rows = cache.open(), torch.tensor([prompt])
    with torch.no_grad(), cache.step([sequence], rows):
        model(rows)
    (text,) = generate(model, [prompt], Sampling(12), cache=cache, sequences=[sequence])
    assert text.new == whole.new and cache.tokens(sequence) == text.tokens[:-1]


def test_a_full_cache_loses_nothing(model: LanguageModel) -> None:
    prompts, how = [tokens_of(40, seed=i) for i in range(2)], Sampling(60)
    whole = generate(model, prompts, how)
    other = tokens_of(50, seed=7)
    cache = SparseCache.for_model(model, max_tokens=100, num_pages=48)
    blocker = generate(model, [other], Sampling(2), cache=cache)[0].sequence
    with pytest.raises(CacheFull, match="the cache is full: ") as full:
        generate(model, prompts, how, cache=cache)
    parts: list[Generated] = full.value.texts
    assert all(part.finish is None and 0 < len(part.new) < 60 for part in parts)
    assert [cache.tokens(part.sequence) for part in parts] == [part.tokens[:-1] for part in parts]
    cache.free(blocker)
    texts, sequences = [part.tokens for part in parts], [part.sequence for part in parts]
    rest = generate(model, texts, [Sampling(60 - len(part.new)) for part in parts], cache=cache, sequences=sequences)
    assert [text.tokens for text in rest] == [text.tokens for text in whole]


@pytest.mark.parametrize("hold", [3, 17])
def test_rejected_drafts_leave_no_trace(other: Other, hold: int) -> None:
    """Greedy text with drafts, most of them wrong, of which the model takes what it would have written itself."""
    prompt, generator = tokens_of(37, vocabulary=50), torch.Generator().manual_seed(hold)
    expected = greedy(other, prompt, 90)
    cache = SparseCache.for_model(other, max_tokens=150, hold=hold)
    sequence, new, rejected = cache.open(), [], 0
    fed, text = 0, list(prompt)
    while len(new) < 90:
        count = int(torch.randint(hold + 1, (), generator=generator))
        right = int(torch.randint(count + 1, (), generator=generator))
        draft = expected[len(new) + 1 : len(new) + 1 + right] + tokens_of(count - right, seed=len(new), vocabulary=50) if new else []
        piece = torch.tensor([text[fed:] + draft])
        with torch.no_grad(), cache.step([sequence], piece):
            says = other(piece)[0].argmax(-1).tolist()[-len(draft) - 1 :]
        taken = next((i for i, (mine, drafted) in enumerate(zip(says, draft, strict=False)) if mine != drafted), len(draft))
        cache.rollback(sequence, len(draft) - taken)
        poison(cache)
        rejected += len(draft) - taken
        new += says[: taken + 1]
        fed, text = len(text) + taken, text + says[: taken + 1]
        assert cache.tokens(sequence) == text[:fed]
    assert new[:90] == expected and rejected > 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], Sampling()), r"prompts must be a list of one or more texts, each a list of tokens; got \[\]"),
        (("text", Sampling()), "prompts must be a list of one or more texts"),
        (([[1], []], Sampling()), r"prompts\[1\] must hold one or more tokens, as integers; got \[\]"),
        (([["a"]], Sampling()), r"prompts\[0\] must be an integer >= 0"),
        (([torch.ones(3)], Sampling()), r"prompts\[0\] must hold one or more tokens, as integers"),
        (([[1]], [Sampling(), Sampling()]), "sampling must be one, or one for each of the 1 prompts; got 2"),
        (([[1]], [3]), "sampling must be a Sampling, or one for each prompt"),
    ],
)
def test_bad_calls_are_refused_before_the_model_runs(arguments, message) -> None:
    for call in (generate, stream):
        with pytest.raises((ValueError, TypeError), match=message):
            call(lambda tokens: 1 / 0, *arguments)


def test_bad_caches_are_refused(model: LanguageModel) -> None:
    cache = SparseCache.for_model(model, max_tokens=60)
    with pytest.raises(ValueError, match="sequences must be left out where no cache is given"):
        stream(model, [[1]], sequences=[0])
    with pytest.raises(TypeError, match="cache must be a SparseCache; got int"):
        stream(model, [[1]], Sampling(2), cache=3)
    with pytest.raises(ValueError, match="sequences must be 2 different ones, one for each prompt"):
        stream(model, [[1], [2]], Sampling(2), cache=cache, sequences=[cache.open()])
    with pytest.raises(ValueError, match=r"max_new_tokens must be at most 57 for prompts\[1\], by max_tokens of the cache \(60\); got 58"):
        stream(model, [[1], [1, 2, 3, 4]], Sampling(58), cache=cache)
    (text,) = generate(model, [[1, 2, 3]], Sampling(2), cache=cache)
    for prompt in ([1, 2, 3], [1, 2, 4, 5, 6]):
        with pytest.raises(ValueError, match=r"prompts\[0\] must begin with the 4 tokens that sequence 1 of the cache holds; got "):
            stream(model, [prompt], Sampling(2), cache=cache, sequences=[text.sequence])


def test_a_model_with_other_results_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"model must return logits of shape \(1, 1, vocabulary\); got \(1, 256\)"):
        generate(lambda tokens: model(tokens)[:, -1], [[1]])
    with pytest.raises(ValueError, match="logits must hold no NaN"):
        generate(lambda tokens: model(tokens) * torch.nan, [[1]])


def test_a_compiled_model_writes_the_same() -> None:
    torch.compiler.reset()
    model = LanguageModel(ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, recipe=Recipe(S2))).eval()
    graphs = CompileCounter()
    compiled, made = torch.compile(model, backend=graphs, dynamic=True), []
    for count in (4, 20):
        assert generate(compiled, [tokens_of(20)], Sampling(count)) == generate(model, [tokens_of(20)], Sampling(count))
        made.append(graphs.frame_count)
    assert made[0] == made[1]  # new tokens need no new graphs
    torch.compiler.reset()
