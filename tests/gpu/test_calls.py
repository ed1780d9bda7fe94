"""The public call on a GPU: autograd, compilers, strides, packing, autocast."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Local, Sink, Stride, Window, build_layout
from s2attn.ops.source import layout_text, pattern_text
from tests.support import dense_mask, eager, oracle
from tests.support.oracle import assert_close
from tests.support.problems import by_autograd, make_problem

PATTERN = Local(2, 16) | Stride(3, block=16)
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def near(got, expected):
    """A few roundings of the largest number apart: what another order of sums can do."""
    seen = torch.isfinite(expected)
    assert torch.equal(got[~seen], expected[~seen])
    difference, largest = (got[seen].double() - expected[seen].double()).abs().max(), expected[seen].double().abs().max()
    assert difference <= 4 * torch.finfo(got.dtype).eps * largest, (difference, largest)


def tensors(device, dtype, n, batch=2, width=32, m=None):
    shapes = ((n, 4), (m or n, 2), (m or n, 2))
    return [torch.randn(batch, tokens, heads, width, device=device).to(dtype).requires_grad_() for tokens, heads in shapes]


def attend(*x, pattern=PATTERN, **call):
    return s2attn.attention(*x, pattern, backend="triton", **call)


def with_gradients(x, dout, dlse, **call):
    """out, lse, and the gradients of x through both."""
    out, lse = attend(*x[:3], return_lse=True, **({"sinks": x[3]} if len(x) > 3 else {}), **call)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], x, [dout, dlse])]


@pytest.mark.parametrize("given", ["pattern", "layout"])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (10.0, True)], ids=["plain", "soft-cap and sinks"])
def test_autograd_through_out_and_lse(given, softcap, sinks, dtype, device, sized, poisoned_empty):
    n, m = sized((300, 500), (40, 70))
    layout = build_layout(PATTERN, 4, 2, n, m)
    mask = dense_mask(PATTERN, 4, 2, n, m)
    shape = {"heads": 4, "kv_heads": 2, "batch": 2, "width": sized(64, 16), "softcap": softcap}
    p = make_problem(layout, mask, **shape, sinks=torch.randn(4) if sinks else None).on(device).to(dtype)
    exact, plain = by_autograd(oracle, p.to(torch.float64)), by_autograd(eager, p)
    x = [t.detach().requires_grad_() for t in (p.q, p.k, p.v, p.sinks) if t is not None]
    got = with_gradients(x, p.dout, p.dlse, pattern=PATTERN if given == "pattern" else p.layout, softcap=softcap)
    for name, value in zip(NAMES, got, strict=False):
        truth = getattr(exact, name)
        assert_close(name, value, getattr(plain, name), truth, terms=4 * max(1.0, truth[torch.isfinite(truth)].abs().max().item()))


def test_packed_calls_are_their_sequences(dtype, device, sized):
    lengths = sized([300, 0, 77, 1], [40, 0, 25, 1])
    cu = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0)
    x = [torch.randn(sum(lengths), heads, 32, device=device).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    dout, dlse = torch.randn_like(x[0]), torch.randn(4, sum(lengths), device=device)
    packed = with_gradients(x, dout, dlse, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for lo, hi in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if lo == hi:
            continue
        alone = with_gradients([t[None, lo:hi].detach().requires_grad_() for t in x], dout[None, lo:hi], dlse[None, :, lo:hi])
        for index, (whole, part) in enumerate(zip(packed, alone, strict=True)):
            assert torch.equal(whole[:, lo:hi] if index == 1 else whole[lo:hi], part[0])


def test_any_strides(dtype, device, sized):
    n = sized(300, 70)
    x = tensors(device, dtype, n, width=sized(64, 16))
    dout, dlse = torch.randn_like(x[0]), torch.randn(2, 4, n, device=device)
    expected = with_gradients(x, dout, dlse)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x]
    spread = [torch.stack([t, t * 9], dim=-1).flatten(-2)[..., ::2] for t in x]
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in x]  # begins at no multiple of 16 bytes
    parts = torch.cat([t.flatten(2) for t in x], dim=-1).split([t[0, 0].numel() for t in x], dim=-1)  # slices of one projection
    joint = [part.unflatten(-1, t.shape[2:]) for part, t in zip(parts, x, strict=True)]
    for other in (turned, joint, spread, shifted):
        turned_dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
        got = with_gradients([t.detach().requires_grad_() for t in other], turned_dout, dlse)
        for a, b in zip(got, expected, strict=True):
            near(a, b)
    out, lse = attend(*x, return_lse=True)
    once = torch.autograd.grad(out.sum() + lse.sum(), x)  # gradients that are one number, with strides of 0
    again = with_gradients(x, torch.ones_like(x[0]), torch.ones_like(dlse))
    for a, b in zip(once, again[2:], strict=True):
        near(a, b)


def test_opcheck(usual, device, sized):
    x = tensors(device, usual, sized(130, 40))
    layout = build_layout(PATTERN, 4, 2, x[0].shape[1], device=device)
    sinks = torch.randn(4, device=device)
    calls = [
        (*x, None, [], pattern_text(PATTERN, None, True, 0, None), 0.3, 0.0, "triton"),
        (*x, sinks, layout.tensors(), layout_text(layout), 0.3, 5.0, "triton"),
    ]
    for call in calls:
        torch.library.opcheck(torch.ops.s2attn.attention, call)
        out, lse = (t.detach() for t in torch.ops.s2attn.attention(*call))
        given = (torch.randn_like(out), torch.randn_like(lse), *(t.detach() for t in x), call[3], out, lse, *call[4:])
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.s2attn.attention_backward, given, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_without_breaks(dynamic, usual, device, sized):
    def step(q, k, v):
        out, lse = attend(q * 2, k, v, pattern=PATTERN | Window(5), return_lse=True)
        return out.float().square().sum() + lse.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in sized((256, 300, 777), (40, 50)):
        x = tensors(device, usual, n)
        expected, got = (torch.autograd.grad(f(*x), x) for f in (step, compiled))
        for a, b in zip(got, expected, strict=True):
            near(a, b)


def test_autocast_takes_the_16_bit_type(usual, device, sized):
    x = tensors(device, torch.float32, sized(200, 50))
    with torch.autocast(device.type, dtype=usual):
        out = attend(*x)
    assert out.dtype == usual and torch.equal(out, attend(*(t.to(usual) for t in x)))


def test_chunks_of_queries_are_rows_of_the_whole(usual, device, sized):
    """A cache that fills: each chunk sees its past; the results merge with nothing and are those of one call."""
    n, step, pattern = sized(1000, 100), sized(256, 32), Sink(4) | Window(60)
    q, k, v = (t.detach() for t in tensors(device, usual, n))
    whole, lse = attend(q, k, v, pattern=pattern, return_lse=True)
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        out, part = attend(q[:, lo:hi], k[:, :hi], v[:, :hi], pattern=pattern, return_lse=True)
        near(out, whole[:, lo:hi])
        near(part, lse[..., lo:hi])
