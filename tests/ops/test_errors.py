"""Bad input: a clear error that names the argument, the rule and what came, before any work."""

from __future__ import annotations

import math

import pytest
import torch

import s2attn
from s2attn import Dense, HeadRange, Layout, Local, Recipe, Window, build_layout

P = Local(2, 16)


def t(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


Q, KV = t(2, 40, 4, 8), t(2, 40, 2, 8)
FLAT_Q, FLAT_KV = t(40, 4, 8), t(40, 2, 8)


def call(q=Q, k=KV, v=KV, pattern=P, **kw):
    return lambda: s2attn.attention(q, k, v, pattern, **kw)


def packed(cu_q, cu_k=None, **kw):
    cu_q = torch.tensor(cu_q) if isinstance(cu_q, list) else cu_q
    cu_k = torch.tensor(cu_k) if isinstance(cu_k, list) else (cu_q if cu_k is None else cu_k)
    return lambda: s2attn.attention(FLAT_Q, FLAT_KV, FLAT_KV, P, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **kw)


LAYOUT = build_layout(P, 4, 2, 40)
FUTURE = Layout.from_dense(torch.ones(40, 40, dtype=torch.bool), block=16)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (call(q=t(40, 4, 8)), ValueError, r"q must have shape \(batch, seq, heads, head_dim\); got \(40, 4, 8\)"),
        (call(k=t(2, 40, 8)), ValueError, r"k must have shape \(batch, seq, heads, head_dim\); got \(2, 40, 8\)"),
        (call(q=[1, 2]), TypeError, "q must be a tensor; got list"),
        (call(v=None), TypeError, "v must be a tensor; got NoneType"),
        (call(q=t(2, 40, 4, 8, dtype=torch.int32)), TypeError, r"q must have a floating point dtype; got torch.int32"),
        (call(k=KV.half(), v=KV.half()), TypeError, r"k must have the dtype of q, torch.float32; got torch.float16"),
        (call(q=t(2, 40, 4, 8).to("meta")), ValueError, "k must lie on the device of q, meta; got cpu"),
        (call(k=t(2, 40, 3, 8), v=t(2, 40, 3, 8)), ValueError, "q must have a multiple of the 3 heads of k; got 4"),
        (call(k=t(2, 40, 0, 8), v=t(2, 40, 0, 8)), ValueError, "q must have a multiple of the 0 heads of k"),
        (call(v=t(2, 41, 2, 8)), ValueError, r"v must have the shape of k but for the last axis, \(2, 40, 2\); got \(2, 41, 2\)"),
        (call(k=t(3, 40, 2, 8), v=t(3, 40, 2, 8)), ValueError, "k must have the batch of q, 2; got 3"),
        (call(k=t(2, 40, 2, 16)), ValueError, "k must have the head_dim of q, 8"),
        (call(scale=math.nan), ValueError, "scale must be finite; got nan"),
        (call(scale=math.inf), ValueError, "scale must be finite; got inf"),
        (call(scale="big"), TypeError, "scale must be a number; got str"),
        (call(softcap=0), ValueError, "softcap must be positive and finite; got 0"),
        (call(softcap=-2.5), ValueError, "softcap must be positive and finite; got -2.5"),
        (call(softcap=math.inf), ValueError, "softcap must be positive and finite; got inf"),
        (call(softcap=math.nan), ValueError, "softcap must be positive and finite; got nan"),
        (call(softcap="tanh"), TypeError, "softcap must be a number or None; got str"),
        (call(softcap=True), TypeError, "softcap must be a number or None; got bool"),
        (call(sinks=0.0), TypeError, "sinks must be a tensor or None; got float"),
        (call(sinks=t(4, dtype=torch.int64)), TypeError, "sinks must have a floating point dtype; got torch.int64"),
        (call(sinks=t(2)), ValueError, r"sinks must have shape \(4,\), one number for each head of q; got \(2,\)"),
        (call(sinks=t(4, 1)), ValueError, r"sinks must have shape \(4,\), one number for each head of q; got \(4, 1\)"),
        (call(sinks=t(4).to("meta")), ValueError, "sinks must lie on the device of q, cpu; got meta"),
        (call(pattern=3), TypeError, "pattern must be a Pattern, a Layout or a selector; got int"),
        (
            call(pattern=Recipe(P)),
            TypeError,
            r"pattern must be a Pattern, a Layout or a selector; take recipe.pattern\(layer\); got Recipe",
        ),
        (call(block=48), ValueError, "block must be one of 16, 32, 64, 128, 256; got 48"),
        (call(layer=-1), ValueError, "layer must be an integer >= 0; got -1"),
        (call(backend="cuda"), ValueError, r"backend must be one of 'auto', .*; got 'cuda'"),
        (call(backend=3), TypeError, "backend must be a string; got int"),
        (call(heads=(0, 4)), TypeError, "heads must be a HeadRange; got tuple"),
        (call(heads=HeadRange(0, 2, 8, 4)), ValueError, r"heads must name as many heads as q has \(4\); got \(0, 2\)"),
        (call(pattern=LAYOUT, block=16), ValueError, "block, layer and heads must be left out when a Layout is given"),
        (call(pattern=build_layout(P, 4, 2, 41)), ValueError, r"layout must have the lengths of q and k, \(40, 40\); got \(41, 41\)"),
        (
            call(q=t(2, 40, 2, 8), pattern=build_layout(P | s2attn.Stride(2, heads="query"), 4, 2, 40)),
            ValueError,
            "layout must have a number of heads that divides the 2 heads of q; got 4",
        ),
        (
            call(pattern=FUTURE),
            ValueError,
            "layout must be causal, or causal=False be passed; got a layout that lists keys after their query",
        ),
        (call(pattern=LAYOUT.to("meta")), ValueError, r"layout must lie on the device of q, cpu; .*; got meta"),
        (call(cu_seqlens_q=torch.tensor([0, 40])), ValueError, "cu_seqlens_q and cu_seqlens_k must be given together; got no cu_seqlens_k"),
        (
            call(cu_seqlens_q=torch.tensor([0, 40]), cu_seqlens_k=torch.tensor([0, 40])),
            ValueError,
            r"q must have shape \(total, heads, head_dim\)",
        ),
        (packed([0, 30, 20, 40]), ValueError, "cu_seqlens_q must never decrease; got 20 after 30"),
        (packed([0, 39]), ValueError, "cu_seqlens_q must end at the number of tokens, 40; got 39"),
        (packed([0, 41]), ValueError, "cu_seqlens_q must end at the number of tokens, 40; got 41"),
        (packed([1, 40]), ValueError, "cu_seqlens_q must start at 0; got 1"),
        (packed([-5, 40]), ValueError, "cu_seqlens_q must start at 0; got -5"),
        (packed([0, 40], [0, 10, 40]), ValueError, r"cu_seqlens_k must have as many numbers as cu_seqlens_q \(2\); got 3"),
        (packed([0, 40], [0, 12]), ValueError, "cu_seqlens_k must end at the number of tokens, 40; got 12"),
        (packed([40]), ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\); got \(1,\)"),
        (packed(torch.tensor([0.0, 40.0])), TypeError, "cu_seqlens_q must be an int32 or int64 tensor; got torch.float32"),
        (packed((0, 40), (0, 40)), TypeError, "cu_seqlens_q must be an int32 or int64 tensor; got tuple"),
        (
            lambda: s2attn.attention(
                FLAT_Q, FLAT_KV, FLAT_KV, LAYOUT, cu_seqlens_q=torch.tensor([0, 40]), cu_seqlens_k=torch.tensor([0, 40])
            ),
            ValueError,
            "layout must describe the call; it is of one sequence, not packed ones; got packed tensors",
        ),
        (lambda: build_layout("dense", 4, 2, 40), TypeError, "pattern must be a Pattern; got str"),
        (lambda: build_layout(P, 4, 3, 40), ValueError, r"num_kv_heads must divide num_heads \(4\); got 3"),
        (lambda: build_layout(P, 0, 1, 40), ValueError, "num_heads must be an integer >= 1; got 0"),
        (lambda: build_layout(P, 4, 2, -1), ValueError, "seqlen_q must be an integer >= 0; got -1"),
        (lambda: build_layout(P, 4, 2), TypeError, "seqlen_q must be an integer >= 0; got NoneType"),
        (lambda: HeadRange(4, 4, 8, 4), ValueError, r"heads must satisfy 0 <= start < end <= 8; got \(4, 4\)"),
        (lambda: HeadRange(0, 4, 8, 3), ValueError, r"heads num_heads must be a multiple of num_kv_heads \(3\); got 8"),
        (lambda: s2attn.SparseAttention(Dense(), 4, 3), ValueError, r"num_kv_heads must divide num_heads \(4\); got 3"),
        (lambda: s2attn.SparseAttention("dense", 4), TypeError, "pattern must be a Pattern or a selector; got str"),
        (lambda: s2attn.SparseAttention(Dense(), 4, softcap=0.0), ValueError, "softcap must be positive and finite; got 0.0"),
        (lambda: s2attn.SparseAttention(Dense(), 4, sinks=t(4)), TypeError, "sinks must be True or False; got Tensor"),
        (lambda: s2attn.SparseAttention(Window(2), 2)(Q, KV, KV), ValueError, r"q must have num_heads \(2\) heads; got 4"),
    ],
)
def test_bad_calls(make, error, message):
    with pytest.raises(error, match=message):
        make()


