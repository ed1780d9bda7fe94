"""dq and dkv of the Hopper kernels, run on a CPU by the rules of barriers, copies and products, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from s2attn import Dense, Local, Pattern, Random, Sink, Stride, Window, build_layout
from s2attn.backends.triton import hopper_backward
from s2attn.backends.triton.hopper_backward import HopperForm, hopper_dkv, hopper_dq, hopper_way
from s2attn.backends.triton.walk import walk_columns, walk_rows
from s2attn.testing import dense_mask
from s2attn.testing.gluon import run_gluon
from s2attn.testing.oracle import assert_close, eager, oracle
from s2attn.testing.problems import Problem, by_autograd, make_problem

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture
def on_cpu(monkeypatch):
    """Starts the kernels in the runner; call with a seed."""

    def seeded(seed: int) -> None:
        def start(kernel, pointers, starts, key, describe):
            call = describe()
            constants = {name: value for name, value in call.constants.items() if name != "num_warps"}
            run_gluon(kernel, call.grid, *pointers, *call.rest, seed=seed, **constants)

        monkeypatch.setattr(hopper_backward, "start", start)

    return seeded


def gradients(p: Problem, form_dq: HopperForm, form_dkv: HopperForm, key_range: int = 0):
    """dq, dk, dv of the Hopper kernels, given what the forward pass has left."""
    heads, kv_heads, block = p.q.shape[2], p.k.shape[2], p.layout.block
    out, lse = oracle(p.q, p.k, p.v, p.mask, p.scoring.scale, softcap=p.softcap)
    delta = (out * p.dout.double()).sum(-1).transpose(1, 2) - p.dlse.double()
    delta = torch.where(torch.isfinite(lse), delta, torch.zeros_like(delta)).float()
    rows = walk_rows(p.layout, form_dq.factor(block), 1, heads // p.layout.heads, key_range)
    columns = walk_columns(p.layout, form_dkv.factor(block), 1, heads, kv_heads)
    given = (p.q, p.k, p.v, p.dout, lse.float(), delta)
    dq = hopper_dq(*given, hopper_way("dq", form_dq, p.layout, rows), p.scoring)
    return dq, *hopper_dkv(*given, hopper_way("dkv", form_dkv, p.layout, columns), p.scoring)


def check(p: Problem, *forms: HopperForm, **more) -> None:
    exact, plain = by_autograd(oracle, p.to(torch.float64)), by_autograd(eager, p)
    for name, got in zip(("dq", "dk", "dv"), gradients(p, *forms, **more), strict=True):
        value = getattr(exact, name)
        assert got.dtype == p.q.dtype
        assert_close(name, got, getattr(plain, name), value, terms=4 * max(1.0, value.abs().max().item()))


# pattern, T, S, H, G, D, DV, block, causal
CASES: dict[str, tuple[Pattern, int, int, int, int, int, int, int, bool]] = {
    "two heads stacked": (Local(2) | Stride(3), 300, 300, 4, 2, 64, 64, 64, True),
    "two rows merged": (Local(2) | Stride(3), 330, 330, 1, 1, 64, 64, 64, True),
    "blocks of 128": (Window(150) | Sink(5), 280, 280, 2, 1, 64, 128, 128, True),
    "blocks of 256": (Window(90), 270, 270, 1, 1, 64, 64, 256, True),
    "rows that see nothing": (Stride(4, offset=1), 200, 330, 4, 1, 64, 64, 64, True),
    "more queries than keys": (Dense(), 150, 70, 2, 1, 128, 128, 64, True),
    "not causal, full only": (Dense(), 128, 192, 2, 1, 128, 64, 64, False),
    "not causal": (Window(30) | Random(1), 130, 190, 2, 2, 64, 64, 64, False),
}


def problem(name: str, dtype: torch.dtype = torch.float16, **more) -> Problem:
    pattern, n, m, heads, kv_heads, dim, dim_v, block, causal = CASES[name]
    torch.manual_seed(0)
    layout = build_layout(pattern, heads, kv_heads, n, m, block=block, causal=causal)
    mask = dense_mask(pattern, heads, kv_heads, n, m, causal=causal)
    return make_problem(layout, mask, heads=heads, kv_heads=kv_heads, width=dim, v_width=dim_v, **more).to(dtype)


def forms(p: Problem) -> tuple[HopperForm, HopperForm]:
    shape = p.q.shape[-1], p.v.shape[-1], p.layout.block, p.q.shape[2] // p.k.shape[2]
    return tuple(hopper_backward.choose_hopper_form(op, *shape) for op in ("dq", "dkv"))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name, on_cpu, poisoned_empty):
    on_cpu(len(name))
    p = problem(name)
    check(p, *forms(p))
