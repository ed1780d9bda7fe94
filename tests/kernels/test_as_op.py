"""The kernels behind the op: opcheck, compilers, gradients through both outputs, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import s2attn
from s2attn import Local, Sink, SparseAttention, Stride, Window, build_layout
from s2attn.ops.source import layout_text, pattern_text

PATTERN = Local(1, 16) | Stride(2, block=16) | Sink(3)


def tensors(n=40, sinks=True):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    return q, k, v, torch.randn(2, requires_grad=True) if sinks else None


def test_opcheck(triton_backend):
    q, k, v, sinks = tensors()
    layout = build_layout(PATTERN, 2, 1, 40)
    for call in (
        (q, k, v, sinks, [], pattern_text(PATTERN, None, True, 0, None), 0.3, 2.0, "triton"),
        (q, k, v, None, layout.tensors(), layout_text(layout), 0.3, 0.0, "triton"),
    ):
        checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
        torch.library.opcheck(torch.ops.s2attn.attention, call, test_utils=checks)
        out, lse = (t.detach() for t in torch.ops.s2attn.attention(*call))
        inputs = (torch.randn_like(out), torch.randn_like(lse), *(x.detach() for x in call[:3]), call[3], out, lse, *call[4:])
        torch.library.opcheck(torch.ops.s2attn.attention_backward, inputs, test_utils=checks[:3])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_breaks(triton_backend, dynamic):
    def step(q, k, v, sinks):
        out, lse = s2attn.attention(q * 2, k, v, PATTERN | Window(5), sinks=sinks, softcap=3.0, return_lse=True, backend="triton")
        return out.square().sum() + lse.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (40, 50):
        x = tensors(n)
        expected = torch.autograd.grad(step(*x), x)
        for a, b in zip(torch.autograd.grad(compiled(*x), x), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor(triton_backend):
    torch._dynamo.reset()
    q, k, v, _ = tensors()
    module = SparseAttention(PATTERN, 2, 1, backend="triton")
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(q, k, v), module(q, k, v))


def test_the_torch_backend_agrees_through_the_public_call(triton_backend):
    x = tensors()
    results = []
    for backend in ("triton", "torch"):
        out, lse = s2attn.attention(*x[:3], PATTERN, sinks=x[3], softcap=2.0, return_lse=True, backend=backend)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.square().sum(), x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_checkpointing(triton_backend):
    q, k, v, _ = tensors()

    def attend(q, k, v):
        return s2attn.attention(q, k, v, PATTERN, backend="triton")

    expected = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    got = torch.autograd.grad(checkpoint(attend, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
