"""Soft-caps and sinks through the public call: other ways to write them, gradients of the sinks, and everything that calls can be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import s2attn
from s2attn import ByRange, Dense, Local, Sink, SparseAttention, Stride, Window, build_layout, merge
from s2attn.ops.source import layout_text, pattern_text
from s2attn.testing import dense_mask

PATTERN = Local(2, 16) | Stride(3, block=16)
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


def tensors(batch=2, n=70, m=None, heads=4, kv_heads=2, dim=8, dim_v=None, dtype=torch.float32):
    """q, k, v and sinks."""
    torch.manual_seed(0)
    sizes = ((n, heads, dim), (m or n, kv_heads, dim), (m or n, kv_heads, dim_v or dim))
    return [*(torch.randn(batch, *size, dtype=dtype, requires_grad=True) for size in sizes), torch.randn(heads, requires_grad=True)]


def as_one_more_key(q, k, v, sinks, mask, scale):
    """Sinks through torch's own attention: a key that every query of a head scores with the head's sink, and whose value is 0."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    extra = (sinks.to(q.dtype) / scale)[None, None, :, None].expand(q.shape[0], 1, -1, 1)
    q, k = F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1))
    k = torch.cat([k, F.pad(extra, (q.shape[-1] - 1, 0))], 1)
    v = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(mask, (0, 1), value=True), scale=scale).transpose(1, 2)


@BACKENDS
@pytest.mark.parametrize("lengths", [(70, 70), (90, 40)], ids=["square", "rows that see nothing"])
def test_a_sink_is_one_more_key_with_a_value_of_zero(backend, lengths):
    x = tensors(1, *lengths, dtype=torch.float64)
    mask = dense_mask(PATTERN, 4, 2, *lengths)
    got = s2attn.attention(*x[:3], PATTERN, scale=0.4, sinks=x[3], backend=backend)
    expected = as_one_more_key(*x, mask, 0.4)
    dout = torch.randn_like(got)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, x, dout), torch.autograd.grad(expected, x, dout), strict=True):
        torch.testing.assert_close(a, b)


@BACKENDS
def test_a_sink_of_zero_is_softmax_with_one_in_its_denominator(backend):
    q, k, v, _ = tensors(1, 40, heads=2, kv_heads=2, dtype=torch.float64)
    weights = torch.einsum("bthd,bshd->bhts", q, k).mul(8**-0.5).exp()
    expected = torch.einsum("bhts,bshd->bthd", weights / (1 + weights.sum(-1, keepdim=True)), v)
    got = s2attn.attention(q, k, v, Dense(), causal=False, sinks=torch.zeros(2), backend=backend)
    torch.testing.assert_close(got, expected)


@BACKENDS
def test_a_softcap_bends_scores_before_the_mask(backend):
    x = tensors(1, 100, dtype=torch.float64)[:3]
    k, v = (t.repeat_interleave(2, 2) for t in x[1:])
    scores = 0.7 * torch.tanh(torch.einsum("bthd,bshd->bhts", x[0], k) * 0.4 / 0.7)
    scores = scores.masked_fill(~dense_mask(PATTERN, 4, 2, 100, 100), -torch.inf)
    expected = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    got = s2attn.attention(*x, PATTERN, scale=0.4, softcap=0.7, backend=backend)
    dout = torch.randn_like(got)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, x, dout), torch.autograd.grad(expected, x, dout), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_softcap_is_a_score_mod_of_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, _ = (t.detach() for t in tensors(1, 100))
    mask = dense_mask(PATTERN, 4, 2, 100, 100)

    def capped(score, batch, head, i, j):
        return torch.where(mask[head, i, j], 0.7 * torch.tanh(score / 0.7), -torch.inf)

    flex = flex_attention(*(t.transpose(1, 2) for t in (q, k, v)), score_mod=capped, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(s2attn.attention(q, k, v, PATTERN, softcap=0.7), flex, atol=2e-6, rtol=1e-5)


@BACKENDS
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("lengths", [(20, 33), (24, 17)], ids=["chunk", "rows that see nothing"])
def test_gradcheck_in_float64(backend, softcap, lengths):
    """Through out and lse: every row has the finite lse of its sink at least."""
    q, k, v, _ = tensors(2, *lengths, dim=4, dim_v=3, dtype=torch.float64)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)

    def call(q, k, v, sinks):
        return s2attn.attention(q, k, v, Local(1, 16) | Sink(3), softcap=softcap, sinks=sinks, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v, sinks), fast_mode=True)


