"""A whole model's step: all layers or none, padding, what may be taken back, and what is refused."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Dense, Local, Power, Recipe, SparseAttention, SparseCache, Stride, Unsupported, Window, XAttention
from s2attn.cache import CacheFull

S2 = Local(2, 16) | Stride(3, block=16)
SHAPE = {"num_kv_heads": 2, "num_heads": 4, "head_dim": 8, "page_size": 16, "dtype": torch.float32, "num_layers": 2, "max_tokens": 400}
LAYERS = [SparseAttention(pattern, 4, 2, layer=i) for i, pattern in enumerate([Dense(), S2])]


def new_cache(num_pages: int = 300, pattern=None, **more) -> SparseCache:
    return SparseCache(pattern or Recipe(S2, dense_layers=[0]), num_pages=num_pages, **{**SHAPE, **more})


def qkv(batch: int, length: int):
    return tuple(torch.randn(batch, length, heads, 8) for heads in (4, 2, 2))


def rows(*lengths: int) -> torch.Tensor:
    return torch.arange(len(lengths) * max(lengths)).reshape(len(lengths), max(lengths))


def test_padded_rows_give_what_each_gives_alone() -> None:
    cache, lengths, known = new_cache(), [[40, 7, 33], [1, 20, 3], [5, 5, 5]], [[], [], []]
    sequences = [cache.open() for _ in range(3)]
    for counts in lengths:
        tokens, calls = rows(*counts), [qkv(3, max(counts)) for _ in range(2)]
        with cache.step(sequences, tokens, counts):
            found = [layer(*call, return_lse=True) for layer, call in zip(LAYERS, calls, strict=True)]
            place = s2attn.nn.positions(tokens)
        for i, count in enumerate(counts):
            begin = cache.length(sequences[i]) - count
            assert place[i].tolist() == [begin + min(j, count - 1) for j in range(max(counts))]
            known[i].append([[x[i : i + 1, :count] for x in call[1:]] for call in calls])
            for layer, ((out, lse), call) in enumerate(zip(found, calls, strict=True)):
                k, v = (torch.cat([piece[layer][j] for piece in known[i]], dim=1) for j in (0, 1))
                alone = s2attn.attention(call[0][i : i + 1, :count], k, v, LAYERS[layer].pattern, layer=layer, return_lse=True)
                torch.testing.assert_close((out[i : i + 1, :count], lse[i : i + 1, :, :count]), alone, atol=2e-6, rtol=2e-6)
                assert (out[i, count:] == 0).all() and (lse[i, :, count:] == -torch.inf).all()
    assert cache.tokens(sequences[1]) == [*rows(40, 7, 33)[1, :7].tolist(), *rows(1, 20, 3)[1].tolist(), *rows(5, 5, 5)[1].tolist()]


def test_look_back_gives_the_tokens_before() -> None:
    cache = new_cache()
    sequences = [cache.open(), cache.open()]
    with cache.step(sequences, torch.tensor([[1, 2, 3], [4, 9, 9]]), [3, 1]):
        assert s2attn.nn.look_back(torch.tensor([[1, 2, 3], [4, 9, 9]]), 2).tolist() == [[0, 0, 1, 2, 3], [0, 0, 4, 9, 9]]
        [layer(*qkv(2, 3)) for layer in LAYERS]
    twin = cache.fork(sequences[1])
    with cache.step([twin, sequences[0]], torch.tensor([[5], [6]])) as step:
        assert s2attn.nn.look_back(torch.tensor([[5], [6]]), 2).tolist() == [[0, 4, 5], [2, 3, 6]]
        assert s2attn.nn.look_back(torch.tensor([[5], [6]]), 0).tolist() == [[5], [6]]
        assert step.starts == [1, 3]
        [layer(*qkv(2, 1)) for layer in LAYERS]
    assert cache.tokens(twin) == [4, 5] and cache.tokens(sequences[1]) == [4]


def test_whatever_goes_wrong_in_a_step_leaves_the_sequences_as_they_were() -> None:
    cache = new_cache()
    sequence = cache.open()
    with cache.step([sequence], rows(40)):
        [layer(*qkv(1, 40)) for layer in LAYERS]
    used, refused = cache.bytes_used, []
    with pytest.raises(ZeroDivisionError), cache.step([sequence], rows(30)):
        LAYERS[0](*qkv(1, 30))
        refused.append(1 / 0)
    with pytest.raises(ValueError, match=r"step must reach a SparseAttention for every layer of the cache; got nothing for layers \[1\]"):  # noqa: SIM117
        with cache.step([sequence], rows(30)):
            LAYERS[0](*qkv(1, 30))
    assert (cache.bytes_used, cache.length(sequence), cache.length(sequence, 1), len(cache.tokens(sequence))) == (used, 40, 40, 40)
    with cache.step([sequence], rows(30)):
        [layer(*qkv(1, 30)) for layer in LAYERS]
    assert cache.length(sequence, 1) == 70


def test_room_in_all_layers_is_taken_before_any_layer_runs() -> None:
    cache = new_cache(num_pages=14)
    sequence, ran = cache.open(), []
    with pytest.raises(CacheFull, match="the cache is full: 16 new pages are needed, 14 of 14 are free"), cache.step([sequence], rows(64)):
        ran.append(1)
    assert not ran and cache.bytes_used == 0
    with cache.step([sequence], rows(48)):
        [layer(*qkv(1, 48)) for layer in LAYERS]
    assert cache.bytes_most == 12 * cache.page_bytes and cache.bytes_used <= cache.bytes_most


@pytest.mark.parametrize("hold", [0, 1, 16, 40])
@pytest.mark.parametrize("pattern", [Dense(), Window(20), S2, Power(block=16)], ids=str)
def test_what_was_held_can_be_taken_back_and_no_more(pattern, hold: int) -> None:
    """Forwards and back at random; the result is always that of attention over what is left, and refusals say how far it goes."""
    cache = new_cache(pattern=pattern, num_layers=1, hold=hold, max_tokens=700)
    layer, sequence = SparseAttention(pattern, 4, 2), cache.open()
    known, generator = [torch.zeros(1, 0, 2, 8)] * 2, torch.Generator().manual_seed(hold)
    for _ in range(25):
        length = cache.length(sequence)
        back = int(torch.randint(hold + 1, (), generator=generator))
        if back <= length:
            cache.rollback(sequence, back)
            known = [x[:, : length - back] for x in known]
        count = back + int(torch.randint(1, 12, (), generator=generator))
        q, k, v = qkv(1, count)
        known = [torch.cat([x, y], dim=1) for x, y in zip(known, (k, v), strict=True)]
        with cache.step([sequence], rows(count)):
            out = layer(q, k, v)
        torch.testing.assert_close(out, s2attn.attention(q, *known, pattern), atol=2e-6, rtol=2e-6)
        free = torch.from_numpy(cache.ledger.references == 0)
        for pool in cache.pools:
            pool[free[: len(pool)]] = torch.nan
    length = cache.length(sequence)
    if pattern == Window(20):
        with pytest.raises(ValueError, match=rf"tokens must be at most \d+, since keys which sequence {sequence} read before"):
            cache.rollback(sequence, hold + 36)
    with pytest.raises(ValueError, match="tokens must be at most "):
        cache.rollback(sequence, length + 1)
    assert cache.length(sequence) == length


def test_taking_back_leaves_forks_alone() -> None:
    cache = new_cache(pattern=Dense(), num_layers=1)
    layer, parent, known = SparseAttention(Dense(), 4, 2), cache.open(), qkv(1, 40)
    with cache.step([parent], rows(40)):
        layer(*known)
    child = cache.fork(parent)
    cache.rollback(child, 10)
    q, k, v = qkv(2, 12)
    with cache.step([parent, child], rows(12, 12)):
        out = layer(q, k, v)
    for i, kept in enumerate((40, 30)):
        whole = [torch.cat([old[:, :kept], new[i : i + 1]], dim=1) for old, new in zip(known[1:], (k, v), strict=True)]
        torch.testing.assert_close(out[i : i + 1], s2attn.attention(q[i : i + 1], *whole, Dense()), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], torch.ones(1, 3)), "tokens must be an integer tensor"),
        (([0], torch.ones(3, dtype=torch.int64)), r"tokens must have shape \(1, tokens\), a row for each sequence"),
        (([0], rows(3, 3)), r"tokens must have shape \(1, tokens\)"),
        (([0], torch.ones(1, 0, dtype=torch.int64)), "at least one token in a row"),
        (([0], rows(3), [4]), r"counts must have a number up to 3 for each of 1 rows; got \[4\]"),
        (([0], rows(3), [0]), "counts must be an integer >= 1; got 0"),
        (([0, 0], rows(3, 3)), "sequences must not repeat"),
        (([5], rows(3)), "sequence must be one that is open in this cache; got 5"),
        (([0], rows(401)), r"tokens must not make sequence 0 longer than max_tokens \(400\)"),
    ],
)
def test_bad_steps_are_refused(arguments, message) -> None:
    cache = new_cache()
    cache.open()
    with pytest.raises((ValueError, TypeError), match=message), cache.step(*arguments):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(
    ("module", "call", "error", "message"),
    [
        (SparseAttention(S2, 4, 2, causal=False), qkv(1, 3), Unsupported, "a cache serves causal attention"),
        (
            SparseAttention(XAttention(), 4, 2),
            qkv(1, 3),
            Unsupported,
            "a cache serves patterns.*\n  XAttention: it chooses",
        ),
        (SparseAttention(S2, 4, 2, layer=2), qkv(1, 3), ValueError, r"layer must be below num_layers of the cache \(2\); got 2"),
        (SparseAttention(S2, 4, 4), (*qkv(1, 3)[:1], *[qkv(1, 3)[0]] * 2), ValueError, "SparseAttention must have the heads of the cache"),
        (SparseAttention(Window(3), 4, 2, layer=1), qkv(1, 3), ValueError, "pattern must be what the cache keeps in layer 1, Local"),
        (LAYERS[0], qkv(1, 4), ValueError, r"q must have the batch and the tokens of the step, \(1, 3\), as its first two axes"),
        (LAYERS[0], tuple(x.half() for x in qkv(1, 3)), TypeError, r"k must have the dtype of the cache, torch\.float32"),
        (LAYERS[0], (qkv(1, 3)[0].requires_grad_(), *qkv(1, 3)[1:]), Unsupported, "decode has no gradient"),
    ],
)
def test_modules_that_do_not_fit_are_refused(module, call, error, message) -> None:
    cache = new_cache()
    with pytest.raises(error, match=message), cache.step([cache.open()], rows(3)):
        module(*call)
    assert cache.bytes_used == 0


def test_other_misuse_is_refused() -> None:
    cache = new_cache()
    sequence = cache.open()
    with pytest.raises(ValueError, match="layer must be another one in each SparseAttention of a model"), cache.step([sequence], rows(3)):
        LAYERS[0](*qkv(1, 3))
        LAYERS[0](*qkv(1, 3))
    with pytest.raises(ValueError, match="step must begin after the one before has ended"), cache.step([sequence], rows(3)):  # noqa: SIM117
        with cache.step([cache.open()], rows(3)):
            raise AssertionError("the block must not run")
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_k must be left out while a cache"), cache.step([sequence], rows(3)):
        LAYERS[0](*(x[0] for x in qkv(1, 3)), cu_seqlens_q=torch.tensor([0, 3]), cu_seqlens_k=torch.tensor([0, 3]))
    cache.append([sequence], 0, *qkv(1, 3)[1:])
    with pytest.raises(ValueError, match="sequence must have been filled by steps"), cache.step([sequence], rows(3)):
        raise AssertionError("the block must not run")
    assert LAYERS[0](*qkv(1, 3)).shape == (1, 3, 4, 8)  # and outside of a step nothing of this matters


def test_under_autocast_a_step_is_what_attention_is() -> None:
    layer, call = SparseAttention(S2, 4, 2), qkv(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        cache = SparseCache.for_model(lambda tokens: layer(*qkv(*tokens.shape)), max_tokens=50)
        with cache.step([cache.open()], rows(40)):
            out = layer(*call)
        assert cache.k_pages.dtype == out.dtype == torch.bfloat16
        torch.testing.assert_close(out, layer(*call), atol=0.02, rtol=0.02)


def test_a_cache_for_a_model_has_its_shape() -> None:
    class Model(torch.nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, tokens):
            return [layer(*qkv(*tokens.shape)) for layer in self.layers]

    cache = SparseCache.for_model(Model(*LAYERS), max_tokens=200, sequences=2, chunk=32, hold=4)
    assert (cache.num_layers, cache.num_heads, cache.num_kv_heads, cache.page_size, cache.ledger.hold) == (2, 4, 2, 16, 4)
    assert [cache.pattern.pattern(i) for i in range(2)] == [Dense(), S2]
    assert cache.ledger.num_pages == 2 * s2attn.cache.pages_needed(
        cache.pattern, num_kv_heads=2, num_heads=4, num_layers=2, page_size=16, tokens=200, chunk=32, hold=4
    )
    with pytest.raises(ValueError, match=r"layer must be 0 to 1 in the SparseAttention modules of the model, each once; got \[0, 0\]"):
        SparseCache.for_model(Model(LAYERS[0], LAYERS[0]), max_tokens=200)
    with pytest.raises(Unsupported, match="a cache serves patterns"):
        SparseCache.for_model(Model(SparseAttention(XAttention(), 4, 2)), max_tokens=200)
    with pytest.raises(Unsupported, match="there is nothing to keep for this model"):
        SparseCache.for_model(Model(), max_tokens=200)
