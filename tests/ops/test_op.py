"""The op as torch knows it: opcheck, compilers, checkpointing, threads of autograd."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import s2attn
from s2attn import Local, Sink, SparseAttention, Stride, Unsupported, Window, build_layout
from s2attn.ops.source import forget_layouts, layout_text, pattern_text

PATTERN = Local(2, 16) | Stride(3, block=16)


def tensors(batch=2, n=70, heads=4, kv_heads=2, dim=8, grad=True):
    torch.manual_seed(0)
    return [torch.randn(batch, n, h, dim, requires_grad=grad) for h in (heads, kv_heads, kv_heads)]


def test_opcheck():
    q, k, v = tensors()
    layout = build_layout(PATTERN, 4, 2, 70)
    cu = torch.tensor([0, 20, 70], dtype=torch.int32)
    flat = [t[:1].detach().requires_grad_() for t in (q, k, v)]
    calls = [
        (q, k, v, None, [], pattern_text(PATTERN, None, True, 0, None), 0.3, 0.0, "auto"),
        (q, k, v, None, layout.tensors(), layout_text(layout), 0.3, 0.0, "torch"),
        (*flat, None, [cu, cu], pattern_text(PATTERN, 32, False, 1, None), 0.3, 0.0, "auto"),
    ]
    for call in calls:
        torch.library.opcheck(torch.ops.s2attn.attention, call)
        out, lse = torch.ops.s2attn.attention(*call)
        dout, dlse, q, k, v, out, lse = (t.detach() for t in (out, lse, *call[:3], out, lse))
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.s2attn.attention_backward, (dout, dlse, q, k, v, call[3], out, lse, *call[4:]), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_breaks(dynamic):
    def step(q, k, v):
        out, lse = s2attn.attention(q * 2, k, v, PATTERN | Window(5), return_lse=True)
        return out.square().sum() + lse.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (70, 90):
        x = tensors(n=n)
        expected = torch.autograd.grad(step(*x), x)
        got = torch.autograd.grad(compiled(*x), x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor_layouts_modules_and_packing():
    torch._dynamo.reset()
    q, k, v = tensors()
    layout, module = build_layout(PATTERN, 4, 2, 70), SparseAttention(PATTERN, 4, 2)
    cu = torch.tensor([0, 20, 70], dtype=torch.int32)
    expected = module(q, k, v)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(q, k, v), expected)
    torch.testing.assert_close(torch.compile(lambda *x: s2attn.attention(*x, layout), fullgraph=True)(q, k, v), expected)
    flat = [t[0].detach() for t in (q, k, v)]
    packed = torch.compile(lambda *x: s2attn.attention(*x[:3], PATTERN, cu_seqlens_q=x[3], cu_seqlens_k=x[3]), fullgraph=True)
    torch.testing.assert_close(packed(*flat, cu), s2attn.attention(*flat, PATTERN, cu_seqlens_q=cu, cu_seqlens_k=cu))


def test_a_pattern_made_inside_a_compiled_function_is_refused_by_nobody():
    torch._dynamo.reset()
    pattern = Sink(3) | Window(11)  # fresh: nothing about it was computed before the compiler saw it
    q, k, v = tensors()
    compiled = torch.compile(lambda *x: s2attn.attention(*x, pattern), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), s2attn.attention(q, k, v, pattern))


def test_bad_shapes_are_refused_under_compile_too():
    torch._dynamo.reset()
    q = tensors()[0]
    compiled = torch.compile(lambda *x: s2attn.attention(*x, PATTERN), fullgraph=False, backend="eager")
    with pytest.raises(Exception, match="must have a multiple of the 3 heads of k"):
        compiled(q, torch.randn(2, 70, 3, 8), torch.randn(2, 70, 3, 8))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    x = tensors()
    direct = torch.autograd.grad(s2attn.attention(*x, PATTERN).square().sum(), x)
    again = torch.autograd.grad(checkpoint(lambda *y: s2attn.attention(*y, PATTERN).square().sum(), *x, use_reentrant=False), x)
    if reentrant:
        for t in x:
            t.grad = None
        checkpoint(lambda *y: s2attn.attention(*y, PATTERN).square().sum(), *x, use_reentrant=True).backward()
        again = [t.grad for t in x]
    for a, b in zip(direct, again, strict=True):
        assert torch.equal(a, b)


def test_backward_after_the_layout_was_forgotten():
    x = tensors()
    loss = s2attn.attention(*x, PATTERN).sum()
    forget_layouts()
    loss.backward()
    layout = build_layout(PATTERN, 4, 2, 70)
    y = tensors()
    loss = s2attn.attention(*y, layout).sum()
    del layout
    loss.backward()
    for a, b in zip(x, y, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_cu_seqlens_changed_in_place_are_read_again():
    q, k, v = (t[0].detach() for t in tensors())
    cu = torch.tensor([0, 20, 70])
    one = s2attn.attention(q, k, v, PATTERN, cu_seqlens_q=cu, cu_seqlens_k=cu)
    cu[1] = 50
    two = s2attn.attention(q, k, v, PATTERN, cu_seqlens_q=cu, cu_seqlens_k=cu)
    fresh = torch.tensor([0, 50, 70])
    assert not torch.equal(one, two)
    assert torch.equal(two, s2attn.attention(q, k, v, PATTERN, cu_seqlens_q=fresh, cu_seqlens_k=fresh))


def test_inference_mode():
    with torch.inference_mode():
        q, k, v = (torch.randn(70, heads, 8) for heads in (4, 2, 2))
        cu = torch.tensor([0, 20, 70])
        one = s2attn.attention(q, k, v, PATTERN, cu_seqlens_q=cu, cu_seqlens_k=cu)
        cu[1] = 50
        two = s2attn.attention(q, k, v, PATTERN, cu_seqlens_q=cu, cu_seqlens_k=cu)
        torch.testing.assert_close(two[:50], s2attn.attention(q[None, :50], k[None, :50], v[None, :50], PATTERN)[0])
    assert not torch.equal(one, two)


def test_modules_and_layouts_can_be_copied_and_pickled():
    x, module, layout = tensors(grad=False), SparseAttention(PATTERN, 4, 2, layer=1), build_layout(PATTERN, 4, 2, 70)
    expected = module(*x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*x), expected)
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert torch.equal(s2attn.attention(*x, other), s2attn.attention(*x, layout))


def test_only_what_needs_a_gradient_gets_one():
    q, k, v = tensors(grad=False)
    q.requires_grad_()
    lse = s2attn.attention(q, k, v, PATTERN, return_lse=True)[1]
    lse.sum().backward()
    assert q.grad is not None and k.grad is None
    with torch.no_grad():
        assert not s2attn.attention(q, k, v, PATTERN, return_lse=True)[1].requires_grad


def test_no_second_derivative():
    q, k, v = tensors()
    (dq,) = torch.autograd.grad(s2attn.attention(q, k, v, PATTERN).sum(), q, create_graph=True)
    with pytest.raises(Unsupported, match="no second derivative"):
        dq.sum().backward()


def test_the_module_has_nothing_in_its_state():
    module = SparseAttention(PATTERN, 4, 2, layer=3)
    assert not module.state_dict() and not list(module.parameters())
    assert "Local(n=2, block=16)" in repr(module) and "layer=3" in repr(module)
    two = [SparseAttention(PATTERN, 4, 2, layer=i) for i in (0, 1)]
    x = tensors(grad=False)
    assert not torch.equal(two[0](*x), two[1](*x)), "layers with the same pattern object continue each other's stripes"
