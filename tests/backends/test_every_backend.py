"""What every backend must do: the same results as a dense float64 oracle, for every shape, dtype and layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2attn import Local, Sink, Stride, Window
from s2attn.backends import Backend
from s2attn.layout import Layout, build_layout
from s2attn.testing import dense_mask
from s2attn.testing.problems import Problem, check_backend, make_problem, random_mask, random_problem, run

pytestmark = [
    # The interpreter turns arrays of one element into scalars, which NumPy announces to refuse one day; and it says when numbers overflow.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
SCORINGS = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.7, -2.0, 0.0, 5.0])},
    "both": {"softcap": 0.8, "sinks": torch.tensor([-1.0, 3.0, 0.5, -torch.inf])},
}
"""Ways to score for four heads: the caps bend many of the logits of normal numbers."""
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")
slow_fixture = [HealthCheck.function_scoped_fixture]


def test_dtypes(backend_and_dtype: tuple[Backend, torch.dtype]) -> None:
    backend, dtype = backend_and_dtype
    check_backend(backend, random_problem(4, 2, 2, 150, 150, 32, causal=True, batch=2), dtype)


@pytest.mark.parametrize(
    "heads",
    sorted({(h, g, of) for h, g in [(1, 1), (3, 3), (4, 1), (4, 2), (6, 3), (8, 2)] for of in (1, g, h)} | {(6, 3, 2)}),
    ids=str,
)
def test_groups_of_heads(backend: Backend, heads: tuple[int, int, int]) -> None:
    """Query heads, KV heads, heads of the layout."""
    check_backend(backend, random_problem(*heads, 70, 90, 16, width=16))


@pytest.mark.parametrize("width", [8, 16, 48, 64, 80, 96, 112, 160, 192, 256])
def test_head_widths(backend: Backend, width: int) -> None:
    check_backend(backend, random_problem(2, 1, 1, 80, 80, 32, causal=True, width=width))


@pytest.mark.parametrize(("width", "v_width"), [(16, 48), (48, 16), (64, 1), (192, 128)])
def test_values_of_their_own_width(backend: Backend, width: int, v_width: int) -> None:
    check_backend(backend, random_problem(4, 2, 2, 70, 70, 32, width=width, v_width=v_width))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 333), (5, 130), (64, 64), (65, 63), (100, 300), (300, 100), (257, 257)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(backend: Backend, lengths: tuple[int, int], causal: bool) -> None:
    check_backend(backend, random_problem(2, 2, 2, *lengths, 64, causal=causal, width=16, batch=2))


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_blocks(backend: Backend, block: int) -> None:
    check_backend(backend, random_problem(2, 1, 1, 300, 300, block, causal=True, width=16))


@settings(max_examples=25, deadline=None, suppress_health_check=slow_fixture)
@given(
    seed=st.integers(0, 10**6),
    heads=st.sampled_from([(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 4), (4, 2, 2), (6, 3, 2), (8, 1, 1)]),
    lengths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    block=st.sampled_from([16, 32, 64]),
    causal=st.booleans(),
    batch=st.integers(1, 3),
    dlse=st.booleans(),
    softcap=st.sampled_from([None, 0.5, 2.0, 30.0]),
    with_sinks=st.booleans(),
)
def test_random_layouts(backend, seed, heads, lengths, block, causal, batch, dlse, softcap, with_sinks) -> None:
    torch.manual_seed(seed)
    scoring = {"softcap": softcap, "sinks": 3 * torch.randn(heads[0]) if with_sinks else None}
    if backend.name == "triton":  # the interpreter takes its time
        lengths, batch = (-(-lengths[0] // 3), -(-lengths[1] // 3)), 1
    check_backend(backend, random_problem(*heads, *lengths, block, causal=causal, width=16, batch=batch, dlse=dlse, **scoring))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("lengths", [(150, 90), (5, 130)], ids=str)
def test_softcap_and_sinks(backend_and_dtype: tuple[Backend, torch.dtype], scoring: str, lengths: tuple[int, int]) -> None:
    """With grouped heads, and, where there are more queries than keys, rows that see nothing."""
    backend, dtype = backend_and_dtype
    p = random_problem(4, 2, 2, *lengths, 32, causal=True, batch=2, **SCORINGS[scoring])
    assert lengths[0] < lengths[1] or not p.mask.any(-1).all()
    check_backend(backend, p, dtype)


def test_a_row_that_sees_nothing_has_the_lse_of_its_sink(backend: Backend) -> None:
    p = random_problem(4, 2, 4, 100, 40, 32, causal=True, batch=2, **SCORINGS["both"]).to(torch.float32)
    got, empty = run(backend, p), ~p.mask.any(-1)
    lse = p.sinks[:, None].expand(4, 100)
    assert all(torch.all(got.out[i].transpose(0, 1)[empty] == 0) and torch.equal(got.lse[i][empty], lse[empty]) for i in range(2))
    assert torch.all(got.dq.transpose(1, 2)[:, empty] == 0)


def test_sinks_of_minus_infinity_change_nothing(backend: Backend) -> None:
    p = random_problem(4, 2, 2, 100, 70, 32, causal=True).to(torch.float32)
    without, got = run(backend, p), run(backend, replace(p, sinks=torch.full((4,), -torch.inf)))
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(got, name), getattr(without, name)), name
    assert not got.dsinks.any()


@pytest.mark.parametrize("sink", [1e4, -1e4])
def test_sinks_far_from_the_logits(backend: Backend, sink: float) -> None:
    """A sink that outweighs everything leaves out 0 and its own value as lse; one that weighs nothing changes nothing."""
    p = random_problem(4, 2, 2, 100, 70, 32).to(torch.float32)
    without, got = run(backend, p), run(backend, replace(p, sinks=torch.full((4,), sink)))
    assert all(getattr(got, name).isfinite().all() for name in NAMES)
    if sink > 0:
        assert not (got.out.any() or got.dq.any() or got.dk.any() or got.dv.any()) and torch.all(got.lse == sink)
    else:
        seen = p.mask.any(-1)[None]
        torch.testing.assert_close(got.out, without.out)
        torch.testing.assert_close(got.lse[seen], without.lse[seen])


def test_a_cap_far_above_the_logits_changes_nothing(plain_backend: Backend) -> None:
    p = random_problem(4, 2, 2, 100, 70, 32).to(torch.float64)
    plain, got = run(plain_backend, p), run(plain_backend, replace(p, softcap=1e6))
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(got, name), getattr(plain, name), atol=1e-9, rtol=1e-9)


def test_large_products_stay_under_the_cap(backend: Backend) -> None:
    p = random_problem(2, 2, 2, 100, 100, 32, width=64, softcap=20.0).to(torch.float32)
    got = run(backend, replace(p, q=p.q * 1e4, k=p.k * 1e4))
    assert all(getattr(got, name).isfinite().all() for name in ("out", "dq", "dk", "dv"))
    assert got.lse.max() <= 20 + torch.tensor(100.0).log()


def packed_problem(lengths_q: list[int], lengths_k: list[int], heads: int, kv_heads: int) -> Problem:
    pattern = Local(2, 16) | Stride(3, block=16) | Sink(5)
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    layout = build_layout(pattern, heads, kv_heads, block=32, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    mask = torch.zeros(heads, sum(lengths_q), sum(lengths_k), dtype=torch.bool)
    for i, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        if length_q and length_k:
            mask[:, cu_q[i] : cu_q[i + 1], cu_k[i] : cu_k[i + 1]] = dense_mask(pattern, heads, kv_heads, length_q, length_k)
    return make_problem(layout, mask, heads=heads, kv_heads=kv_heads, width=16)


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([100, 0, 33, 64, 7], [100, 0, 33, 64, 7]),
        ([1, 1, 1, 1], [50, 1, 130, 64]),
        ([40, 3, 0, 90], [200, 0, 64, 17]),
        ([0, 0, 70], [0, 5, 70]),
        ([130], [130]),
    ],
)
def test_packed_sequences(backend: Backend, lengths_q: list[int], lengths_k: list[int]) -> None:
    check_backend(backend, packed_problem(lengths_q, lengths_k, 4, 2))


def test_empty_rows(backend: Backend) -> None:
    p = random_problem(2, 2, 2, 100, 40, 32, causal=True).to(torch.float32)
    got, empty = run(backend, p), ~p.mask.any(-1)
    assert empty.any()
    assert torch.all(got.out.transpose(1, 2)[0][empty] == 0) and torch.all(got.lse[0][empty] == -torch.inf)
    assert torch.all(got.dq.transpose(1, 2)[0][empty] == 0)


def test_a_layout_that_lists_nothing(backend: Backend) -> None:
    mask = torch.zeros(1, 50, 70, dtype=torch.bool)
    got = run(backend, make_problem(Layout.from_dense(mask, block=32), mask, heads=2, kv_heads=1).to(torch.float32))
    assert not got.out.any() and torch.all(got.lse == -torch.inf)
    assert not (got.dq.any() or got.dk.any() or got.dv.any())


def test_strides_do_not_matter(backend: Backend) -> None:
    p = random_problem(4, 2, 2, 90, 90, 32, batch=2).to(torch.float32)
    expected = run(backend, p)

    def strided(x: torch.Tensor) -> list[torch.Tensor]:
        by_head = x.transpose(1, 2).contiguous().transpose(1, 2)
        in_cache = torch.full((x.shape[0], x.shape[1] + 9, *x.shape[2:]), torch.nan)[:, 3:-6].copy_(x)
        fused = torch.full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 3), torch.nan)[:, :, ::2, 1:-2].copy_(x)
        by_width = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
        return [by_head, in_cache, fused, by_width]

    for q, k, v, dout in zip(strided(p.q), strided(p.k), strided(p.v), strided(p.dout), strict=True):
        got = run(backend, Problem(q, k, v, dout, p.dlse, p.layout, p.mask))
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(got, name), getattr(expected, name))


def test_expanded_inputs(backend: Backend) -> None:
    p = random_problem(4, 2, 2, 50, 50, 16, batch=1).to(torch.float32)
    twice = Problem(*(x.expand(2, -1, -1, -1) for x in (p.q, p.k, p.v, p.dout)), p.dlse.expand(2, -1, -1), p.layout, p.mask)
    one, two = run(backend, p), run(backend, twice)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(two, name), getattr(one, name).expand_as(getattr(two, name)))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("heads", [(4, 2), (1, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 5, 200])
@pytest.mark.parametrize("bent", [False, True], ids=["plain", "softcap and sinks"])
def test_same_bits_every_time_and_whatever_else_is_in_the_batch(
    backend: Backend, heads: tuple[int, int], seqlen_q: int, bent: bool
) -> None:
    scoring = {"softcap": 2.0, "sinks": torch.randn(heads[0])} if bent else {}
    small = backend.name == "triton"  # the interpreter takes its time
    for dtype in (torch.float32, torch.float16 if backend.name in ("cpu", "triton") else torch.float64):
        shape = {"batch": 2, "width": 16} if small else {"batch": 5, "width": 64}
        p = random_problem(*heads, 1, min(seqlen_q, 100) if small else seqlen_q, 100 if small else 200, 32, **shape, **scoring).to(dtype)
        first, second = run(backend, p), run(backend, p)
        alone = run(backend, replace(p, **{name: getattr(p, name)[-1:] for name in ("q", "k", "v", "dout", "dlse")}))
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
            assert torch.equal(getattr(first, name)[-1:], getattr(alone, name)), name


@pytest.mark.usefixtures("two_threads")
def test_packing_does_not_change_bits(backend: Backend) -> None:
    packed = packed_problem([100, 33, 200, 7], [100, 33, 200, 7], 4, 2).to(torch.float32)
    alone = packed_problem([200], [200], 4, 2)
    part = slice(133, 333)
    alone = Problem(*(x[:, part] for x in (packed.q, packed.k, packed.v, packed.dout)), packed.dlse[..., part], alone.layout, alone.mask)
    got, expected = run(backend, packed), run(backend, alone)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(got, name)[:, part], getattr(expected, name)), name
    assert torch.equal(got.lse[..., part], expected.lse)


@pytest.mark.parametrize("scoring", ["plain", "both"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_masked_keys_never_leak(masking_backend: Backend, value: float, scoring: str) -> None:
    """Bad numbers in keys that a query does not see change nothing for it: not in other blocks, not inside its own partial blocks."""
    p = random_problem(4, 2, 2, 150, 150, 32, causal=True, width=16, **SCORINGS.get(scoring, {})).to(torch.float32)
    clean = run(masking_backend, p)
    for broken in ([140], [70, 71], [3, 40, 149]):
        k, v = p.k.clone(), p.v.clone()
        k[:, broken[:1], :, 3], v[:, broken] = value, value
        seen = p.mask[:, :, broken].any(-1).t()[None]
        dirty = replace(p, k=k, v=v)
        out, lse = masking_backend.forward(*dirty.arguments)
        assert torch.allclose(out[~seen], clean.out[~seen], atol=1e-5)
        assert torch.allclose(lse.transpose(1, 2)[~seen], clean.lse.transpose(1, 2)[~seen], atol=1e-5)
        assert not out[seen].isfinite().all(-1).any()
        dq = run(masking_backend, dirty).dq
        assert torch.allclose(dq[~seen], clean.dq[~seen], atol=1e-5)


def test_numbers_beyond_a_short_sequence_are_not_read(backend: Backend) -> None:
    p = random_problem(2, 2, 2, 70, 70, 64, width=16).to(torch.float32)
    expected = run(backend, p)
    room = {name: torch.full((1, 200, 2, 16), torch.nan) for name in "qkvo"}
    q, k, v, dout = (room[name][:, 50:120].copy_(x) for name, x in zip("qkvo", (p.q, p.k, p.v, p.dout), strict=True))
    got = run(backend, Problem(q, k, v, dout, p.dlse, p.layout, p.mask))
    assert all(torch.equal(getattr(got, n), getattr(expected, n)) for n in ("out", "lse", "dq", "dk", "dv"))


@pytest.mark.usefixtures("poisoned_empty")
def test_memory_that_was_never_written_is_not_read(backend: Backend) -> None:
    check_backend(backend, random_problem(4, 2, 2, 150, 100, 32, causal=True))


class Attend(torch.autograd.Function):
    """A backend as a differentiable function, for gradcheck."""

    @staticmethod
    def forward(ctx, q, k, v, backend, layout, scoring):
        out, lse = backend.forward(q, k, v, layout, scoring)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = backend, layout, scoring
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        backend, layout, scoring = ctx.rest
        return *backend.backward(dout, dlse, *ctx.saved_tensors, layout, scoring), None, None, None


@pytest.mark.parametrize("scoring", ["plain", *SCORINGS])
def test_gradients_are_derivatives(plain_backend: Backend, scoring: str) -> None:
    """Those of q, k and v; that of the sinks is the op's, and tested there."""
    mask = random_mask(2, 20, 24, 16) | torch.eye(20, 24, dtype=torch.bool)
    layout = Layout.from_dense(mask, block=16)
    p = make_problem(layout, mask, heads=4, kv_heads=2, width=3, v_width=2, **SCORINGS.get(scoring, {}))
    inputs = [x.requires_grad_() for x in (p.q, p.k, p.v)]
    assert torch.autograd.gradcheck(lambda q, k, v: Attend.apply(q, k, v, plain_backend, p.layout, p.scoring), inputs, fast_mode=True)


def test_sharp_softmax(backend: Backend) -> None:
    """Large scores: the maximum must be taken off before exponentials."""
    p = random_problem(2, 2, 2, 100, 100, 32, width=64)
    check_backend(backend, Problem(p.q * 6, p.k * 2, p.v, p.dout, p.dlse, p.layout, p.mask))
    huge = run(backend, Problem(p.q * 1e4, p.k * 1e4, p.v, p.dout, p.dlse, p.layout, p.mask).to(torch.float32))
    assert all(getattr(huge, name).isfinite().all() for name in ("out", "dq", "dk", "dv"))


def test_window_and_sink(backend: Backend) -> None:
    pattern = Sink(3) | Window(50)
    layout = build_layout(pattern, 2, seqlen_q=170, block=32)
    check_backend(backend, make_problem(layout, dense_mask(pattern, 2, 2, 170, 170), heads=2, kv_heads=2))
