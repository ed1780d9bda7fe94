"""The Gluon kernels for Hopper, their own source run on a CPU (`tests.support.gluon`), against the float64 oracle."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsource

import pytest
import torch

from s2attn import Dense, Local, Pattern, Random, Sink, Stride, Window, build_layout
from tests.support import assert_close, dense_mask, eager, oracle
from tests.support.problems import Problem, make_problem, random_problem

# pattern, T, S, H, G, D, DV, block, causal, query heads stacked
CASES: dict[str, tuple[Pattern, int, int, int, int, int, int, int, bool, int]] = {
    "block 64, two heads stacked": (Local(2) | Stride(3), 300, 300, 4, 2, 64, 64, 64, True, 2),
    "many full entries": (Dense(), 200, 830, 2, 1, 64, 64, 64, True, 2),
    "many full entries, 128 wide": (Dense(), 130, 500, 1, 1, 128, 128, 64, True, 1),
    "block 64, two rows paired": (Local(2) | Stride(3), 330, 330, 2, 2, 64, 64, 64, True, 1),
    "block 64, lists per query head": (Local(1) | Random(1, heads="query"), 200, 260, 2, 1, 64, 64, 64, True, 1),
    "block 64, 128 wide": (Local(2), 150, 150, 2, 1, 128, 128, 64, True, 2),
    "block 128, own width of v": (Window(150) | Sink(5), 280, 280, 2, 1, 64, 128, 128, True, 1),
    "block 256": (Window(90), 270, 270, 1, 1, 64, 64, 256, True, 1),
    "rows that see nothing": (Stride(4, offset=1), 200, 330, 4, 1, 64, 64, 64, True, 2),
    "more queries than keys": (Dense(), 150, 70, 2, 1, 64, 64, 64, True, 2),
    "not causal, full only": (Dense(), 128, 192, 2, 1, 64, 64, 64, False, 2),
    "not causal": (Window(30) | Random(1), 130, 190, 2, 2, 64, 64, 64, False, 1),
}


@pytest.fixture
def launch():
    """A forward pass by the Hopper kernel. Returns out, lse and what it needed of the layout."""
    pytest.importorskip("triton", reason="triton is not installed")
    from s2attn.backends.triton.hopper import HopperWay
    from tests.support.gluon.launches import hopper_on_cpu

    def run(p: Problem, seed: int = 0, **options):
        with hopper_on_cpu(seed=seed, **options) as backend:
            out, lse = backend.forward(*p.arguments)
        (way,) = backend.ways(p.layout)
        assert isinstance(way.special, HopperWay)
        return out, lse, way.special

    return run


def check(p: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Errors at most twice those of eager code in this dtype."""
    given = {"softcap": p.softcap, "sinks": p.sinks}
    exact = p.to(torch.float64)
    expected = oracle(exact.q, exact.k, exact.v, p.mask, p.scoring.scale, softcap=p.softcap, sinks=exact.sinks)
    plain = eager(p.q, p.k, p.v, p.mask, p.scoring.scale, **given)
    for name, value, like, right in zip(("out", "lse"), (out, lse), plain, expected, strict=True):
        assert value.shape == right.shape
        assert_close(name, value, like, right)


