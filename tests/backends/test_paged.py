"""Backends that read pages, against the reference on the gathered keys: page sizes, dtypes, garbage, bits, and storing."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch

import s2attn
from s2attn import Dense, Layout, Local, Sink, Stride, Window
from s2attn.backends import Backend, Pages, Requests, Scoring, Writes, backend_names, get_backend
from s2attn.layout import build_layout
from tests.support.masks import dense_mask
from tests.support.oracle import assert_close, eager, oracle
from tests.support.problems import random_mask

S2 = Local(2, 16) | Stride(3, block=16)


def paging() -> list[str]:
    """Those that can run here and need no interpreter."""
    q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 16, 1, 16)
    pages = Pages(k, k, torch.zeros(1, 1, 1, dtype=torch.int32))
    return [name for name in backend_names() if name != "triton" and not get_backend(name).paged_objections(q, pages)]


@pytest.fixture(params=paging())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def paged(name: str) -> Backend:
    return get_backend(name)


@pytest.mark.parametrize("built", [name for name in paging() if name == "cpu"])
def test_records_have_the_sizes_of_the_library(built: str) -> None:
    """Those of the cpu backend that follow the ones of `library.record_sizes`."""
    from s2attn.backends.cpu import build, library, paged

    first, size_of = len(library.record_sizes()), build.kernels().library.s2_record_size
    for number, kind in enumerate((paged.CTable, paged.CDecode, paged.CStore), first):
        assert ctypes.sizeof(kind) == size_of(ctypes.c_int64(number)), kind


def pages_of(keys: list[torch.Tensor], page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(pages, table)`` of keys ``(S, G, D)``, one table for all heads; free slots hold NaN."""
    most = -(-max(len(k) for k in keys) // page_size)
    order = torch.randperm(len(keys) * most).view(len(keys), most)
    pages = torch.full((len(keys) * most, page_size, *keys[0].shape[1:]), torch.nan, dtype=keys[0].dtype)
    for row, k in zip(order, keys, strict=True):
        for i in range(0, len(k), page_size):
            part = k[i : i + page_size]
            pages[row[i // page_size], : len(part)] = part
    return pages, order


def check(name: str, pattern, lengths, heads=(4, 2), page_size=32, dtype=torch.float32, width=16, v_width=24, **scoring) -> None:
    """Sequences with (queries, keys) of those lengths in one packed call."""
    q = [torch.randn(n, heads[0], width).to(dtype) for n, _ in lengths]
    k, v = ([torch.randn(m, heads[1], w).to(dtype) for _, m in lengths] for w in (width, v_width))
    k_pages, table = pages_of(k, page_size)
    v_pages = torch.full((*k_pages.shape[:3], v_width), torch.nan, dtype=dtype)
    for row, x in zip(table, v, strict=True):
        for i in range(0, len(x), page_size):
            v_pages[row[i // page_size], : len(x[i : i + page_size])] = x[i : i + page_size]
    cu = torch.tensor([0, *torch.tensor([n for n, _ in lengths]).cumsum(0).tolist()])
    where = {"block_table": table, "seq_lens": torch.tensor([m for _, m in lengths]), "cu_seqlens_q": cu}
    out, lse = s2attn.decode(torch.cat(q), k_pages, v_pages, pattern, **where, return_lse=True, backend=name, **scoring)
    for i, (n, m) in enumerate(lengths):
        mask = dense_mask(pattern, *heads, n, m)
        sets = [f(q[i][None], k[i][None], v[i][None], mask, **scoring) for f in (eager, oracle)]
        for what, got, plain, exact in zip(("out", "lse"), (out[cu[i] : cu[i + 1]], lse[:, cu[i] : cu[i + 1]]), *sets, strict=True):
            assert_close(what, got, plain[0], exact[0].double())


@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
@pytest.mark.parametrize("pattern", [S2, Sink(70) | Window(130), Local(3, 128), Dense()], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1), (24, 2)], ids=str)
def test_page_sizes_blocks_and_groups(name: str, page_size: int, pattern, heads: tuple[int, int]) -> None:
    """One query, several, and a chunk, whose rows fill one strip or more."""
    check(name, pattern, [(1, 300), (5, 37), (90, 270), (1, 1)], heads, page_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "v_width"), [(128, 128), (64, 64), (80, 96), (20, 3), (8, 1)], ids=str)
def test_dtypes_and_widths(name: str, dtype: torch.dtype, width: int, v_width: int) -> None:
    scoring = {"softcap": 5.0, "sinks": torch.tensor([0.5, -1.0, 2.0, -torch.inf])}
    for how in ({}, scoring):
        check(name, S2, [(1, 200), (3, 77), (40, 40)], dtype=dtype, width=width, v_width=v_width, **how)


@pytest.mark.parametrize("queries", [1, 30])
def test_lists_that_are_cut_into_parts(name: str, queries: int) -> None:
    check(name, Dense(), [(queries, 5000), (queries, 1024), (queries, 1040)], (2, 1), 64)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_lists_per_head_of_a_layout(name: str, heads: int) -> None:
    mask = random_mask(heads, 100, 100, 16, causal=True)
    made = Layout.from_dense(mask, block=16)
    layout = Layout(16, True, made.rows, made.tiles, made.q_spans, made.k_spans)
    q, k, v = torch.randn(1, 100, 4, 16), torch.randn(1, 100, 2, 16), torch.randn(1, 100, 2, 16)
    pages = [torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, 12)).unflatten(0, (7, 16)) for x in (k, v)]
    where = {"block_table": torch.arange(7)[None], "seq_lens": torch.tensor([100])}
    out = s2attn.decode(q, *pages, layout, **where, backend=name)
    torch.testing.assert_close(out, s2attn.attention(q, k, v, layout, backend="reference"), atol=2e-6, rtol=2e-6)


