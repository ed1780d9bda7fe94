"""The warp-specialised kernels in Triton's interpreter against the float64 oracle: the same source, run without its warps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2attn import Dense, Local, Pattern, Random, Sink, Stride, Window, build_layout
from s2attn.backends import Scoring
from tests.support import dense_mask
from tests.support.problems import Problem, check_backend, make_problem, run

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

# pattern, T, S, H, G, D, DV, block, causal, heads stacked in the forward kernel
CASES: dict[str, tuple[Pattern, int, int, int, int, int, int, int, bool, int]] = {
    "block 64, two heads stacked": (Local(2) | Stride(3), 300, 300, 4, 2, 64, 64, 64, True, 2),
    "block 64, two rows merged": (Local(2) | Stride(3), 330, 330, 2, 2, 64, 64, 64, True, 1),
    "block 64, lists per query head": (Local(1) | Random(1, heads="query"), 200, 260, 2, 1, 64, 64, 64, True, 1),
    "block 128, own width of v": (Window(150) | Sink(5), 280, 280, 2, 1, 64, 128, 128, True, 1),
    "block 256": (Window(90), 270, 270, 1, 1, 64, 64, 256, True, 1),
    "rows that see nothing": (Stride(4, offset=1), 200, 330, 4, 1, 64, 64, 64, True, 2),
    "more queries than keys": (Dense(), 150, 70, 2, 1, 64, 64, 64, True, 2),
    "not causal, full only": (Dense(), 128, 192, 2, 1, 64, 64, 64, False, 2),
    "not causal": (Window(30) | Random(1), 130, 190, 2, 2, 64, 64, 64, False, 1),
}


@pytest.fixture
def special(triton_backend):
    """The backend with specialised kernels wherever they can serve; the fixture it stands on says where the interpreter is used."""
    from s2attn.backends.triton import Triton
    from s2attn.backends.triton.backend import find_tiles

    return Triton(lambda *given: replace(find_tiles(*given), form="specialised"))


def problem(name: str, **more) -> Problem:
    pattern, n, m, heads, kv_heads, dim, dim_v, block, causal, _ = CASES[name]
    torch.manual_seed(0)
    layout = build_layout(pattern, heads, kv_heads, n, m, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, m, causal=causal)
    return make_problem(layout, mask, heads=heads, kv_heads=kv_heads, batch=2, width=dim, v_width=dim_v, **more)


def served(backend, layout) -> dict[str, bool]:
    """Which kernels were the specialised ones."""
    return {way.op: way.special is not None for way in backend.ways(layout)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_agrees_with_the_oracle(name, dtype, special, poisoned_empty):
    p = problem(name)
    check_backend(special, p, dtype)
    per_query_head = "per query head" in name
    assert served(special, p.layout) == {"forward": True, "dq": True, "dkv": not per_query_head}
    stacks = {way.special.form.stack for way in special.ways(p.layout) if way.op == "forward"}
    assert stacks == {CASES[name][-1]}


@pytest.mark.parametrize("name", ["block 64, two heads stacked", "block 64, two rows merged", "rows that see nothing"])
def test_soft_cap_and_sinks(name, special, poisoned_empty):
    check_backend(special, problem(name, softcap=1.5, sinks=torch.randn(CASES[name][3])))


def test_long_columns_are_cut(special, poisoned_empty, monkeypatch):
    from s2attn.backends.triton import walk

    monkeypatch.setattr(walk, "LEAST_TOKENS", 64)
    monkeypatch.setattr(walk, "piece_limits", lambda counts, seq, copies, least: torch.full((len(seq),), least).numpy())
    p = problem("block 64, two heads stacked")
    check_backend(special, p)
    cut = {way.op: way.slots for way in special.ways(p.layout)}
    assert cut["forward"] == cut["dq"] == 0 < cut["dkv"]


@pytest.mark.parametrize("heads", [1, 2])
def test_a_packed_sequence_reads_nothing_of_the_next(heads, special, poisoned_empty):
    pattern = Local(2) | Stride(2)
    lengths = [0, 100, 0, 75, 64, 190]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    layout = build_layout(pattern, heads, 1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    mask = torch.zeros(heads, total, total, dtype=torch.bool)
    for lo, n in zip(cu.tolist(), lengths, strict=False):
        mask[:, lo : lo + n, lo : lo + n] = dense_mask(pattern, heads, 1, n, n) if n else False
    p = make_problem(layout, mask, heads=heads, kv_heads=1, width=64).to(torch.float32)
    check_backend(special, p)
    # Even a value that is no number, which a weight of 0 would not hide, stays in its own sequence.
    once = run(special, p)
    first = slice(0, 100)
    v = p.v.clone()
    v[:, 100:] = float("nan")
    out, lse = special.forward(p.q, p.k, v, layout, p.scoring)
    assert torch.equal(out[:, first], once.out[:, first]) and torch.equal(lse[..., first], once.lse[..., first])


def test_what_descriptors_cannot_read_goes_the_plain_way(special, triton_backend):
    p = problem("block 64, two rows merged").to(torch.float32)
    spread = replace(p, v=torch.stack([p.v, p.v], dim=-1).flatten(-2)[..., ::2])
    expected, got = run(triton_backend, p), run(special, spread)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_a_gradient_that_is_one_number_for_all(special):
    p = problem("not causal, full only").to(torch.float32)
    check_backend(special, replace(p, dout=torch.ones(1, 1, 1, 1).expand_as(p.dout)))


def test_gradients_at_odd_addresses_are_copied():
    from s2attn.backends.triton.specialised import is_aligned
    from s2attn.backends.triton.ways import aligned_copy

    odd = torch.randn(80 * 64 + 1, dtype=torch.float16)[1:].view(1, 80, 1, 64)
    assert odd.is_contiguous() and not is_aligned(odd)
    assert is_aligned(aligned_copy(odd)) and torch.equal(aligned_copy(odd), odd)
    assert is_aligned(aligned_copy(torch.ones(1, 1, 1, 1).expand(1, 80, 2, 64)))
    assert aligned_copy(odd.clone()).data_ptr() % 16 == 0


def test_heads_far_apart_go_the_plain_way():
    from s2attn.backends.triton.specialised import fits_columns

    wide = torch.empty(1, 2**20, 32, 64, device="meta").transpose(1, 2).contiguous().transpose(1, 2)
    assert not fits_columns(wide, groups=1) and fits_columns(wide, groups=8)


def test_form_and_objections():
    from s2attn.backends.triton.specialised import choose_form, form_objections, is_aligned

    assert [choose_form("forward", 128, block, 1).factor(block) for block in (64, 128, 256)] == [2, 1, 1]
    assert [choose_form("forward", 128, block, 2).per_block(block) for block in (64, 128, 256)] == [1, 1, 2]
    layout, plain = build_layout(Dense(), 2, 1, 80), Scoring(0.1)
    q, k, v = (torch.zeros(2, 80, heads, 64, dtype=torch.float16) for heads in (2, 1, 1))
    assert form_objections("dkv", q, k, v, layout, Scoring(0.1, 3.0)) == [] and is_aligned(q, k, v)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert is_aligned(*turned)
    assert not is_aligned(torch.stack([v, v], dim=-1).flatten(-2)[..., ::2])
    assert not is_aligned(torch.zeros(2, 80, 1, 65, dtype=torch.float16)[..., :64])
    assert form_objections("dq", q[..., :48], k[..., :48], v, layout, plain) == ["head width 48 is not 64 or 128"]
    small = build_layout(Dense(), 2, 1, 80, block=32)
    assert form_objections("forward", q, k, v, small, plain) == ["blocks of 64 tokens or more, not 32"]
    apart = build_layout(Random(1, heads="query"), 2, 1, 80)
    assert form_objections("forward", q, k, v, apart, plain) == []
    assert form_objections("dkv", q, k, v, apart, plain) == ["the same lists for all query heads of a group, not 2 lists for 1 KV heads"]
    wide = [torch.zeros(2, 80, heads, 128) for heads in (2, 1, 1)]
    assert "a soft-cap only at head width 64" in form_objections("dkv", *wide, layout, Scoring(0.1, 3.0))[0]
