"""A cache that was saved and loaded goes on as the one that stayed, forks and rules included; other files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2attn import Dense, HeadRange, Local, Recipe, SparseAttention, SparseCache, Stride
from s2attn.cache import CacheFull
from s2attn.core import atomic_write
from s2attn.core.files import append_checksum

S2 = Local(2, 16) | Stride(3, block=16)
SHAPE = {"num_kv_heads": 2, "num_heads": 4, "head_dim": 8, "v_dim": 6, "page_size": 16, "num_layers": 2, "max_tokens": 400}
LAYERS = [SparseAttention(pattern, 4, 2, layer=i) for i, pattern in enumerate([Dense(), S2])]


def step(cache: SparseCache, sequences: list[int], count: int, seed: int) -> list[torch.Tensor]:
    generator, batch = torch.Generator().manual_seed(seed), len(sequences)
    tokens = torch.randint(50, (batch, count), generator=generator)
    outs = []
    with cache.step(sequences, tokens):
        for layer in LAYERS:
            q, k, v = (torch.randn(batch, count, *shape, generator=generator) for shape in ((4, 8), (2, 8), (2, 6)))
            outs.append(layer(q, k, v))
    return outs


def seal(data: object, path: Path) -> None:
    """Write any data with a checksum that fits."""
    with atomic_write(path) as file:
        torch.save(data, file)
        append_checksum(file)


@pytest.fixture
def cache() -> SparseCache:
    """Three sequences, one of them a fork, one closed; pages in use lie anywhere in the pool."""
    made = SparseCache(Recipe(S2, dense_layers=[0]), num_pages=200, hold=5, dtype=torch.float32, **SHAPE)
    a, b = made.open(), made.open()
    step(made, [a, b], 90, 0)
    c = made.open()
    step(made, [c], 30, 1)
    made.fork(b)
    made.free(a)
    step(made, [b], 9, 2)
    return made


@pytest.mark.parametrize("num_pages", [None, 150])
def test_a_loaded_cache_goes_on_as_the_one_that_stayed(cache, tmp_path, num_pages) -> None:
    cache.save(tmp_path / "cache.pt")
    loaded = SparseCache.load(tmp_path / "cache.pt", num_pages=num_pages)
    assert (loaded.pattern, loaded.page_size, loaded.hold, loaded.num_pages) == (cache.pattern, 16, 5, num_pages or 200)
    assert loaded.ledger.sequences == cache.ledger.sequences == [1, 2, 3]
    assert (loaded.bytes_used, loaded.bytes_dense) == (cache.bytes_used, cache.bytes_dense)
    for sequence in (1, 2, 3):
        assert loaded.tokens(sequence) == cache.tokens(sequence)
    free = torch.from_numpy(loaded.ledger.references == 0)
    for pool in loaded.pools:
        pool[free[: len(pool)]] = torch.nan
    for both in (loaded, cache):
        both.rollback(3, 5)
    for i, sequences in enumerate(([1, 2, 3], [3], [2, 1], [1, 2, 3])):
        for mine, theirs in zip(step(loaded, sequences, 20, i), step(cache, sequences, 20, i), strict=True):
            assert torch.equal(mine, theirs)
    assert loaded.open() == cache.open() == 4
    assert loaded.bytes_used == cache.bytes_used
    for sequence in range(1, 5):
        loaded.free(sequence)
    assert loaded.bytes_used == 0


def test_a_file_is_as_large_as_the_pages_in_use(cache, tmp_path) -> None:
    cache.save(tmp_path / "cache.pt")
    assert cache.bytes_used <= (tmp_path / "cache.pt").stat().st_size < cache.bytes_used + 20_000


def test_a_small_pool_is_full_at_once(cache, tmp_path) -> None:
    cache.save(tmp_path / "cache.pt")
    used = cache.bytes_used // cache.page_bytes
    with pytest.raises(ValueError, match=f"num_pages must be at least {used}, the pages in the file; got {used - 1}"):
        SparseCache.load(tmp_path / "cache.pt", num_pages=used - 1)
    loaded = SparseCache.load(tmp_path / "cache.pt", num_pages=used)
    with pytest.raises(CacheFull):
        step(loaded, [2], 40, 0)


def test_ranks_and_patterns_come_back(tmp_path) -> None:
    heads = HeadRange(4, 8, num_heads=8, num_kv_heads=4)
    SparseCache(S2, num_pages=4, heads=heads, dtype=torch.bfloat16, **SHAPE).save(tmp_path / "cache.pt")
    loaded = SparseCache.load(tmp_path / "cache.pt")
    assert (loaded.heads, loaded.pattern, loaded.k_pages.dtype, loaded.v_pages.shape[-1]) == (heads, S2, torch.bfloat16, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("k"), "path must be a file that SparseCache.save wrote"),
        (lambda data: data.update(version=1), "path must have version 2; got 1"),
        (lambda data: data.update(k=data["k"].half()), r"path must hold \d+ pages of \(16, 1, 8\) torch\.float32"),
        (lambda data: data.update(v=data["v"][1:]), r"path must hold \d+ pages of \(16, 1, 6\)"),
        (lambda data: data.update(dtype="int8"), "dtype must be one of"),
        (lambda data: data["sequences"][1].update(tokens=torch.zeros(3)), "path must hold tokens of 1 axes of torch.int64"),
        (lambda data: data["sequences"][1]["table"].fill_(10**6), "table must have shape .* and name pages below"),
        (lambda data: data["sequences"][1]["table"].fill_(-2), "table must have shape .* and name pages below"),
        (lambda data: data["sequences"][1]["table"].fill_(1), "table must name the pages that later queries read, and each page once"),
        (lambda data: data["sequences"][1]["table"].fill_(-1), "table must name the pages that later queries read"),
        (lambda data: data["sequences"][1]["lengths"].fill_(401), r"lengths must be 2 numbers up to max_tokens \(400\)"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(cache, tmp_path, change, message) -> None:
    cache.save(tmp_path / "cache.pt")
    data = torch.load(tmp_path / "cache.pt", weights_only=True)
    change(data)
    seal(data, tmp_path / "cache.pt")
    with pytest.raises(ValueError, match=message):
        SparseCache.load(tmp_path / "cache.pt")


def test_other_files_are_refused(tmp_path) -> None:
    (tmp_path / "text.pt").write_text("not a cache")
    torch.save({}, tmp_path / "plain.pt")
    seal(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    seal({"format": "another"}, tmp_path / "other.pt")
    for name in ("text.pt", "plain.pt", "module.pt", "other.pt"):
        with pytest.raises(ValueError, match=r"path must be a file that SparseCache\.save wrote; got "):
            SparseCache.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        SparseCache.load(tmp_path / "nothing.pt")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_and_missing_ends_are_refused(data: st.DataObject, cache: SparseCache, tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    cache.save(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"path must be a file that SparseCache\.save wrote; got .*cache\.pt"):
        SparseCache.load(str(path))


def test_a_save_that_fails_leaves_the_file_before(cache: SparseCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache.pt"
    cache.save(path)
    content = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("s2attn.cache.saved.append_checksum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