def broken(**changes):
    """The layout with some tensors of its rows, or fields of its own, replaced."""
    import dataclasses

    rows = {name: changes.pop(name) for name in list(changes) if name in ("ptr", "full", "tile_ptr", "idx", "tile")}
    return dataclasses.replace(LAYOUT, rows=dataclasses.replace(LAYOUT.rows, **rows), **changes)


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda: broken(ptr=LAYOUT.rows.ptr.int()), "I1"),
        (lambda: broken(ptr=LAYOUT.rows.ptr + 1), "I2"),
        (lambda: broken(ptr=LAYOUT.rows.ptr.flip(1)), "I2"),
        (lambda: broken(full=LAYOUT.rows.full + 9), "I3"),
        (lambda: broken(full=LAYOUT.rows.full - 9), "I3"),
        (lambda: broken(idx=LAYOUT.rows.idx + 9), "I4"),
        (lambda: broken(idx=LAYOUT.rows.idx - 9), "I4"),
        (lambda: broken(idx=torch.zeros_like(LAYOUT.rows.idx)), "I4"),
        (lambda: broken(tile=LAYOUT.rows.tile + 9), "I5"),
        (lambda: broken(tile_ptr=LAYOUT.rows.tile_ptr + 99), "I5"),
        (lambda: broken(seqlen_q=41), "I6"),
        (lambda: broken(tiles=torch.ones_like(LAYOUT.tiles)), "I[89]"),
    ],
)
def test_a_broken_layout_never_reaches_a_kernel(make, number):
    with pytest.raises(ValueError, match=rf"layout must hold its invariants \({number}|layout must have the lengths"):
        s2attn.attention(Q, KV, KV, make())


def test_a_layout_that_calls_itself_causal_and_is_not():
    import dataclasses

    with pytest.raises(ValueError, match=r"layout must hold its invariants \(I9"):
        s2attn.attention(Q, KV, KV, dataclasses.replace(FUTURE, causal=True))
    assert s2attn.attention(Q, KV, KV, FUTURE, causal=False).shape == Q.shape


def test_unsupported_names_every_backend_and_every_reason():
    meta = [x.to("meta") for x in (Q, KV, KV)]
    with pytest.raises(s2attn.Unsupported) as caught:
        from s2attn.backends import pick

        pick("auto", *meta)
    assert set(caught.value.reasons) == {"cpu", "torch", "triton", "reference"}
    assert all("meta" in " ".join(why) for why in caught.value.reasons.values())