@BACKENDS
def test_a_sink_of_minus_infinity_is_none(backend):
    """Also for rows that see no key, whose lse is then -inf: the gradient of that sink is 0, not NaN."""
    *x, sinks = tensors(1, 90, 40)
    sinks = torch.tensor([-torch.inf, 0.3, -torch.inf, 1.0], requires_grad=True)
    out, lse = s2attn.attention(*x, PATTERN, sinks=sinks, return_lse=True, backend=backend)
    plain, plain_lse = s2attn.attention(*x, PATTERN, return_lse=True, backend=backend)
    assert torch.equal(out[:, :, ::2], plain[:, :, ::2]) and torch.equal(lse[:, ::2], plain_lse[:, ::2])
    assert bool((lse[:, 0] == -torch.inf).any()) and bool(lse[:, 1].isfinite().all())
    (grad,) = torch.autograd.grad((out, lse), sinks, (torch.randn_like(out), torch.randn_like(lse)))
    assert not grad[::2].any() and bool(grad[1::2].isfinite().all()) and bool(grad[1::2].all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sink_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinks_of_any_dtype(dtype, sink_dtype):
    """They are computed with in float32, or float64 beside float64, and their gradient has their own dtype."""
    *x, sinks = tensors(1, dtype=dtype)
    sinks = sinks.detach().to(sink_dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out, lse = s2attn.attention(*x, PATTERN, sinks=sinks, return_lse=True)
    same = s2attn.attention(*x, PATTERN, sinks=sinks.to(wide))
    assert out.dtype == dtype and lse.dtype == wide and torch.equal(out, same)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), sinks)
    assert grad.dtype == sink_dtype and bool(grad.all())


def test_only_one_part_of_a_merge_has_the_sinks():
    x = tensors(dtype=torch.float64)
    parts = [ByRange([(0, 20, Dense())]), ByRange([(20, 50, Dense())]), ByRange([(50, None, Dense())])]
    whole = s2attn.attention(*x[:3], Dense(), softcap=1.1, sinks=x[3], return_lse=True)
    cotangents = [torch.randn_like(t) for t in whole]
    expected = torch.autograd.grad(whole, x, cotangents, retain_graph=True)
    for owner in range(3):  # the last part is one that the first queries see nothing of
        sinks = [x[3] if i == owner else None for i in range(3)]
        pairs = [s2attn.attention(*x[:3], p, softcap=1.1, sinks=s, return_lse=True) for p, s in zip(parts, sinks, strict=True)]
        merged = merge(pairs)
        torch.testing.assert_close(merged, whole)
        for a, b in zip(torch.autograd.grad(merged, x, cotangents), expected, strict=True):
            torch.testing.assert_close(a, b)


