"""Packed calls are computed over the lengths that they are given: read every time, and checked against a layout."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import s2attn
from s2attn import Dense, Local, Stride
from s2attn.layout import build_layout
from s2attn.ops import checks, source
from s2attn.selectors import MeanPool

S2 = Local(1, block=16) | Stride(2, block=16)
TOTAL = 96


def packed(*, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(TOTAL, heads, 8) for heads in (4, 2, 2))
    return q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad)


def through_numpy(cu: Tensor, numbers: list[int]) -> None:
    cu.numpy()[:] = numbers


def through_data(cu: Tensor, numbers: list[int]) -> None:
    cu.data.copy_(torch.tensor(numbers))


def through_dlpack(cu: Tensor, numbers: list[int]) -> None:
    torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(cu)).copy_(torch.tensor(numbers))


def by_torch(cu: Tensor, numbers: list[int]) -> None:
    cu.copy_(torch.tensor(numbers))


def reused() -> Tensor:
    """Memory of NumPy, as a data loader refills it."""
    return torch.from_numpy(np.array([0, 32, TOTAL]))


CALLS = {
    "pattern": partial(s2attn.attention, pattern=S2),
    "selector": partial(s2attn.attention, pattern=MeanPool(top_k=1, block=16)),
    "module": s2attn.SparseAttention(S2, 4, 2),
    "graph": torch.compile(partial(s2attn.attention, pattern=S2), backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("refill", [through_numpy, through_data, through_dlpack, by_torch])
def test_refilled_lengths_are_read(name, refill):
    (q, k, v), cu = packed(), reused()
    call = partial(CALLS[name], q, k, v)
    first = call(cu_seqlens_q=cu, cu_seqlens_k=cu)
    refill(cu, [0, 80, TOTAL])
    fresh = torch.tensor([0, 80, TOTAL])
    expected = call(cu_seqlens_q=fresh, cu_seqlens_k=fresh)
    assert not torch.equal(expected, first)
    assert torch.equal(call(cu_seqlens_q=cu, cu_seqlens_k=cu), expected)


@pytest.mark.parametrize("name", ["pattern", "module", "selector"])
def test_backward_takes_the_lengths_of_forward(name):
    """A data loader may refill its buffer before backward."""
    (q, k, v), cu = packed(grad=True), reused()
    expected = torch.autograd.grad(CALLS[name](q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu).square().sum(), (q, k, v))
    out = CALLS[name](q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    through_numpy(cu, [0, 80, TOTAL])
    for got, want in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(got, want)


def test_lengths_of_a_gpu_are_refused_in_a_capture(monkeypatch):
    monkeypatch.setattr(checks, "is_captured", lambda *tensors: True)
    cu = reused()
    with pytest.raises(s2attn.Unsupported, match="give them on the CPU"):
        s2attn.attention(*packed(), S2, cu_seqlens_q=cu, cu_seqlens_k=cu)


def layout_for(q: list[int], k: list[int], *, causal: bool = True):
    cu_q, cu_k = torch.tensor(q), torch.tensor(k)
    return build_layout(S2, 4, 2, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_layout_serves_its_own_sequences_only(compiled):
    q, k, v = packed()
    own, other = torch.tensor([0, 32, TOTAL]), torch.tensor([0, 80, TOTAL])
    layout = layout_for([0, 32, TOTAL], [0, 32, TOTAL])
    call = torch.compile(s2attn.attention, backend="aot_eager") if compiled else s2attn.attention
    out = call(q, k, v, layout, cu_seqlens_q=own, cu_seqlens_k=own)
    torch.testing.assert_close(out, s2attn.attention(q, k, v, S2, cu_seqlens_q=own, cu_seqlens_k=own))
    words = r"must be the lengths that the layout was built for, \[32, 64\]; got \[80, 16\]"
    with pytest.raises(ValueError, match=f"cu_seqlens_q {words}"):
        call(q, k, v, layout, cu_seqlens_q=other, cu_seqlens_k=own)
    with pytest.raises(ValueError, match=f"cu_seqlens_k {words}"):
        call(q, k, v, layout, cu_seqlens_q=own, cu_seqlens_k=other)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([1, 32, TOTAL], "must start at 0"),
        ([0, 64, 32, TOTAL], "must never decrease"),
        ([0, 32, 95], f"must end at the number of tokens, {TOTAL}"),
        ([0, 32, 64, TOTAL], "must be the lengths that the layout was built for"),
        ([0, 32], f"must end at the number of tokens, {TOTAL}"),
    ],
)
def test_malformed_lengths_beside_a_layout_are_refused(numbers, words):
    cu = torch.tensor(numbers)
    with pytest.raises(ValueError, match=f"cu_seqlens_q {words}"):
        s2attn.attention(*packed(), layout_for([0, 32, TOTAL], [0, 32, TOTAL]), cu_seqlens_q=cu, cu_seqlens_k=cu)


def test_empty_sequences_stand_in_their_places():
    q, k, v = packed()
    numbers = [0, 32, 32, TOTAL, TOTAL]
    cu, layout = torch.tensor(numbers), layout_for(numbers, numbers)
    assert s2attn.attention(q, k, v, layout, cu_seqlens_q=cu, cu_seqlens_k=cu).shape == q.shape
    moved = torch.tensor([0, 0, 32, TOTAL, TOTAL])
    with pytest.raises(ValueError, match="cu_seqlens_q must be the lengths"):
        s2attn.attention(q, k, v, layout, cu_seqlens_q=moved, cu_seqlens_k=moved)


@pytest.mark.parametrize("own", [True, False])
def test_a_layout_keeps_its_own_causality(own):
    q, k, v = (x.unsqueeze(0) for x in packed())
    layout = build_layout(Dense(), 4, 2, seqlen_q=TOTAL, causal=own)
    expected = s2attn.attention(q, k, v, Dense(), causal=own)
    torch.testing.assert_close(s2attn.attention(q, k, v, layout), expected)
    torch.testing.assert_close(s2attn.attention(q, k, v, layout, causal=own), expected)
    with pytest.raises(ValueError, match=rf"causal must be left out or {own}, as the layout is: it was built so; got {not own}"):
        s2attn.attention(q, k, v, layout, causal=not own)


def test_causal_is_true_where_a_pattern_is_given():
    q, k, v = (x.unsqueeze(0) for x in packed())
    for pattern in (S2, MeanPool(top_k=1, block=16)):
        assert torch.equal(s2attn.attention(q, k, v, pattern), s2attn.attention(q, k, v, pattern, causal=True))
        assert not torch.equal(s2attn.attention(q, k, v, pattern), s2attn.attention(q, k, v, pattern, causal=False))
    with pytest.raises(TypeError, match="causal must be True, False or None; got str"):
        s2attn.attention(q, k, v, S2, causal="no")


def test_equal_lengths_find_one_layout():
    source.forget_layouts()
    for _ in range(3):
        cu = torch.tensor([0, 32, TOTAL])
        s2attn.attention(*packed(), S2, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert len(source._layouts) == 1
