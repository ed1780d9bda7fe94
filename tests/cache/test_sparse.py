"""`SparseCache` gives what attention over all keys gives: step by step, after evictions, forks and a full cache."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Dense, HeadRange, Local, Power, Recipe, SparseCache, Stride, Unsupported, Window, preset
from s2attn.cache import CacheFull
from s2attn.patterns import PRESETS

SMALL = {
    "s2": {"local": 2, "stride": 3, "block": 16},
    "phi3_small": {"local": 2, "stride": 3, "block": 16},
    "power_attention": {"sink": 16, "local": 2, "block": 16},
    "streaming_llm": {"sink": 3, "window": 40},
    "duo_attention": {"sink": 5, "window": 30},
    "longnet": {"segment": 2, "levels": 3, "block": 16},
    "longformer": {"window": 40, "global_tokens": 7},
    "bigbird": {"window": 3, "random": 2, "global_blocks": 2, "block": 16},
}
SHAPE = {"num_kv_heads": 2, "head_dim": 8, "page_size": 16, "dtype": torch.float32, "max_tokens": 512}
S2 = Local(2, 16) | Stride(3, block=16)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def poison(cache: SparseCache) -> None:
    """NaN in every page that is free: what was evicted can no longer help."""
    free = torch.from_numpy(cache.ledger.references == 0)
    cache._k[free] = torch.nan
    cache._v[free] = torch.nan


def tokens(batch: int, length: int, heads: int, kv_heads: int = 2):
    return torch.randn(batch, length, heads, 8), torch.randn(batch, length, kv_heads, 8), torch.randn(batch, length, kv_heads, 8)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("group", [1, 4])
def test_steps_of_any_length_equal_the_whole(name, group) -> None:
    """Chunks, then one token at a time, then several, in all layers, with everything that was evicted overwritten by NaN."""
    assert set(SMALL) == set(PRESETS)
    pattern, layers, heads = preset(name, **SMALL[name]), 2, 2 * group
    cache = SparseCache(pattern, num_pages=150, num_layers=layers, num_heads=heads, **SHAPE)
    sequence, steps = cache.open(), [70, 33, *[1] * 20, 2, 16, 5, 8, 64, *[1] * 9]
    data = [tokens(1, sum(steps), heads) for _ in range(layers)]
    whole = []
    for layer, (q, k, v) in enumerate(data):
        of_layer = pattern.pattern(layer) if isinstance(pattern, Recipe) else pattern
        whole.append(s2attn.attention(q, k, v, of_layer, layer=layer))
    at = 0
    for step in steps:
        for layer, call in enumerate(data):
            out = cache.attend([sequence], layer, *(x[:, at : at + step] for x in call))
            torch.testing.assert_close(out, whole[layer][:, at : at + step], atol=2e-6, rtol=2e-6)
            poison(cache)
        at += step
    assert cache.length(sequence) == at
    assert cache.bytes_used < cache.bytes_dense + 4 * 2 * cache.page_bytes
    cache.free(sequence)
    assert cache.bytes_used == cache.bytes_dense == 0


def test_a_batch_of_different_lengths_packed_and_forked() -> None:
    """Two prompts in one call, one of them forked twice, and the forks go different ways."""
    cache = SparseCache(S2, num_pages=120, num_heads=4, **SHAPE)
    a, b = cache.open(), cache.open()
    q, k, v = (x[0] for x in tokens(1, 130, 4))
    cu = torch.tensor([0, 47, 130])
    out, lse = cache.attend([a, b], 0, q, k, v, cu_seqlens_q=cu, return_lse=True)
    expected = s2attn.attention(q, k, v, S2, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True)
    torch.testing.assert_close((out, lse), expected, atol=2e-6, rtol=2e-6)
    before = cache.bytes_used
    forks = [b, cache.fork(b), cache.fork(b)]
    assert cache.bytes_used == before
    known = [(k[47:], v[47:]) for _ in forks]
    for _ in range(40):
        new_q, new_k, new_v = tokens(3, 1, 4)
        out = cache.attend(forks, 0, new_q, new_k, new_v)
        known = [(torch.cat([mine_k, x]), torch.cat([mine_v, y])) for (mine_k, mine_v), x, y in zip(known, new_k, new_v, strict=True)]
        poison(cache)
        for i, (mine_k, mine_v) in enumerate(known):
            alone = s2attn.attention(new_q[i : i + 1], mine_k[None], mine_v[None], S2)
            torch.testing.assert_close(out[i : i + 1], alone, atol=2e-6, rtol=2e-6)
    assert cache.bytes_used < cache.bytes_dense


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("group", [2, 16])
def test_every_row_of_forks_equals_its_prefill(name, group) -> None:
    """Chunks with evictions, then forks that go on with 1 to 16 tokens each, packed: each row is that of one call over all its keys."""
    pattern, heads = preset(name, **SMALL[name]), 2 * group
    pattern = pattern.pattern(0) if isinstance(pattern, Recipe) else pattern
    cache = SparseCache(pattern, num_pages=150, num_heads=heads, **SHAPE)
    sequences, known = [cache.open()], [tuple(torch.zeros(0, *shape) for shape in ((heads, 8), (2, 8), (2, 8)))]
    for lengths in ([70], [33], None, [1, 16, 5], [1, 1, 1], [7, 2, 13], None, [1] * 5, [16, 1, 3, 9, 2]):
        if lengths is None:  # two more that begin as the first one did
            sequences += [cache.fork(sequences[0]), cache.fork(sequences[0])]
            known += [known[0], known[0]]
            continue
        new = [tuple(x[0] for x in tokens(1, length, heads)) for length in lengths]
        known = [tuple(torch.cat(pair) for pair in zip(old, more, strict=True)) for old, more in zip(known, new, strict=True)]
        cu = torch.tensor([0, *lengths]).cumsum(0)
        out = cache.attend(sequences, 0, *(torch.cat(part) for part in zip(*new, strict=True)), cu_seqlens_q=cu)
        poison(cache)
        for i, length in enumerate(lengths):
            whole = s2attn.attention(*(x[None] for x in known[i]), pattern)[0, -length:]
            torch.testing.assert_close(out[cu[i] : cu[i + 1]], whole, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_forks_that_attend_to_their_prompt_together(name) -> None:
    """One call for the shared pages gives what a call without it gives, with evictions, in every step."""
    pattern, heads = preset(name, **SMALL[name]), 4
    pattern = pattern.pattern(0) if isinstance(pattern, Recipe) else pattern
    both = [SparseCache(pattern, num_pages=150, num_heads=heads, **SHAPE) for _ in range(2)]
    prompt, sequences = tokens(1, 150, heads), []
    for cache in both:
        parent = cache.open()
        cache.attend([parent], 0, *prompt)
        sequences = [parent, cache.fork(parent), cache.fork(parent)]
        cache.attend(sequences[1:2], 0, *(x[:, :7] for x in prompt))
    for length in (1, 1, 20, 1, 3):
        call = tokens(3, length, heads)
        outs = [cache.attend(sequences, 0, *call, cascade=cascade) for cache, cascade in zip(both, (False, True), strict=True)]
        torch.testing.assert_close(outs[1], outs[0], atol=2e-6, rtol=2e-6)
        for cache in both:
            poison(cache)


def test_a_full_cache_loses_nothing() -> None:
    cache = SparseCache(Dense(), num_pages=10, **SHAPE)
    a, b = cache.open(), cache.open()
    q, k, v = tokens(1, 50, 2)
    cache.attend([a], 0, *(x[:, :40] for x in (q, k, v)))  # 3 pages of each head
    cache.attend([b], 0, *(x[:, :20] for x in (q, k, v)))  # 2 of each
    rest = [x[:, 40:] for x in (q, k, v)]
    both = [torch.cat([x, x]) for x in rest]
    with pytest.raises(CacheFull, match="the cache is full: 2 new pages are needed, 0 of 10 are free"):
        cache.attend([a, b], 0, *both)
    assert (cache.length(a), cache.length(b)) == (40, 20)
    cache.free(b)
    out = cache.attend([a], 0, *rest)
    torch.testing.assert_close(out, s2attn.attention(q, k, v, Dense())[:, 40:], atol=2e-6, rtol=2e-6)


def test_a_refused_query_leaves_no_tokens_behind() -> None:
    cache = SparseCache(S2, num_pages=100, **SHAPE)
    sequence = cache.open()
    q, k, v = tokens(1, 60, 2)
    cache.attend([sequence], 0, *(x[:, :40] for x in (q, k, v)))
    used, rest = cache.bytes_used, [x[:, 40:] for x in (q, k, v)]
    with pytest.raises(ValueError, match="scale must be finite"):
        cache.attend([sequence], 0, *rest, scale=float("inf"))
    with pytest.raises(Unsupported, match="decode has no gradient"):
        cache.attend([sequence], 0, rest[0].clone().requires_grad_(), *rest[1:])
    assert cache.bytes_used == used and cache.length(sequence) == 40
    out = cache.attend([sequence], 0, *rest)
    torch.testing.assert_close(out, s2attn.attention(q, k, v, S2)[:, 40:], atol=2e-6, rtol=2e-6)


def test_bytes_say_what_a_pattern_costs() -> None:
    """A KV-efficient pattern keeps what the next query reads; another one holds pages back, and reports them."""
    for pattern, efficient in ((S2, True), (Window(40), True), (Dense(), True), (Power(block=16), False)):
        cache = SparseCache(pattern, num_pages=100, **SHAPE)
        sequence = cache.open()
        cache.attend([sequence], 0, *tokens(1, 256, 2))
        assert (cache.bytes_waiting == 0) == efficient
        assert cache.bytes_waiting < cache.bytes_used <= cache.bytes_dense
        assert cache.bytes_dense == 256 * 2 * (8 + 8) * 4
    assert cache.bytes_used == cache.bytes_dense  # each block is at a power of two from some query to come


def test_heads_of_one_rank_are_those_of_the_whole_model() -> None:
    q, k, v = tokens(1, 120, 8, 4)
    whole = s2attn.attention(q, k, v, S2)
    heads = HeadRange(4, 8, num_heads=8, num_kv_heads=4)
    cache = SparseCache(S2, num_pages=60, num_heads=4, heads=heads, **SHAPE)
    sequence = cache.open()
    for at in range(0, 120, 24):
        mine = (x[:, at : at + 24, half:] for x, half in ((q, 4), (k, 2), (v, 2)))
        out = cache.attend([sequence], 0, *mine)
        torch.testing.assert_close(out, whole[:, at : at + 24, 4:], atol=2e-6, rtol=2e-6)
        poison(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "local:16"}, "pattern must be a Pattern or a Recipe"),
        ({"page_size": 40}, "page_size must be a multiple of 16"),
        ({"page_size": 8}, "page_size must be an integer >= 16"),
        ({"num_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"num_pages": 0}, "num_pages must be an integer >= 1"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1"),
        ({"dtype": torch.int8}, r"dtype must be one of torch\.float64, .*; got torch\.int8"),
        ({"dtype": "float32"}, "dtype must be one of"),
        ({"dtype": torch.float8_e4m3fn}, "dtype must be one of"),
        ({"heads": HeadRange(0, 4, 8, 4)}, r"heads must name num_heads \(2\) heads"),
    ],
)
def test_bad_settings_are_refused(change, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SparseCache(**{"pattern": Dense(), "num_pages": 4, **SHAPE, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], 0, torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 4)), r"v must have shape \(batch, tokens, 2, 8\); got \(1, 3, 2, 4\)"),
        (([0], 0, torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 8)), "k must have shape"),
        (([0], 0, torch.ones(1, 3, 2, 8), torch.ones(1, 2, 2, 8)), "v must have shape"),
        (([0], 0, torch.ones(1, 3, 2, 8).half(), torch.ones(1, 3, 2, 8)), "k must have the dtype of the cache"),
        (([0], 1, torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8)), "layer must be below num_layers"),
        (([0, 1], 0, torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8)), "sequences must name one for each of the 1 of the batch; got 2"),
        (([9], 0, torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8)), "sequence must be one that is open"),
    ],
)
def test_bad_tokens_are_refused(arguments, message) -> None:
    cache = SparseCache(Dense(), num_pages=4, **SHAPE)
    cache.open()
    with pytest.raises((ValueError, TypeError), match=message):
        cache.append(*arguments)
    assert cache.bytes_used == 0