@BACKENDS
def test_packed_sequences_are_the_sequences_alone(backend):
    *x, sinks = tensors(1, 100)
    flat = [t[0].detach().requires_grad_() for t in x]
    cu_q, cu_k = torch.tensor([0, 33, 33, 100]), torch.tensor([0, 12, 40, 100])  # more queries than keys, and no queries at all
    scoring = {"softcap": 0.9, "sinks": sinks, "return_lse": True, "backend": backend}
    together = s2attn.attention(*flat, PATTERN, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **scoring)
    spans = [(slice(0, 33), slice(0, 12)), (slice(33, 100), slice(40, 100))]
    alone = [s2attn.attention(*(t[None, span] for t, span in zip(flat, (q, k, k), strict=True)), PATTERN, **scoring) for q, k in spans]
    alone = [torch.cat([out[0] for out, _ in alone]), torch.cat([lse[0] for _, lse in alone], -1)]
    cotangents = [torch.randn_like(t) for t in alone]
    grads = [torch.autograd.grad(results, (*flat, sinks), cotangents) for results in (together, alone)]
    for a, b in zip((*together, *grads[0]), (*alone, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_without_keys_the_sinks_are_everything():
    for batch, n, m in ((0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)):
        q, k, v = (torch.randn(batch, length, heads, 8, requires_grad=True) for length, heads in ((n, 4), (m, 2), (m, 2)))
        sinks = torch.randn(4, requires_grad=True)
        out, lse = s2attn.attention(q, k, v, PATTERN, softcap=2.0, sinks=sinks, return_lse=True)
        assert out.shape == (batch, n, 4, 8) and not out.any()
        assert torch.equal(lse, sinks.detach()[:, None].expand(batch, 4, n))
        dlse = torch.randn_like(lse)
        grads = torch.autograd.grad((out, lse), (q, k, v, sinks), (torch.randn_like(out), dlse))
        assert not any(grad.any() for grad in grads[:3])
        torch.testing.assert_close(grads[3], dlse.sum((0, 2)))


def test_only_what_needs_a_gradient_gets_one():
    q, k, v, sinks = (t.detach() for t in tensors())
    assert not s2attn.attention(q, k, v, PATTERN, sinks=sinks).requires_grad
    sinks.requires_grad_()
    s2attn.attention(q, k, v, PATTERN, sinks=sinks).sum().backward()
    assert sinks.grad is not None and q.grad is None
    q.requires_grad_()
    sinks.grad = None
    s2attn.attention(q, k, v, PATTERN, sinks=sinks.detach()).sum().backward()
    assert sinks.grad is None and q.grad is not None


def test_autocast_leaves_the_sinks_alone():
    *x, sinks = tensors(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = s2attn.attention(*x, PATTERN, softcap=1.0, sinks=sinks)
    expected = s2attn.attention(*(t.bfloat16() for t in x), PATTERN, softcap=1.0, sinks=sinks)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    dout = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (*x, sinks), dout), torch.autograd.grad(expected, (*x, sinks), dout), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_opcheck():
    q, k, v, sinks = tensors()
    layout = build_layout(PATTERN, 4, 2, 70)
    for by_sinks, index, source in (
        (sinks, [], pattern_text(PATTERN, None, True, 0, None)),
        (sinks.detach().bfloat16().requires_grad_(), layout.tensors(), layout_text(layout)),
    ):
        call = (q, k, v, by_sinks, index, source, 0.3, 1.5, "auto")
        torch.library.opcheck(torch.ops.s2attn.attention, call)
        results = [t.detach() for t in torch.ops.s2attn.attention(*call)]
        backward = (*results, *(t.detach() for t in call[:4]), *results, *call[4:])
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.s2attn.attention_backward, backward, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_breaks(dynamic):
    def step(q, k, v, sinks):
        out, lse = s2attn.attention(q, k, v, PATTERN | Window(5), softcap=1.5, sinks=sinks * 2, return_lse=True)
        return out.square().sum() + lse.sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (70, 90):
        x = tensors(n=n)
        for a, b in zip(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(step(*x), x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    def loss(*x):
        return s2attn.attention(*x[:3], PATTERN, softcap=1.5, sinks=x[3]).square().sum()

    x = tensors()
    direct = torch.autograd.grad(loss(*x), x)
    checkpoint(loss, *x, use_reentrant=reentrant).backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip(x, direct, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_module_learns_sinks():
    q, k, v, _ = (t.detach() for t in tensors())
    module = SparseAttention(PATTERN, 4, 2, softcap=3.0, sinks=True)
    assert list(module.state_dict()) == ["sinks"] and not module.sinks.any()
    assert "softcap=3.0, sinks=True" in repr(module) and "softcap=None, sinks=False" in repr(SparseAttention(PATTERN, 4))
    zeros = torch.zeros(4)
    torch.testing.assert_close(module(q, k, v), s2attn.attention(q, k, v, PATTERN, softcap=3.0, sinks=zeros))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(q, k, v), module(q, k, v))
    module(q, k, v).square().sum().backward()
    with torch.no_grad():
        module.sinks -= 0.1 * module.sinks.grad
    before = s2attn.attention(q, k, v, PATTERN, softcap=3.0, sinks=zeros).square().sum()
    assert module(q, k, v).square().sum() < before