def test_tables_per_kv_head_and_any_strides(name: str) -> None:
    """Pages heads first, K and V side by side, a table whose rows lie apart, and queries out of a fused tensor."""
    both = torch.randn(14, 2, 16, 40)
    k_pages, v_pages = both[..., :16].transpose(1, 2), both[..., 16:].transpose(1, 2)
    table = torch.randperm(14).view(1, 2, 7).int().repeat(1, 1, 2)[..., ::2][..., :7]
    q = torch.randn(1, 3, 8, 20)[:, :, ::2, 2:18]
    out = s2attn.decode(q, k_pages, v_pages, S2, block_table=table, seq_lens=torch.tensor([100]), backend=name)
    gathered = [torch.stack([x[table[0, g].long(), :, g].flatten(0, 1)[:100] for g in range(2)], 1)[None] for x in (k_pages, v_pages)]
    torch.testing.assert_close(out, s2attn.attention(q, *gathered, S2, backend="reference"), atol=2e-6, rtol=2e-6)
    by_width = [x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for x in (k_pages, v_pages)]
    again = s2attn.decode(q, *by_width, S2, block_table=table, seq_lens=torch.tensor([100]), backend=name)
    assert torch.equal(again, out)


@pytest.mark.parametrize("queries", [1, 20])
def test_float8_numbers_of_every_code(name: str, queries: int) -> None:
    """All 254 numbers in K and V, with scales; what is computed from them is what float32 pages give."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(9)[: 64 * 2 * 16].view(4, 16, 2, 16)
    k_pages, v_pages = codes.flip(0).contiguous().view(torch.float8_e4m3fn), codes.view(torch.float8_e4m3fn)
    scales = torch.tensor([0.01, 0.003]), torch.tensor([0.5, 2.0])
    q, where = torch.randn(1, queries, 4, 16), {"block_table": torch.tensor([[2, 0, 3, 1]]), "seq_lens": torch.tensor([60])}
    got = s2attn.decode(q, k_pages, v_pages, Dense(), **where, k_scale=scales[0], v_scale=scales[1], return_lse=True, backend=name)
    wide = [x.float() * s[:, None] for x, s in zip((k_pages, v_pages), scales, strict=True)]
    expected = s2attn.decode(q, *wide, Dense(), **where, return_lse=True, backend=name)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_numbers_that_a_row_must_not_see(name: str, value: float, queries: int) -> None:
    """A bad key and value in the middle of the pages: rows that see it differ, the others do not."""
    q, k, v = torch.randn(1, queries, 4, 16), torch.randn(1, 90, 2, 16), torch.randn(1, 90, 2, 16)
    pattern, where = Window(8), {"block_table": torch.arange(6)[None], "seq_lens": torch.tensor([90]), "backend": name}
    pages = [torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, 6)).unflatten(0, (6, 16)).clone() for x in (k, v)]
    clean = s2attn.decode(q, *pages, pattern, **where)
    for x in pages:
        x[80 // 16, 80 % 16] = value
        x[90 // 16, 90 % 16 :] = value  # no token yet
    got = s2attn.decode(q, *pages, pattern, **where)
    position = torch.arange(90 - queries, 90)
    seeing = (position >= 80) & (position < 88)
    torch.testing.assert_close(got[:, ~seeing], clean[:, ~seeing], atol=1e-6, rtol=1e-6)
    assert bool((got[:, seeing] != clean[:, seeing]).any(-1).all())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_depend_on_the_sequence_alone(paged: Backend, threads: int) -> None:
    """Not on threads, nor on the batch, whether or not that is asked for."""
    lengths = [3000, 17, 1500, 64]
    layout = build_layout(S2, 8, 2, 4096, block=16)
    k, v = torch.randn(2, 4 * 64, 64, 2, 64)
    pages = Pages(k, v, torch.randperm(256).view(4, 1, 64))
    q, scoring = torch.randn(1, 4, 8, 64), Scoring(0.125)
    torch.set_num_threads(threads)
    for invariant in (False, True):
        out, lse = paged.forward_paged(q, pages, Requests(torch.tensor(lengths), None, True, invariant), layout, scoring)
        torch.set_num_threads(1)
        for i, length in enumerate(lengths):
            alone = Requests(torch.tensor([length]), None, True, invariant)
            one, one_lse = paged.forward_paged(q[:, i : i + 1], Pages(k, v, pages.table[i : i + 1]), alone, layout, scoring)
            assert torch.equal(one[0, 0], out[0, i]) and torch.equal(one_lse[0, :, 0], lse[0, :, i])


def paged_call(paged: Backend, lengths: torch.Tensor, cu: torch.Tensor | None, table: torch.Tensor, total: int):
    layout = build_layout(Local(2, 16) | Sink(5), 4, 2, 64, block=16)
    pages = Pages(*torch.ones(2, 6, 16, 2, 8), table)
    return paged.forward_paged(torch.ones(1, total, 4, 8), pages, Requests(lengths, cu, checked=False), layout, Scoring(0.3))


@pytest.mark.parametrize("garbage", [-(2**62), -(2**40), -1, 0, 7, 2**40, 2**62])
@pytest.mark.parametrize("rows", [3, 5], ids=["tables of each", "tables of more"])
def test_numbers_that_make_no_sense_are_clamped(paged: Backend, garbage: int, rows: int) -> None:
    """Lengths, cumulative lengths and tables of anything: no error, no number from outside, rows of nothing are 0 and -inf."""
    table = torch.full((rows, 2, 4), garbage, dtype=torch.int64)
    for lengths in (torch.tensor([garbage, 20, 64]), torch.tensor([3, garbage, garbage])):
        for cu in (None, torch.tensor([0, garbage, 2, 6]), torch.tensor([garbage, 5, 1, garbage])):
            out, lse = paged_call(paged, lengths, cu, table, 6)
            assert out.isfinite().all() and not lse.isnan().any()
            assert bool((out.transpose(1, 2)[lse == -torch.inf] == 0).all())
            if garbage < 0 or garbage > 6:
                assert bool((lse == -torch.inf).all())


def test_positions_beyond_a_layout_see_nothing(paged: Backend) -> None:
    layout = build_layout(Dense(), 2, 1, 32, block=16)
    pages = Pages(*torch.ones(2, 8, 16, 1, 8), torch.arange(8).view(1, 1, 8))
    requests = Requests(torch.tensor([40]), None, checked=False)
    lse = paged.forward_paged(torch.ones(1, 20, 2, 8), pages, requests, layout, Scoring(0.3))[1]
    assert torch.equal(lse[0] > -torch.inf, (torch.arange(20, 40) < 32).expand(2, -1))


@pytest.mark.parametrize("gone", [-1, 3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("queries", [1, 16])
def test_pages_that_are_not_there_are_unseen(name: str, gone: int, queries: int) -> None:
    """Tokens 16 to 31 count for nothing; the rest is as if they did not exist."""
    q, k, v = torch.randn(1, queries, 2, 8), torch.randn(1, 64, 1, 8), torch.randn(1, 64, 1, 8)
    pages = [x[0].unflatten(0, (4, 16))[:3].clone() for x in (k, v)]
    mask = torch.ones(queries, 48, dtype=torch.bool).tril(48 - queries)
    mask[:, 16:32] = False
    expected = oracle(q, k[:, :48], v[:, :48], mask)[0].float()
    where = {"block_table": torch.tensor([[0, gone, 2]], dtype=torch.int32), "seq_lens": torch.tensor([48])}
    out = s2attn.decode(q, *pages, Dense(), **where, validate=False, backend=name)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


def written(paged: Backend, k: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    into = pages.clone() if pages.is_contiguous() else pages
    paged.store(Writes(k, k, into, into.clone(), slots, scale, scale))
    return into


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_stored_numbers_lie_in_their_slots(paged: Backend, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Strided rows, slots of nothing, slots beyond the end, and one slot that comes twice: one of its tokens is kept whole."""
    rows = torch.randn(6, 4, 40).to(dtype)[:, ::2, 3:23]
    slots = torch.tensor([33, -1, 5, 48, 20, 20], dtype=kind)
    pages = written(paged, rows, torch.zeros(3, 16, 2, 20, dtype=dtype), slots).flatten(0, 1)
    assert torch.equal(pages[33], rows[0]) and torch.equal(pages[5], rows[2])
    assert torch.equal(pages[20], rows[4]) or torch.equal(pages[20], rows[5])
    assert pages.any(-1).any(-1).nonzero()[:, 0].tolist() == [5, 20, 33]


