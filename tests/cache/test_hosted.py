"""A cache in two memories gives what the cache in one gives, token for token, and less lies on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import s2attn
from experiments.model import LanguageModel, ModelConfig
from s2attn import Dense, HeadRange, Local, PerHead, Power, Recipe, Sampling, Sink, SparseCache, Stride, Window
from s2attn.cache import CacheFull
from s2attn.cache.bus import Bus
from s2attn.cache.host_parts import packed_layout, split_by_page
from s2attn.cache.host_plan import plan_layers
from s2attn.cache.hosted import HostedCache
from s2attn.cache.needs import pages_read

H, G, D, PAGE, MOST = 4, 2, 8, 16, 400
SHAPE: dict[str, Any] = {"num_kv_heads": G, "num_heads": H, "head_dim": D, "v_dim": 6, "page_size": PAGE, "dtype": torch.float64}
S2 = Local(2, block=16) | Stride(3, block=16)
POWER = Sink(16) | Local(2, block=16) | Power(block=16)
UNLIKE = PerHead({0: Dense()}, default=Window(40))
BY_QUERY = Local(1, block=16) | Stride(3, block=16, heads="query")
PATTERNS = {"dense": Dense(), "S2": S2, "power": POWER, "per head": UNLIKE, "per query head": BY_QUERY}


def pair(pattern: Any, **how: Any) -> tuple[SparseCache, HostedCache]:
    shape = {**SHAPE, "max_tokens": MOST, "num_layers": how.pop("num_layers", 1), "hold": how.pop("hold", 0)}
    return SparseCache(pattern, num_pages=400, **shape), HostedCache(
        pattern, num_pages=how.pop("num_pages", 400), host_pages=400, **shape, **how
    )


def both(numbers: Iterable[Any]) -> Any:
    """What two caches answered alike."""
    one, two = numbers
    assert one == two
    return one


def balanced(cache: HostedCache) -> None:
    """Every page is free in its memory, or held by as many tables as its count of references says, and of layers that may hold it."""
    pages, held = cache.pages, torch.zeros(cache.pages.num_pages, dtype=torch.int64)
    for sequence in pages.sequences:
        for layer in range(cache.num_layers):
            table = torch.from_numpy(pages.table(sequence, layer))
            mine = table[table >= 0].long()
            held += torch.bincount(mine, minlength=len(held))
            assert layer not in cache.host_layers or (mine >= cache.num_pages).all()
    assert held.tolist() == pages.references.tolist()
    assert int((held[: cache.num_pages] > 0).sum()) == pages.on_device and int((held[cache.num_pages :] > 0).sum()) == pages.on_host


def rows(batch: int, tokens: int) -> list[Tensor]:
    widths = ((H, D), (G, D), (G, 6))
    return [torch.randn(batch, tokens, *width, dtype=torch.float64) for width in widths]


def agree(caches: tuple[SparseCache, SparseCache], sequences: list[int], tokens: int, layer: int = 0, **how: Any) -> None:
    """Both attend over the same new tokens, with the same result."""
    new = rows(len(sequences), tokens)
    expected, found = (cache.attend(sequences, layer, *new, return_lse=True, **how) for cache in caches)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spill", [None, "waiting", 1, 50])
@pytest.mark.parametrize("name", PATTERNS)
def test_results_are_those_of_one_memory(name: str, spill: Any) -> None:
    caches = pair(PATTERNS[name], spill=spill)
    one = both([cache.open() for _ in range(2)] for cache in caches)
    sinks = torch.randn(H)
    for tokens in (50, 1, 37, *[1] * 20, 90):
        agree(caches, one, tokens, sinks=sinks)
    plain, hosted = caches
    assert hosted.bytes_used == plain.bytes_used == hosted.bytes_on_device + hosted.bytes_on_host
    moved = isinstance(spill, int) or (spill == "waiting" and name == "power")
    assert (hosted.bytes_on_host > 0) == moved
    assert (hosted.bus.to_host > 0) == moved


def test_what_waits_is_what_the_next_query_does_not_read() -> None:
    _, cache = pair(POWER, spill="waiting")
    sequence = cache.open()
    for _ in range(320 // 16):
        cache.attend([sequence], 0, *rows(1, 16))
    table = cache.pages.table(sequence, 0)[:, :20]
    listed = pages_read(POWER, HeadRange(0, H, H, G), G, 0, 320, PAGE)[:, :20]
    here, away = (table >= 0) & (table < cache.num_pages), table >= cache.num_pages
    assert away.any() and not (here & ~listed).any()


def test_layers_on_the_host_leave_the_device_to_the_others() -> None:
    recipe = Recipe(S2, dense_layers=[1])
    caches = pair(recipe, num_layers=3, host_layers=[1])
    sequences = [both(cache.open() for cache in caches)]
    for tokens in (70, 1, 1, 50):
        for layer in range(3):
            agree(caches, sequences, tokens, layer)
    plain, hosted = caches
    dense = 2 * 8 * hosted.page_bytes  # two heads, 122 tokens
    assert hosted.bytes_on_host == dense and hosted.bytes_on_device == plain.bytes_used - dense


def test_bytes_on_the_bus_are_queries_and_results_and_not_the_cache() -> None:
    """4 heads of 8 and a value width of 6 in float64: q, k, v go there; out and lse come back."""
    _, cache = pair(Dense(), num_layers=2, host_layers=[0, 1])
    sequence, other = cache.open(), cache.open()
    for layer in range(2):
        cache.attend([sequence, other], layer, *rows(2, 100))
    there, back = cache.bus.to_host, cache.bus.to_device
    for layer in range(2):
        cache.attend([sequence, other], layer, *rows(2, 1))
    assert cache.bus.to_host - there == 2 * 2 * 8 * (H * D + G * (D + 6))
    assert cache.bus.to_device - back == 2 * 2 * 8 * (H * 6 + H)
    assert cache.bytes_on_device == 0
    plan = plan_layers(Dense(), device_bytes=0, tokens=MOST, num_layers=2, **SHAPE)
    assert 2 * plan.bytes_per_token == cache.bus.to_host - there + cache.bus.to_device - back


def test_spilled_pages_cross_once() -> None:
    _, cache = pair(Dense(), spill=16)
    sequence = cache.open()
    cache.attend([sequence], 0, *rows(1, 160))
    assert cache.bytes_on_host == 9 * G * cache.page_bytes == cache.bus.to_host
    cache.attend([sequence], 0, *rows(1, 1))
    assert cache.bus.to_host == 9 * G * cache.page_bytes + H * D * 8  # and one query


def test_forks_share_and_copy_in_both_memories() -> None:
    caches = pair(Recipe(POWER, dense_layers=[1]), num_layers=2, host_layers=[1], spill="waiting")
    first = both(cache.open() for cache in caches)
    for layer in range(2):
        agree(caches, [first], 150, layer)
    twin = both(cache.fork(first) for cache in caches)
    for tokens in (5, 1, 60, 1):
        for layer in range(2):
            agree(caches, [first, twin], tokens, layer)
        balanced(caches[1])
    assert caches[0].bytes_used == caches[1].bytes_used
    for cache in caches:
        cache.free(first)
    balanced(caches[1])
    for layer in range(2):
        agree(caches, [twin], 7, layer)
    for cache in caches:
        cache.free(twin)
    assert caches[1].bytes_used == 0


def test_drafts_are_taken_back_from_both() -> None:
    """A page that is full and has been spilled gets tokens again after a rollback, and a fork copies it."""
    caches = pair(Dense(), spill=1, hold=40)
    sequence = both(cache.open() for cache in caches)
    agree(caches, [sequence], 130)
    for cache in caches:
        cache.rollback(sequence, 37)
    agree(caches, [sequence], 1)
    twin = both(cache.fork(sequence) for cache in caches)
    for tokens in (1, 30, 1):
        agree(caches, [sequence, twin], tokens)
        balanced(caches[1])


def test_packed_chunks_of_many_lengths() -> None:
    caches = pair(POWER, spill=20)
    sequences = both([cache.open() for _ in range(3)] for cache in caches)
    for counts in ([70, 1, 33], [1, 50, 16], [1, 1, 1], [5, 0, 90]):
        cu = torch.tensor([0, *counts]).cumsum(0)
        new = [x[0] for x in rows(1, sum(counts))]
        found = [cache.attend(sequences, 0, *new, cu_seqlens_q=cu) for cache in caches]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def model() -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(
        ModelConfig(recipe=Recipe(POWER, dense_layers=[1]), layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64)
    ).eval()


@pytest.mark.parametrize(
    "how", [{"host_layers": [0, 2]}, {"spill": "waiting"}, {"spill": 24, "host_layers": [1]}, {"device_bytes": 90_000}]
)
def test_generated_texts_are_the_same_token_for_token(how: dict[str, Any]) -> None:
    network = model()
    prompts = [torch.randint(256, (length,)).tolist() for length in (150, 41)]
    sampling = [Sampling(max_new_tokens=40), Sampling(max_new_tokens=25, temperature=0.9, seed=4)]
    expected = s2attn.generate(network, prompts, sampling, chunk=64)
    cache = HostedCache.for_model(network, max_tokens=200, sequences=2, chunk=64, **how)
    found = s2attn.generate(network, prompts, sampling, chunk=64, cache=cache)
    assert [text.new for text in found] == [text.new for text in expected]
    assert cache.bus.to_host > 0 and cache.pages.most_on_host > 0
    if "device_bytes" in how:
        assert cache.num_pages * cache.page_bytes <= how["device_bytes"] and 0 < len(cache.host_layers) < 3


def test_a_full_memory_says_which_and_changes_nothing() -> None:
    _, cache = pair(Recipe(Dense(), layers={1: S2}), num_layers=2, host_layers=[0], num_pages=4)
    sequence = cache.open()
    for layer in range(2):
        cache.attend([sequence], layer, *rows(1, 20))
    before = cache.bytes_on_device, cache.bytes_on_host
    with pytest.raises(CacheFull, match="new pages are needed on the device, 0 of 4 are free there"):
        cache.attend([sequence], 1, *rows(1, 40))
    assert (cache.bytes_on_device, cache.bytes_on_host) == before
    _, small = pair(Dense(), spill=1)
    small = HostedCache(Dense(), num_pages=40, host_pages=3, spill=1, max_tokens=MOST, **SHAPE)
    sequence = small.open()
    small.attend([sequence], 0, *rows(1, 100))
    assert small.bytes_on_host == 3 * small.page_bytes  # the others stay where they are


def test_a_layout_in_two_lists_every_block_once() -> None:
    queries, tokens = torch.tensor([3, 20]), torch.tensor([100, 150])
    whole = packed_layout(POWER, (H, G), queries, tokens, PAGE, layer=0, heads=None)
    away = torch.rand(2, G, 10) < 0.5
    here, there = split_by_page(whole, away, PAGE)
    a, b = here.to_dense(), there.to_dense()
    assert not (a & b).any() and torch.equal(a | b, whole.to_dense())
    assert here.validate() is here and there.validate() is there
    column = torch.cat([away[i].repeat_interleave(PAGE, dim=1)[:, : int(n)] for i, n in enumerate(tokens)], dim=1)
    assert (
        torch.equal(there.rows.counts.sum() > 0, torch.tensor(True))
        and not (b & ~column[:, None]).any()
        and not (a & column[:, None]).any()
    )


def test_as_many_layers_stay_as_the_formula_says() -> None:
    """floor((memory - weights - activations) / (2 B S G D bytes)), for dense layers whose length is a multiple of the page."""
    for memory, sequences, tokens in ((10**6, 1, 640), (3 * 10**6, 2, 1280), (5 * 10**5, 3, 64), (10**9, 1, 64)):
        shape = {"num_layers": 12, "num_kv_heads": 2, "num_heads": 8, "head_dim": 16}
        plan = plan_layers(
            Dense(), device_bytes=memory, weight_bytes=10**5, activation_bytes=5000, sequences=sequences, tokens=tokens, **shape
        )
        stay = min(12, (memory - 105_000) // (2 * sequences * tokens * 2 * 16 * 2))
        assert len(plan.device_layers) == stay and plan.host_layers == tuple(range(stay, 12))
        assert plan.device_bytes <= memory - 105_000
        assert plan.device_bytes + plan.host_bytes == sum(plan.layer_bytes)


def test_sparse_layers_stay_before_dense_ones() -> None:
    shape: dict[str, Any] = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 16, "tokens": 4096, "chunk": 64}
    recipe = Recipe(Local(2) | Stride(8), dense_layers=[0, 2])
    everything = plan_layers(recipe, device_bytes=1 << 40, **shape)
    assert everything.host_layers == () and everything.bytes_per_token == 0 and everything.host_pages == 0
    dense, sparse = everything.layer_bytes[::2], everything.layer_bytes[1::2]
    assert max(sparse) < min(dense) / 4
    plan = plan_layers(recipe, device_bytes=sum(sparse) + dense[0], **shape)
    assert plan.host_layers == (2,) and "3 of 4 layers" in str(plan)
    assert plan.bytes_per_token == 2 * (2 * 32 + 2 * 32) + 4 * 2
    assert plan_layers(recipe, device_bytes=0, **shape).device_layers == ()


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(ValueError, match="spill must be None, 'waiting' or a number"):
        pair(Dense(), spill="old")
    with pytest.raises(ValueError, match="spill must be an integer >= 1"):
        pair(Dense(), spill=0)
    with pytest.raises(ValueError, match="host_layers must name layers below 1"):
        pair(Dense(), host_layers=[1])
    with pytest.raises(ValueError, match="host_pages must be an integer >= 1"):
        HostedCache(Dense(), num_pages=1, host_pages=0, max_tokens=10, **SHAPE)
    with pytest.raises(ValueError, match="must be left out where device_bytes"):
        HostedCache.for_model(model(), max_tokens=50, device_bytes=1000, spill=5)
    with pytest.raises(ValueError, match="host_layers must name layers below 3"):
        HostedCache.for_model(model(), max_tokens=50, host_layers=[3])
    with pytest.raises(s2attn.Unsupported, match="need 6 bytes more"):
        plan_layers(Dense(), device_bytes=4, weight_bytes=10, num_layers=1, num_kv_heads=1, head_dim=8, tokens=5)
    _, cache = pair(Dense())
    with pytest.raises(s2attn.Unsupported, match="two memories"):
        cache.save("nowhere.pt")
    with pytest.raises(s2attn.Unsupported, match="a cache in one memory"):
        HostedCache.load("nowhere.pt")
    with pytest.raises(s2attn.Unsupported, match="no cascade over two memories"):
        cache.attend([cache.open()], 0, *rows(1, 5), cascade=True)
    assert cache.bytes_used == 0


def test_the_bus_copies_and_counts() -> None:
    bus = Bus(torch.device("cpu"))
    x = torch.arange(6.0)
    (there,) = bus.fetch(x)()
    (back,) = bus.send(there)
    assert torch.equal(back, x) and len({t.data_ptr() for t in (x, there, back)}) == 3
    assert (bus.to_host, bus.to_device) == (24, 24)
