"""What the torch backend promises: memory, bits that depend on nothing else, numbers that stay where they are seen, no side effects."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import s2attn
from s2attn import Dense, Sink, Stride, Window
from s2attn.backends import Backend, Pages, Requests, Scoring, get_backend
from s2attn.backends.torch import attend
from s2attn.backends.torch.rows import Rows
from s2attn.layout import build_layout
from s2attn.testing.problems import Problem, check_backend, make_problem, random_problem, run

NAMES = ("out", "lse", "dq", "dk", "dv")
TORCH = get_backend("torch")
SPARSE = Window(200) | Stride(64)


class LargestResult(TorchDispatchMode):
    """Remembers the most numbers that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in tree_iter(result):
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("scoring", [Scoring(0.25), Scoring(0.25, 5.0, torch.zeros(8))], ids=["plain", "softcap and sinks"])
@pytest.mark.parametrize("pattern", [SPARSE, Window(64) | Sink(8000)], ids=str)
def test_memory_is_linear_in_the_length(scoring, pattern) -> None:
    """At 16k tokens nothing is larger than a small multiple of q, nor where lists are long."""
    length, heads, width = 16384, 8, 16
    layout = build_layout(pattern, heads, seqlen_q=length)
    q, k, v = (torch.randn(1, length, heads, width) for _ in range(3))
    with LargestResult() as largest:
        out, lse = TORCH.forward(q, k, v, layout, scoring)
        if pattern == SPARSE:
            TORCH.backward(out, None, q, k, v, out, lse, layout, scoring)
    assert largest.numel <= 4 * q.numel() < length * length / 25


def test_keys_are_not_repeated_for_query_heads() -> None:
    layout = build_layout(Window(100), 16, 1, seqlen_q=1, seqlen_k=4096)
    q, k = torch.randn(1, 1, 16, 64), torch.randn(1, 4096, 1, 64)
    with LargestResult() as largest:
        TORCH.forward(q, k, k, layout, Scoring(0.125))
    assert largest.numel <= k.numel()


@pytest.mark.parametrize("numbers", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("scoring", [{}, {"softcap": 1.5, "sinks": torch.arange(4.0)}], ids=["plain", "softcap and sinks"])
def test_results_do_not_depend_on_how_items_are_cut_into_chunks(monkeypatch, numbers: int, scoring: dict) -> None:
    p = random_problem(4, 2, 4, 150, 150, 16, causal=True, batch=2, **scoring).to(torch.float32)
    expected = run(TORCH, p)
    monkeypatch.setattr(attend, "NUMBERS", numbers)
    got = run(TORCH, p)
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in NAMES)


@pytest.mark.parametrize("step", [16, 64])
@pytest.mark.parametrize("scoring", [{}, {"softcap": 1.5, "sinks": torch.arange(4.0)}], ids=["plain", "softcap and sinks"])
def test_lists_longer_than_a_step(monkeypatch, step: int, scoring: dict) -> None:
    """With masks on both sides of a cut, and rows that see nothing in their first steps."""
    monkeypatch.setattr(attend, "STEP", step)
    check_backend(TORCH, random_problem(4, 2, 2, 200, 250, 16, batch=2, **scoring))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    p = random_problem(4, 2, 4, 300, 300, 32, causal=True, batch=2, width=64).to(dtype)
    one = random_problem(1, 1, 1, 1, 3000, 64, width=64).to(dtype)
    alone = [run(TORCH, x) for x in (p, one)]
    torch.set_num_threads(threads)
    for x, expected in zip((p, one), alone, strict=True):
        got = run(TORCH, x)
        assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in NAMES)


def unseen_numbers(p: Problem, value: float) -> tuple[Problem, torch.Tensor]:
    """The problem with a few keys and values of ``value``, and which rows ``(1, T, H)`` see one."""
    k, v, broken = p.k.clone(), p.v.clone(), [3, 40, 70, 149]
    k[:, broken], v[:, broken] = value, value
    return replace(p, k=k, v=v), p.mask[:, :, broken].any(-1).t()[None]


