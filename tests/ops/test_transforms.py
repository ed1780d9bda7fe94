"""`torch.func` and forward-mode AD: the right derivative, or a refusal with words."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import s2attn
from s2attn import Dense, Local, Stride, Unsupported, XAttention
from s2attn.ops import antidiagonal

# torch scripts rules of its own when forward-mode AD is first used, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")

S2 = Local(1, block=16) | Stride(2, block=16)
LAYOUT = s2attn.build_layout(S2, num_heads=4, num_kv_heads=2, seqlen_q=40)
CU = torch.tensor([0, 13, 40])


def tensors(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*batch, 40, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))


def packed(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    out = s2attn.attention(q[0], k[0], v[0], S2, cu_seqlens_q=CU, cu_seqlens_k=CU, **settings)
    return tuple(x[None] for x in out) if isinstance(out, tuple) else out[None]


CALLS = {
    "pattern": partial(s2attn.attention, pattern=S2),
    "layout": partial(s2attn.attention, pattern=LAYOUT),
    "sinks": partial(s2attn.attention, pattern=S2, sinks=torch.linspace(-1, 1, 4)),
    "selector": partial(s2attn.attention, pattern=XAttention(stride=8, block=16)),
    "packed": packed,
    "module": s2attn.SparseAttention(S2, 4, 2),
}


def loss(call: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = call(q, k, v, return_lse=True)
    return out.square().sum() + lse.sin().sum()


def expected_grads(call: Any, *given: Tensor) -> tuple[Tensor, ...]:
    given = tuple(x.clone().requires_grad_() for x in given)
    return torch.autograd.grad(loss(call, *given), given)


def assert_all_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_grad_is_that_of_autograd(name):
    given = tensors(1)
    assert_all_close(grad(partial(loss, CALLS[name]), argnums=(0, 1, 2))(*given), expected_grads(CALLS[name], *given))


@pytest.mark.parametrize("name", CALLS)
def test_vjp_is_that_of_autograd(name):
    given = tensors(1)
    out, back = vjp(lambda *x: CALLS[name](*x), *given)
    dout = torch.randn_like(out)
    leaves = [x.clone().requires_grad_() for x in given]
    assert_all_close(back(dout), torch.autograd.grad(CALLS[name](*leaves), leaves, dout))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "selector"])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 0, None)])
def test_vmap_is_a_loop(name, in_dims):
    given = tensors(3, 1)
    given = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(given, in_dims, strict=True)]
    call = partial(CALLS[name], return_lse=True)
    one_by_one = [[x if dim is None else x.select(dim, i) for x, dim in zip(given, in_dims, strict=True)] for i in range(3)]
    expected = [torch.stack(each) for each in zip(*(call(*one) for one in one_by_one), strict=True)]
    assert_all_close(vmap(lambda *x: call(*x), in_dims)(*given), expected)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "selector"])
def test_gradients_per_sample(name):
    given, call = tensors(3, 1), CALLS[name]
    found = vmap(grad(partial(loss, call), argnums=(0, 1, 2)))(*given)
    expected = [expected_grads(call, *(x[i] for x in given)) for i in range(3)]
    assert_all_close(found, [torch.stack(each) for each in zip(*expected, strict=True)])


def test_gradients_of_sinks_per_sample():
    (q, k, v), sinks = tensors(3, 1), torch.randn(3, 4, dtype=torch.float64)

    def one(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return loss(partial(s2attn.attention, pattern=S2, sinks=sinks), q, k, v)

    found = vmap(grad(one, argnums=3))(q, k, v, sinks)
    leaf = sinks.clone().requires_grad_()
    assert_all_close([found], torch.autograd.grad(sum(one(q[i], k[i], v[i], leaf[i]) for i in range(3)), leaf))


def test_keys_that_samples_share_get_the_sum():
    (q, _, _), (_, k, v) = tensors(3, 1), tensors(1)
    mapped = grad(lambda k: vmap(lambda q: loss(CALLS["pattern"], q, k, v))(q).sum())(k)
    expected = sum(expected_grads(CALLS["pattern"], q[i], k, v)[1] for i in range(3))
    assert_all_close([mapped], [expected])


def test_jacrev():
    q, k, v = (x[:, :5] for x in tensors(1))
    found = jacrev(lambda q: s2attn.attention(q, k, v, Dense()).sum((2, 3)))(q)
    leaf = q.clone().requires_grad_()
    out = s2attn.attention(leaf, k, v, Dense()).sum((2, 3))
    assert_all_close(found.flatten(0, 1), [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in out.flatten()])


def test_functional_call_of_a_module():
    module = s2attn.SparseAttention(S2, 4, 2, sinks=True).double()
    given, weights = tensors(1), {"sinks": torch.randn(4, dtype=torch.float64)}
    found = grad(lambda weights: functional_call(module, weights, given).square().sum())(weights)["sinks"]
    sinks = weights["sinks"].clone().requires_grad_()
    assert_all_close([found], torch.autograd.grad(s2attn.attention(*given, S2, sinks=sinks).square().sum(), sinks))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_forward_mode_is_refused(name, place):
    given = list(tensors(1))

    def of(x: Tensor) -> Tensor:
        return CALLS[name](*given[:place], x, *given[place + 1 :])

    words = "has no forward-mode derivative" if (name, place) != ("selector", 2) else "attention has no forward-mode derivative"
    with pytest.raises(Unsupported, match=words):
        jvp(of, (given[place],), (torch.ones_like(given[place]),))
    with pytest.raises(Unsupported, match=words):
        jacfwd(of)(given[place])
    with forward_ad.dual_level(), pytest.raises(Unsupported, match=words):
        of(forward_ad.make_dual(given[place], torch.ones_like(given[place])))


def test_forward_mode_leaves_calls_without_tangents_alone():
    given = tensors(1)
    with forward_ad.dual_level():
        assert torch.equal(CALLS["pattern"](*given), CALLS["pattern"](*given))
    other, tangent = jvp(lambda x: x.sum() + CALLS["pattern"](*given).sum(), (given[0],), (torch.ones_like(given[0]),))
    assert float(tangent) == given[0].numel() and bool(other.isfinite())


def test_the_second_derivative_is_refused():
    given = tensors(1)
    with pytest.raises(Unsupported, match="attention has no second derivative"):
        grad(lambda q: grad(partial(loss, CALLS["pattern"]))(q, *given[1:]).sum())(given[0])


def test_a_selector_has_no_rule_for_vmap():
    with pytest.raises(Unsupported, match="XAttention has no rule for"):
        vmap(lambda *x: CALLS["selector"](*x))(*tensors(2, 1))
    with pytest.raises(Unsupported, match="antidiagonal has no rule for"):
        vmap(partial(antidiagonal, stride=8, block=16))(*tensors(2, 1)[:2])


def decoded(q: Tensor, pages: Tensor) -> Tensor:
    table = torch.arange(3)[None]
    return s2attn.decode(q[:, -1:], pages, pages, S2, block_table=table, seq_lens=torch.tensor([40]))


@pytest.mark.parametrize("place", [0, 1])
def test_decode_refuses_transforms(place):
    given = [tensors(1)[0], torch.randn(3, 16, 2, 8, dtype=torch.float64)]
    tangents = [torch.zeros_like(x) for x in given]
    with pytest.raises(Unsupported, match="decode has no forward-mode derivative"):
        jvp(decoded, tuple(given), tuple(tangents))
    with pytest.raises(Unsupported, match="decode has no gradient"):
        grad(lambda x: decoded(*given[:place], x, *given[place + 1 :]).sum())(given[place])
    with pytest.raises(Unsupported, match="decode has no rule for"):
        vmap(decoded, (0, None) if place == 0 else (None, 0))(*(x.expand(2, *x.shape) if i == place else x for i, x in enumerate(given)))


def test_merge_has_every_derivative():
    """Plain torch: compared with differences of float64, rows that see nothing among them."""
    outs, lses = torch.randn(3, 1, 5, 2, 4, dtype=torch.float64), torch.randn(3, 1, 2, 5, dtype=torch.float64)
    lses[0, :, :, 1] = lses[:, :, :, 3] = -torch.inf

    def merged(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = s2attn.merge(list(zip(outs, lses, strict=True)))
        return out, lse.nan_to_num(neginf=0.0)

    douts, dlses, step = torch.randn_like(outs), torch.randn_like(lses), 1e-6
    _, tangents = jvp(merged, (outs, lses), (douts, dlses))
    ahead, behind = (merged(outs + sign * step * douts, lses + sign * step * dlses) for sign in (1, -1))
    for tangent, a, b in zip(tangents, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-7, atol=1e-8)
    assert bool(tangents[0].any()) and bool(tangents[1].any())
    mapped = vmap(merged)(outs.expand(2, *outs.shape), lses.expand(2, *lses.shape))
    assert_all_close(mapped, [x.expand(2, *x.shape) for x in merged(outs, lses)])


def test_graphs_hold_transforms():
    given = tensors(1)
    whole = partial(loss, CALLS["pattern"])
    found = torch.compile(lambda *x: grad(whole, argnums=(0, 1, 2))(*x), backend="aot_eager")(*given)
    assert_all_close(found, expected_grads(CALLS["pattern"], *given))
    with pytest.raises(Unsupported, match="attention has no forward-mode derivative"):
        torch.compile(lambda q: jvp(lambda q: whole(q, *given[1:]), (q,), (q,)), backend="aot_eager")(given[0])
