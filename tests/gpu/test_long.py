"""Contexts of 128k tokens and more, and tensors of more than 2^31 elements: sampled rows against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from s2attn import Local, Pattern, Sink, Stride, Window, build_layout
from s2attn.backends import Scoring
from s2attn.patterns import Head
from s2attn.patterns import Shape as Length
from s2attn.tuning.compare import sample_rows
from tests.support import eager, oracle
from tests.support.oracle import assert_close
from tests.support.problems import Problem, by_autograd


@dataclass(frozen=True)
class Shape:
    pattern: Pattern
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    width: int
    gibibytes: float

    @property
    def tiny(self) -> Shape:
        return Shape(self.pattern, min(self.batch, 2), 150, 4, 4 if self.heads == self.kv_heads else 2, 16, 0)


SHAPES = {
    "S2 at 128k": Shape(Local(16) | Stride(8), 1, 131072, 16, 16, 128, 16),
    "groups at 128k": Shape(Local(16) | Stride(16), 1, 131072, 32, 8, 128, 16),
    "per query head at 128k": Shape(Local(8) | Stride(16, heads="query"), 1, 131072, 32, 8, 128, 16),
    "a sink and a window at 128k, width 64": Shape(Sink(64) | Window(1024), 2, 131072, 16, 4, 64, 16),
    "batches beyond 2^31": Shape(Sink(64) | Local(4), 5, 131072, 32, 32, 128, 70),
    "one sequence beyond 2^31": Shape(Sink(64) | Local(4), 1, 1_100_000, 16, 2, 128, 40),
}


def rows_mask(shape: Shape, rows: torch.Tensor) -> torch.Tensor:
    """What these query rows see, ``(H, rows, S)``: never more than a few rows of the square exist."""
    q_pos, k_pos, length = rows.numpy()[:, None], torch.arange(shape.seqlen).numpy()[None], Length(shape.seqlen)
    heads = [Head(h, shape.heads, shape.kv_heads) for h in range(shape.heads)]
    seen = [shape.pattern.allowed(q_pos, k_pos, length, head) & (k_pos <= q_pos) for head in heads]
    return torch.stack([torch.from_numpy(mask) for mask in seen])


@dataclass(frozen=True)
class Run:
    """Inputs, and all results."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    results: list[torch.Tensor]


def run(backend, shape, rows, layout, device, dtype) -> Run:
    """Forward and backward; dout is nonzero in the sampled rows alone, so that dk and dv depend on no others."""
    sizes = [(shape.batch, shape.seqlen, heads, shape.width) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
    dout = torch.zeros_like(q)
    dout[:, rows] = torch.randn(shape.batch, len(rows), shape.heads, shape.width, device=device, dtype=dtype)
    scoring = Scoring(shape.width**-0.5)
    out, lse = backend.forward(q, k, v, layout, scoring)
    return Run(q, k, v, dout, [out, lse, *backend.backward(dout, None, q, k, v, out, lse, layout, scoring)])


def check_group(found: Run, layout, mask, rows, entry, kv_head) -> None:
    """The query heads of one KV head in one batch entry."""
    group = found.q.shape[2] // found.k.shape[2]
    heads = slice(kv_head * group, (kv_head + 1) * group)
    one, its = slice(entry, entry + 1), slice(kv_head, kv_head + 1)

    def rows_of(x):
        return x[one, :, heads][:, rows]

    p = Problem(rows_of(found.q), found.k[one, :, its], found.v[one, :, its], rows_of(found.dout), None, layout, mask[heads])
    exact, plain = by_autograd(oracle, p.to(torch.float64)), by_autograd(eager, p)
    out, lse, dq, dk, dv = found.results
    got = {"out": rows_of(out), "lse": lse[one, heads][..., rows], "dq": rows_of(dq), "dk": dk[one, :, its], "dv": dv[one, :, its]}
    for name, value in got.items():
        truth = getattr(exact, name)
        terms = 4 * max(1.0, truth.abs().max().item())
        assert_close(f"{name} of KV head {kv_head}, entry {entry}", value, getattr(plain, name), truth, terms)


@pytest.mark.parametrize("name", SHAPES)
def test_sampled_rows(name, usual, device, sized, room, triton_backend):
    shape = sized(SHAPES[name], SHAPES[name].tiny)
    room(shape.gibibytes)
    layout = build_layout(shape.pattern, shape.heads, shape.kv_heads, shape.seqlen, device=device)
    rows = sample_rows(shape.seqlen, count=8)
    mask, rows = rows_mask(shape, rows).to(device), rows.to(device)
    found = run(triton_backend, shape, rows, layout, device, usual)
    for entry in sorted({0, shape.batch - 1}):
        for kv_head in sorted({0, shape.kv_heads // 2, shape.kv_heads - 1}):
            check_group(found, layout, mask, rows, entry, kv_head)
    for number, (label, value) in enumerate(zip(("out", "lse", "dq", "dk", "dv"), found.results, strict=True)):
        assert all(bool(torch.isfinite(value[entry]).all()) for entry in range(shape.batch)), label
        if number == 2:
            other = torch.ones(shape.seqlen, dtype=torch.bool, device=device)
            other[rows] = False
            assert all(not value[entry][other].any() for entry in range(shape.batch)), "dq of rows whose dout is zero"


def spread(t, axis, far):
    """The same numbers with ``far`` as the stride of one axis; the others stay close."""
    close = t.movedim(axis, 0)[0].contiguous()
    strides = [*close.stride()[:axis], far, *close.stride()[axis:]]
    room = torch.zeros(far * (t.shape[axis] - 1) + close.numel(), device=t.device, dtype=t.dtype)
    return room.as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("axis", ["batch", "token", "head"])
def test_strides_beyond_2_to_the_31(axis, usual, device, sized, room, triton_backend):
    """The same numbers in tensors whose strides lead far away."""
    room(40)
    n, far = sized(300, 40), sized(2**31 + 64, 2**15)
    x = [torch.randn(2, n, heads, 64, device=device, dtype=usual) for heads in (4, 2, 2)]
    apart = [spread(t, {"batch": 0, "token": 1, "head": 2}[axis], far // (n // 2) if axis == "token" else far) for t in x]
    layout = build_layout(Local(2) | Stride(3), 4, 2, n, device=device)
    found = []
    for q, k, v in (x, apart):
        out, lse = triton_backend.forward(q, k, v, layout, Scoring(0.1))
        found.append([out, lse, *triton_backend.backward(out, None, q, k, v, out, lse, layout, Scoring(0.1))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