@pytest.mark.parametrize("value", [3e38, -3e38, torch.inf, torch.nan])
@pytest.mark.parametrize("bent", [{}, {"softcap": 2.0, "sinks": torch.arange(4.0)}], ids=["plain", "softcap and sinks"])
def test_huge_numbers_touch_only_the_rows_that_see_them(plain_backend: Backend, value: float, bent: dict) -> None:
    """Masks select: a product that overflows meets no mask that is added."""
    p = random_problem(4, 2, 2, 150, 150, 32, causal=True, width=16, **bent).to(torch.float32)
    p = replace(p, q=p.q.abs() + 1)
    clean = run(plain_backend, p)
    dirty, seen = unseen_numbers(p, value)
    got = run(plain_backend, dirty)
    assert seen.any() and not seen.all()
    torch.testing.assert_close(got.out[~seen], clean.out[~seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.transpose(1, 2)[~seen], clean.lse.transpose(1, 2)[~seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.dq[~seen], clean.dq[~seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [3e38, torch.inf, torch.nan])
def test_huge_numbers_that_no_row_sees_touch_no_gradient(plain_backend: Backend, value: float) -> None:
    mask = (torch.rand(2, 90, 90) < 0.5).tril()
    mask[:, :, [5, 50]] = False
    layout = s2attn.Layout.from_dense(mask, block=32)
    p = make_problem(layout, mask, heads=4, kv_heads=2, width=16).to(torch.float32)
    k, v = p.k.clone(), p.v.clone()
    k[:, [5, 50]], v[:, [5, 50]] = value, value
    clean, got = run(plain_backend, p), run(plain_backend, replace(p, k=k, v=v))
    for name in NAMES:
        torch.testing.assert_close(getattr(got, name), getattr(clean, name), atol=1e-5, rtol=1e-5)


def test_rows_whose_logits_are_all_far_below_zero(plain_backend: Backend) -> None:
    """Below -1e30, which must not be taken for masked."""
    p = random_problem(4, 2, 2, 100, 100, 32, causal=True, width=16).to(torch.float32)
    q, k = torch.full_like(p.q, -1e16), torch.full_like(p.k, 1e16)
    got = run(plain_backend, replace(p, q=q, k=k))
    seen = p.mask.any(-1)[None]
    assert bool((got.lse[seen] < -1e32).all()) and bool(got.lse[seen].isfinite().all())
    count = p.mask.sum(-1).clamp(min=1)[..., None].float()
    mean = torch.einsum("hts,bshd->bhtd", p.mask.float(), p.v.repeat_interleave(2, 2)) / count
    torch.testing.assert_close(got.out.transpose(1, 2)[seen], mean[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [1e308, 5e-324, 1e-40, 3e38])
def test_caps_that_the_dtype_cannot_hold(softcap: float) -> None:
    p = replace(random_problem(4, 2, 2, 100, 70, 32, causal=True), softcap=softcap)
    got, exact = run(TORCH, p.to(torch.float32)), run(get_backend("reference"), p)
    for name in NAMES:
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name).double(), atol=2e-5, rtol=2e-5)


def test_a_sink_of_infinity_takes_everything() -> None:
    sinks = torch.tensor([0.0, torch.inf, -torch.inf, 1.0])
    p = random_problem(4, 2, 2, 100, 70, 32, causal=True, sinks=sinks)
    got, exact = run(TORCH, p.to(torch.float32)), run(get_backend("reference"), p)
    for name in NAMES:
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name).double(), atol=2e-5, rtol=2e-5)


def test_a_gradient_of_nan_at_the_lse_of_an_empty_row_stays_there(plain_backend: Backend) -> None:
    p = random_problem(2, 2, 2, 100, 70, 32, causal=True).to(torch.float32)
    empty = ~p.mask.any(-1)
    assert empty.any()
    got, clean = (run(plain_backend, replace(p, dlse=p.dlse.masked_fill(empty, fill))) for fill in (torch.nan, 0.0))
    for name in NAMES:
        assert torch.equal(getattr(got, name), getattr(clean, name)), name


def test_low_precision_is_rounded_once() -> None:
    """float32 inside: the result is the float32 result of the same inputs, rounded."""
    p = random_problem(4, 2, 2, 130, 130, 32, causal=True).to(torch.bfloat16)
    out, lse = TORCH.forward(*p.arguments)
    wide, wide_lse = TORCH.forward(p.q.float(), p.k.float(), p.v.float(), p.layout, p.scoring)
    assert torch.equal(out, wide.bfloat16()) and torch.equal(lse, wide_lse)


def test_rows_are_views_where_the_last_stride_is_one() -> None:
    fused = torch.randn(2, 10, 3, 4, 8)
    for x, copied in (
        (fused[:, :, 1], False),
        (fused[:, 2:7, 2, :, :5], False),
        (fused[:, :, 0].mT, True),
        (fused[0].expand(3, -1, -1, -1, -1)[:, :, 1], False),
    ):
        rows = Rows.of(x)
        assert (rows.table.untyped_storage().data_ptr() != fused.untyped_storage().data_ptr()) == copied
        where = torch.meshgrid(*(torch.arange(n) for n in x.shape[:3]), indexing="ij")
        assert torch.equal(rows.take(*where, x.dtype), x)


def test_nothing_of_the_process_is_changed() -> None:
    def settings() -> tuple:
        threads = torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype()
        return *threads, torch.are_deterministic_algorithms_enabled(), torch.random.get_rng_state().tolist(), dict(os.environ)

    torch.set_num_threads(3)
    p = random_problem(4, 2, 4, 100, 100, 32, causal=True).to(torch.float32)
    square = build_layout(Dense(), 4, 2, 96, block=32)
    before = settings()
    run(TORCH, p)
    pages = Pages(p.k[0, :96].unflatten(0, (6, 16)), p.v[0, :96].unflatten(0, (6, 16)), torch.arange(6).view(1, 1, 6))
    TORCH.forward_paged(p.q[:1, :3], pages, Requests(torch.tensor([90]), None), square, Scoring(0.3))
    assert settings() == before


def test_autocast_autograd_and_inference_mode_stay_outside(backend: Backend) -> None:
    p = random_problem(4, 2, 2, 100, 100, 32, causal=True).to(torch.float32)
    expected = run(backend, p)
    for tensor in (p.q, p.k, p.v):
        tensor.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(backend, p)
    with torch.inference_mode():
        inside = run(backend, replace(p, **{name: getattr(p, name).clone() for name in ("q", "k", "v", "dout")}))
    for name in NAMES:
        assert torch.equal(getattr(got, name), getattr(expected, name)) and not getattr(got, name).requires_grad
        assert torch.equal(getattr(inside, name), getattr(expected, name))