def test_storing_into_strided_pages(paged: Backend) -> None:
    room = torch.zeros(3, 2, 16, 48)
    written(paged, rows := torch.randn(2, 2, 20), room[..., 1:41:2].transpose(1, 2), torch.tensor([17, 40]))
    assert torch.equal(room[1, :, 1, 1:41:2], rows[0]) and torch.equal(room[2, :, 8, 1:41:2], rows[1])
    assert room.count_nonzero() == rows.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_is_rounded_as_torch_rounds(paged: Backend, dtype: torch.dtype) -> None:
    """Halfway cases, numbers below the normal ones, beyond the largest, NaN; divided by a scale."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat([codes, between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(1e9))])
    numbers = torch.cat([numbers, -numbers, torch.tensor([1e-9, 449.0, 1e6, torch.inf, -torch.inf, torch.nan, 0.0, -0.0])])
    rows = torch.nn.functional.pad(numbers, (0, -len(numbers) % 32)).view(-1, 2, 16).to(dtype)
    scale = torch.tensor([1.0, 0.25])
    pages = torch.zeros(-(-len(rows) // 16), 16, 2, 16).to(torch.float8_e4m3fn)
    got = written(paged, rows, pages, torch.arange(len(rows)), scale).flatten(0, 1)[: len(rows)].view(torch.uint8)
    expected = (rows.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    nan = (expected & 0x7F) == 0x7F
    assert torch.equal(got[~nan], expected[~nan]) and bool(((got[nan] & 0x7F) == 0x7F).all())


@pytest.mark.parametrize("flags", ["-mno-avx512f", "-march=x86-64"] if platform.machine() == "x86_64" else [])
def test_narrower_vectors_decode_the_same(flags: str) -> None:
    """AVX2 without AVX-512, and 128 bits, as `test_cpu_build` has it for attention."""
    code = """
import torch, s2attn
from s2attn import Local, Stride
from s2attn.backends.cpu.build import kernels
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
    k_pages, v_pages = torch.randn(2, 12, 16, 2, 32).to(dtype)
    for queries in (1, 3, 20):
        q = torch.randn(2, queries, 4, 32).to(torch.float32 if dtype == torch.float8_e4m3fn else dtype)
        where = {"block_table": torch.randperm(12).view(2, 6), "seq_lens": torch.tensor([90, 33])}
        call = (q, k_pages, v_pages, Local(2, 16) | Stride(3, block=16))
        a, b = (s2attn.decode(*call, **where, return_lse=True, backend=name)[1] for name in ("cpu", "torch"))
        torch.testing.assert_close(a, b, atol=3e-6, rtol=3e-6)
        a, b = (s2attn.decode(*call, **where, backend=name).float() for name in ("cpu", "torch"))
        torch.testing.assert_close(a, b, atol=3e-6, rtol=3e-6 if q.dtype == torch.float32 else 1e-2)
print(kernels().isa)
"""
    env = {**os.environ, "S2ATTN_CPU_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() in ("AVX2, FMA", "128-bit vectors"), done.stderr