def problem(name: str, dtype: torch.dtype = torch.bfloat16, **more) -> Problem:
    pattern, n, m, heads, kv_heads, dim, dim_v, block, causal, _ = CASES[name]
    torch.manual_seed(0)
    layout = build_layout(pattern, heads, kv_heads, n, m, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, m, causal=causal)
    return make_problem(layout, mask, heads=heads, kv_heads=kv_heads, batch=2, width=dim, v_width=dim_v, **more).to(dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_agrees_with_the_oracle(name, dtype, launch, poisoned_empty):
    p = problem(name, dtype)
    out, lse, way = launch(p)
    check(p, out, lse)
    assert way.form.stack == CASES[name][-1]


@pytest.mark.parametrize("name", ["block 64, two heads stacked", "block 64, two rows paired", "rows that see nothing"])
def test_soft_cap_and_sinks(name, launch, poisoned_empty):
    p = problem(name, softcap=1.5, sinks=torch.randn(CASES[name][3]))
    check(p, *launch(p)[:2])
    p = problem(name, sinks=torch.randn(CASES[name][3]))
    check(p, *launch(p)[:2])


@pytest.mark.parametrize("seed", range(12))
def test_random_masks_rings_and_orders(seed, launch, poisoned_empty):
    torch.manual_seed(seed)
    heads, kv_heads, layout_heads = [(2, 1, 1), (2, 2, 2), (4, 2, 2), (3, 1, 1), (2, 1, 2), (1, 1, 1)][seed % 6]
    block = 128 if seed % 4 == 3 else 64
    n, m = (int(torch.randint(1, 420, ())) for _ in range(2))
    p = random_problem(heads, kv_heads, layout_heads, n, m, block, causal=seed % 2 == 0, batch=1 + seed % 2, width=64).to(torch.float16)
    rings = {"ring": 1 + seed % 4, "line_ring": 1 + seed % 2, "join": 2 if seed % 3 else 1}
    check(p, *launch(p, seed, programs=1 + seed % 5, **rings)[:2])


def packed_problem(heads: int) -> tuple[Problem, int]:
    """Sequences of several lengths, none among them; and where the first one ends."""
    pattern, lengths = Local(2) | Stride(2), [0, 100, 0, 75, 64, 190]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    layout = build_layout(pattern, heads, 1, cu_seqlens_q=cu, cu_seqlens_k=cu)
    mask = torch.zeros(heads, total, total, dtype=torch.bool)
    for lo, n in zip(cu.tolist(), lengths, strict=False):
        mask[:, lo : lo + n, lo : lo + n] = dense_mask(pattern, heads, 1, n, n) if n else False
    return make_problem(layout, mask, heads=heads, kv_heads=1, width=64).to(torch.bfloat16), 100


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("ring", [1, 3])
def test_a_packed_sequence_reads_nothing_of_the_next(heads, ring, launch, poisoned_empty):
    p, end = packed_problem(heads)
    out, lse, way = launch(p, ring, ring=ring)
    check(p, out, lse)
    assert way.packed
    # Even numbers that are none, which a weight of 0 would not hide, stay in their own sequence.
    k, v = p.k.clone(), p.v.clone()
    k[:, end:] = v[:, end:] = float("nan")
    again, lse_again, _ = launch(replace(p, k=k, v=v), ring, ring=ring)
    assert torch.equal(again[:, :end], out[:, :end]) and torch.equal(lse_again[..., :end], lse[..., :end])


def test_any_strides(launch):
    p = problem("block 64, two rows paired")
    expected, lse, _ = launch(p)
    turned = replace(p, **{name: getattr(p, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")})
    out, lse_turned, _ = launch(turned, seed=1)
    assert torch.equal(out, expected) and torch.equal(lse_turned, lse)


def planted(tmp_path, room: str, right: str, wrong: str):
    """The kernel with one place of its source, or of the pieces', replaced."""
    from s2attn.kernels.hopper import forward, pieces

    made = {}
    for name, module in (("pieces", pieces), ("forward", forward)):
        text = getsource(module)
        assert name != room or text.count(right) >= 1, f"the source has no {right!r}"
        path = tmp_path / f"planted_{name}.py"
        path.write_text(text.replace(right, wrong) if name == room else text)
        spec = spec_from_file_location(path.stem, path)
        made[name] = sys.modules[path.stem] = module_from_spec(spec)
        spec.loader.exec_module(made[name])
    for name, value in vars(made["pieces"]).items():
        if not name.startswith("__") and hasattr(made["forward"], name):
            setattr(made["forward"], name, value)
    return made["forward"].hopper_forward_kernel


RELEASE_K = "mbarrier.arrive(k_empty.index(next_stage), count=1)"
RELEASE_V = "            mbarrier.arrive(v_empty.index(stage), count=1)\n            stage = next_stage"
# room, right, wrong, case
FAULTS = {
    "the producer waits for the wrong phase": ("forward", "    phase = 1\n", "    phase = 0\n", 0),
    "values released while their product runs": (
        "forward",
        f"            acc = warpgroup_mma_wait(0, deps=[summed])\n{RELEASE_V}",
        RELEASE_V.replace("stage =", "acc = warpgroup_mma_wait(0, deps=[summed])\n            stage ="),
        0,
    ),
    "a wait that lets a product slip": ("forward", "wait(1, deps=[coming])", "wait(2, deps=[coming])", 0),
    "values never released": ("forward", RELEASE_V, "            stage = next_stage", 0),
    "keys released at the wrong stage": ("forward", RELEASE_K, RELEASE_K.replace("next_stage", "stage"), 0),
    "values not waited for": ("forward", "mbarrier.wait(v_ready.index(stage), phase)\n            summed", "summed", 0),
    "keys not waited for": ("forward", "        mbarrier.wait(k_ready.index(stage), phase)\n        if code", "        if code", 1),
    "a consumer that skips ahead": ("forward", "            mbarrier.wait(v_ready.index(stage), phase)\n        else:", "        else:", 1),
    "queries never released": ("forward", "        mbarrier.arrive(q_empty.index(own), count=1)\n", "", 0),
    "queries of another item": ("forward", "own = turn * 2 + which", "own = which", 0),
    "one arrival for two consumers": ("forward", "begin_barriers(k_empty, RING, 2)", "begin_barriers(k_empty, RING, 1)", 0),
    "phases that never flip": ("pieces", "gl.where(around, phase ^ 1, phase)", "phase", 0),
    "items left out": ("pieces", "(2 * around + 1) * programs - 1 - step", "(2 * around + 1) * programs - step", 0),
    "a full entry left over, forgotten": ("forward", "q_tile, full % JOIN, others", "q_tile, 0, others", 0),
    "sums not scaled": ("forward", "return acc * gl.convert_layout(keep, OF_ROWS)[:, None], m_new", "return acc, m_new", 0),
    "the code of the other row": ("forward", "            code_ptr += which\n", "", 1),
    "the rows of another tile": ("forward", "place = row\n", "place = 0\n", 2),
    "the first word of every mask": ("pieces", "* WORDS + word", "* WORDS", 2),
    "lse in base 2": ("forward", "gl.log2(total)) * LN2", "gl.log2(total))", 0),
    "rows beyond the end": ("forward", "mask=(lane < count)[:, None]", "mask=(lane < ROWS)[:, None]", 3),
    "a descriptor made too early": ("forward", "gl.where(i < stage, phase ^ 1, phase)", "1", 3),
}
PLACES = ["many full entries", "block 64, two rows paired", "block 256", "packed"]


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, launch, poisoned_empty, tmp_path):
    room, right, wrong, where = FAULTS[name]
    p = packed_problem(2)[0] if PLACES[where] == "packed" else problem(PLACES[where])
    kernel = planted(tmp_path, room, right, wrong)
    with pytest.raises(AssertionError):
        for seed in range(3):
            check(p, *launch(p, seed, faulty=kernel, ring=2)[:2])


def test_objections():
    from s2attn.backends import Scoring
    from s2attn.backends.triton.hopper import can_copy, hopper_objections

    q, k, v = (torch.zeros(2, 80, heads, 64, dtype=torch.float16) for heads in (2, 1, 1))
    layout, plain = build_layout(Dense(), 2, 1, 80), Scoring(0.1)
    assert hopper_objections("forward", q, k, v, layout, plain) == []
    assert hopper_objections("dq", q, k, v, layout, Scoring(-0.1)) == hopper_objections("dkv", q, k, v, layout, plain) == []
    apart = build_layout(Random(1, heads="query"), 2, 1, 80)
    assert hopper_objections("dkv", q, k, v, apart, plain) == ["the same lists for all query heads of a group, not 2 lists for 1 KV heads"]
    assert hopper_objections("forward", q.float(), k.float(), v.float(), layout, plain) == ["float16 or bfloat16, not torch.float32"]
    assert hopper_objections("forward", q[..., :48], k[..., :48], v, layout, plain) == ["head width 48 is not 64 or 128"]
    assert hopper_objections("forward", q, k, v, build_layout(Dense(), 2, 1, 80, block=32), plain) == [
        "blocks of 64 tokens or more, not 32"
    ]
    assert hopper_objections("forward", q, k, v, layout, Scoring(-0.1)) == ["a scale above 0 where there is no soft-cap, not -0.1"]
    assert hopper_objections("forward", q, k, v, layout, Scoring(-0.1, 3.0)) == []
    assert "a descriptor of no rows" in hopper_objections("forward", q, k[:, :0], v[:, :0], layout, plain)[0]
    assert (
        can_copy(q, k, v) and not can_copy(k.expand(2, 80, 2, 64)) and not can_copy(torch.zeros(1, 4, 1, 65, dtype=torch.float16)[..., :64])
    )


def test_only_hopper_takes_it():
    pytest.importorskip("triton", reason="triton is not installed")
    from s2attn.backends.triton import Triton
    from s2attn.backends.triton.backend import find_tiles
    from s2attn.backends.triton.ways import can_take

    assert not can_take("hopper", torch.device("cpu"), torch.float16)
    p = problem("not causal, full only", torch.float16)
    backend = Triton(lambda *given: replace(find_tiles(*given), form="hopper"))
    out, lse = backend.forward(*p.arguments)
    check(p, out, lse)
    assert [way.special for way in backend.ways(p.layout)] == [None]


def test_masks_as_words():
    from s2attn.backends.triton.hopper import mask_words

    tiles = torch.rand(3, 128, 128) < 0.5
    words = mask_words(tiles)
    assert words.shape == (3 * 128, 2) and words.dtype == torch.int64
    bits = (words[..., None] >> torch.arange(64)) & 1
    assert torch.equal(bits.view(3, 128, 128).bool(), tiles)
    assert mask_words(tiles[:0]).shape == (0, 2)


def test_one_scale_does_not_answer_for_another(monkeypatch):
    """The kernel wants a positive scale; what was chosen for one is not what a negative one gets."""
    pytest.importorskip("triton", reason="triton is not installed")
    from s2attn.backends import Scoring
    from s2attn.backends.triton import Triton, ways
    from s2attn.backends.triton.backend import find_tiles

    monkeypatch.setattr(ways, "can_take", lambda *_: True)
    backend = Triton(lambda *given: replace(find_tiles(*given), form="hopper"))
    p = problem("not causal, full only", torch.float16)
    q, k, v, layout = p.arguments[:4]
    chosen = [backend._way("forward", q, k, v, layout, Scoring(scale)).special for scale in (0.1, -0.1, 0.2)]
    assert [special is None for special in chosen] == [False, True, False]
