"""`decode` against the float64 oracle on the gathered keys: patterns, pages, lengths, tables, dtypes; and garbage refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s2attn
from s2attn import Dense, HeadRange, Layout, Local, PerHead, Recipe, Sink, Stride, Unsupported, Window, XAttention, build_layout, preset
from s2attn.ops.paged import decode_op
from s2attn.ops.source import pattern_text
from s2attn.patterns import PRESETS
from s2attn.testing import assert_close, dense_mask, eager, oracle
from s2attn.testing.paging import Paged, scatter
from s2attn.testing.problems import random_mask
from s2attn.testing.strategies import patterns

S2 = Local(2, 16) | Stride(3, block=16)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


GROUPS = [(1, 1), (2, 2), (4, 2), (4, 1), (6, 3)]


def random_sequences(lengths, heads, kv_heads, dim=16, dim_v=16, dtype=torch.float32):
    """Queries, keys and values of sequences with (queries, keys) of those lengths."""
    torch.manual_seed(0)
    q = [torch.randn(n, heads, dim).to(dtype) for n, _ in lengths]
    k = [torch.randn(m, kv_heads, dim).to(dtype) for _, m in lengths]
    v = [torch.randn(m, kv_heads, dim_v).to(dtype) for _, m in lengths]
    return q, k, v


def masks_of(pattern, lengths, heads, kv_heads, layer=0):
    return [dense_mask(pattern, heads, kv_heads, n, m, layer=layer) for n, m in lengths]


def scattered(masks, k, v, page_size, **layout) -> Paged:
    """Pages that hold what the masks show, and NaN everywhere else."""
    kv_heads = k[0].shape[1]
    read = [mask.unflatten(0, (kv_heads, -1)).any(1).any(1) for mask in masks]
    return scatter(k, v, read, page_size, **layout)


def compare(out, lse, q, k, v, masks, **scoring):
    """Packed results, sequence by sequence."""
    at = 0
    for my_q, my_k, my_v, mask in zip(q, k, v, masks, strict=True):
        end = at + len(my_q)
        if not mask.numel():
            assert (out[at:end] == 0).all() and (lse[:, at:end] == -torch.inf).all()
            at = end
            continue
        sets = [formula(my_q[None], my_k[None], my_v[None], mask, **scoring) for formula in (eager, oracle)]
        for name, got, plain, exact in zip(("out", "lse"), (out[at:end], lse[:, at:end]), *sets, strict=True):
            assert_close(name, got, plain[0], exact[0].double())
        at = end


def decode_packed(q, paged: Paged, pattern, **call):
    cu = torch.tensor([0, *torch.tensor([len(x) for x in q]).cumsum(0).tolist()])
    return s2attn.decode(torch.cat(q), paged.k_pages, paged.v_pages, pattern, **tables(paged), cu_seqlens_q=cu, return_lse=True, **call)


def tables(paged: Paged):
    return {"block_table": paged.block_table, "seq_lens": paged.seq_lens}


@settings(max_examples=60)
@given(
    patterns(),
    st.sampled_from(GROUPS),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 200)), min_size=1, max_size=4),
    st.sampled_from([16, 32, 48, 64, 128, 256]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
)
def test_random_calls(pattern, group, lengths, page_size, per_head, heads_first, layer):
    """Mixed in one call: no queries, one, several, a whole prompt, more queries than keys; nothing but listed pages is read.

    Every other page and slot holds NaN.
    """
    q, k, v = random_sequences(lengths, *group, dim_v=24)
    masks = masks_of(pattern, lengths, *group, layer=layer)
    paged = scattered(masks, k, v, page_size, per_head=per_head, heads_first=heads_first)
    compare(*decode_packed(q, paged, pattern, layer=layer), q, k, v, masks)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("q_len", [1, 2, 5, 16])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_decode_of_every_row_equals_its_prefill(name, q_len, group):
    """Row by row, ``q_len`` rows at a time, with ragged lengths in one batch."""
    found = preset(name)
    pattern = found.pattern(0) if isinstance(found, Recipe) else found
    heads, kv_heads, seqlen, dim = 2 * group, 2, 1500, 16
    q, k, v = torch.randn(seqlen, heads, dim), torch.randn(seqlen, kv_heads, dim), torch.randn(seqlen, kv_heads, dim)
    whole, whole_lse = s2attn.attention(q[None], k[None], v[None], pattern, return_lse=True)
    ends = [seqlen, seqlen - 1, 1027, 64, q_len]
    masks = masks_of(pattern, [(q_len, end) for end in ends], heads, kv_heads)
    paged = scattered(masks, [k[:end] for end in ends], [v[:end] for end in ends], 32, per_head=True)
    rows = torch.stack([q[end - q_len : end] for end in ends])
    out, lse = s2attn.decode(rows, paged.k_pages, paged.v_pages, pattern, **tables(paged), return_lse=True)
    for i, end in enumerate(ends):
        torch.testing.assert_close(out[i], whole[0, end - q_len : end], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse[i], whole_lse[0, :, end - q_len : end], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dtypes_softcap_and_sinks(dtype, softcap):
    lengths, group = [(1, 130), (3, 77), (70, 70)], (4, 2)
    q, k, v = random_sequences(lengths, *group, dtype=dtype)
    masks = masks_of(S2, lengths, *group)
    paged = scattered(masks, k, v, 16, per_head=False)
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf])
    out, lse = decode_packed(q, paged, S2, softcap=softcap, sinks=sinks, scale=0.3)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    compare(out, lse, q, k, v, masks, scale=0.3, softcap=softcap, sinks=sinks)


def test_float8_pages_are_read_with_a_scale_for_each_kv_head():
    lengths, group, size = [(2, 100), (1, 33)], (4, 2), 32
    q, k, v = random_sequences(lengths, *group)
    slots, total = torch.cat([torch.arange(100), 128 + torch.arange(33)]), 8 * size
    k_pages, v_pages = torch.zeros(2, total // size, size, 2, 16).to(torch.float8_e4m3fn)
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([0.005, 1.0])  # with 0.005 some values are beyond 448 and get cut
    s2attn.store_kv(torch.cat(k), torch.cat(v), k_pages, v_pages, slots, k_scale=k_scale, v_scale=v_scale)
    table = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1]])
    paged = Paged(k_pages, v_pages, table, torch.tensor([100, 33]))
    out, lse = decode_packed(q, paged, S2, k_scale=k_scale, v_scale=v_scale)
    kept_k, kept_v = ((x.float() * s[:, None]).flatten(0, 1) for x, s in ((k_pages, k_scale), (v_pages, v_scale)))
    stored_k, stored_v = ([x[:100], x[128:161]] for x in (kept_k, kept_v))
    assert float((kept_k[slots] - torch.cat(k)).abs().max()) < 0.3
    assert float(kept_v[:, 0].abs().max()) == pytest.approx(2.24, rel=1e-3)
    compare(out, lse, q, stored_k, stored_v, masks_of(S2, lengths, *group))


def test_padding_sees_nothing():
    """Padded entries of a captured batch: a query, a length of 0, and a table of -1."""
    table, lengths = torch.tensor([[-1], [0]]), torch.tensor([0, 5])
    pages = torch.randn(2, 1, 16, 2, 8)
    q = torch.randn(2, 1, 4, 8)
    out, lse = s2attn.decode(q, *pages, Dense(), block_table=table, seq_lens=lengths, return_lse=True)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and (out[1] != 0).any()
    out, lse = s2attn.decode(q, *pages, Dense(), block_table=table, seq_lens=lengths * 0, sinks=torch.ones(4), return_lse=True)
    assert (out == 0).all() and (lse == 1).all()


@pytest.mark.parametrize("shape", [(0, 1), (2, 0)])
def test_no_queries_at_all(shape):
    pages, table, lengths = (
        torch.randn(2, 3, 16, 2, 8),
        torch.zeros(shape[0], 1, dtype=torch.int32),
        torch.zeros(shape[0], dtype=torch.int32),
    )
    out, lse = s2attn.decode(torch.randn(*shape, 4, 8), *pages, S2, block_table=table, seq_lens=lengths, return_lse=True)
    assert out.shape == (*shape, 4, 8) and lse.shape == (shape[0], 4, shape[1])


def test_nan_in_a_seen_key_reaches_only_the_rows_that_see_it():
    lengths, group = [(40, 90)], (2, 1)
    q, k, v = random_sequences(lengths, *group)
    k[0][70] = torch.nan
    pattern = Window(8)
    paged = scattered(masks_of(pattern, lengths, *group), k, v, 16, per_head=False)
    out, _ = decode_packed(q, paged, pattern)
    position = torch.arange(50, 90)
    assert torch.equal(out.isnan().any(-1).any(-1), (position >= 70) & (position < 78))


def test_strides_that_are_no_rows():
    """K and V side by side in pages of one tensor, with different widths: addressed without a copy of the cache."""
    both = torch.randn(6, 2, 16, 24)
    k_pages, v_pages = both[..., :16].transpose(1, 2), both[..., 16:].transpose(1, 2)
    q, table, lengths = torch.randn(1, 3, 2, 16), torch.tensor([[5, 2, 0]]), torch.tensor([41])
    out = s2attn.decode(q, k_pages, v_pages, S2, block_table=table, seq_lens=lengths)
    k, v = (x[[5, 2, 0]].flatten(0, 1)[None, :41] for x in (k_pages, v_pages))
    torch.testing.assert_close(out, s2attn.attention(q, k, v, S2), atol=2e-6, rtol=2e-6)


def test_rows_of_a_square_layout():
    """For one pattern, and for random blocks that no pattern made: a query reads the row of its position."""
    lengths, group = [(3, 70), (1, 33), (17, 100), (0, 5), (4, 2)], (4, 2)
    q, k, v = random_sequences(lengths, *group)
    layout = build_layout(S2, *group, 100, block=16)
    masks = masks_of(S2, lengths, *group)
    paged = scattered(masks, k, v, 32, per_head=True)
    compare(*decode_packed(q, paged, layout), q, k, v, masks)
    mask = random_mask(2, 100, 100, 16, causal=True)
    chosen = Layout.from_dense(mask, block=16)
    chosen = Layout(16, True, chosen.rows, chosen.tiles, chosen.q_spans, chosen.k_spans)
    rows = [mask.repeat_interleave(2, 0)[:, max(m - n, 0) : m, :m] for n, m in lengths]
    masks = [
        torch.cat([torch.zeros(4, n - row.shape[1], row.shape[2], dtype=torch.bool), row], 1)
        for (n, _), row in zip(lengths, rows, strict=True)
    ]
    paged = scattered(masks, k, v, 32, per_head=False)
    compare(*decode_packed(q, paged, chosen), q, k, v, masks)
    with pytest.raises(ValueError, match="layout must have a row for every position, 100 by seq_lens; got 96"):
        decode_packed(q, paged, build_layout(S2, *group, 96, block=16))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_layout_takes_the_place_of_a_pattern(heads):
    """A layout from anywhere, here of random blocks: with one list for all heads, one per KV head, or one per query head."""
    lengths, group = [(3, 70), (1, 33), (20, 96)], (4, 2)
    q, k, v = random_sequences(lengths, *group)
    patterns_by_head = {h: Stride(2, offset=h % 2, block=16) | Window(5 + h) for h in range(heads)}
    pattern = PerHead(patterns_by_head, heads="query") if heads == 4 else PerHead({h: patterns_by_head[h % heads] for h in range(2)})
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in zip(*lengths, strict=True))
    layout = build_layout(pattern, *group, block=16, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    masks = masks_of(pattern, lengths, *group)
    paged = scattered(masks, k, v, 32, per_head=True)
    compare(*decode_packed(q, paged, layout), q, k, v, masks)
    with pytest.raises(ValueError, match=r"layout must have sequences of \[70, 33, 95\] keys"):
        decode_packed(q, Paged(paged.k_pages, paged.v_pages, paged.block_table, paged.seq_lens - torch.tensor([0, 0, 1])), layout)
    with pytest.raises(ValueError, match="layer and heads must be left out when a Layout is given"):
        decode_packed(q, paged, layout, layer=1)
    wide = build_layout(pattern, *group, block=64, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    with pytest.raises(ValueError, match=r"layout must have a block that divides page_size \(32\); got 64"):
        decode_packed(q, paged, wide)
    with pytest.raises(ValueError, match="layout must be causal, and square or of packed sequences"):
        decode_packed(q, paged, build_layout(Dense(), 4, 2, 24, 200, block=16))


def test_a_range_of_heads():
    pattern = PerHead({0: Dense(), 3: Sink(3) | Window(9)}, default=Window(40))
    heads = HeadRange(4, 8, num_heads=8, num_kv_heads=4)
    q, k, v = torch.randn(1, 2, 4, 16), torch.randn(1, 96, 2, 16), torch.randn(1, 96, 2, 16)
    pages = [x[0].unflatten(0, (6, 16)) for x in (k, v)]
    out = s2attn.decode(q, *pages, pattern, block_table=torch.arange(6)[None], seq_lens=torch.tensor([96]), heads=heads)
    torch.testing.assert_close(out, s2attn.attention(q, k, v, pattern, heads=heads), atol=2e-6, rtol=2e-6)


def test_bits_do_not_depend_on_the_batch():
    lengths, group = [(1, 300), (16, 150), (1, 40)], (8, 2)
    q, k, v = random_sequences(lengths, *group)
    masks = masks_of(S2, lengths, *group)
    paged = scattered(masks, k, v, 16, per_head=True)
    out, lse = decode_packed(q, paged, S2)
    at = 0
    for i, (n, _) in enumerate(lengths):
        alone = Paged(paged.k_pages, paged.v_pages, paged.block_table[i : i + 1], paged.seq_lens[i : i + 1])
        one, one_lse = decode_packed(q[i : i + 1], alone, S2)
        assert torch.equal(one, out[at : at + n]) and torch.equal(one_lse, lse[:, at : at + n])
        at += n


def good_call():
    return {
        "q": torch.randn(2, 1, 4, 16),
        "k_pages": torch.randn(5, 16, 2, 16),
        "v_pages": torch.randn(5, 16, 2, 16),
        "pattern": S2,
        "block_table": torch.tensor([[0, 1, 2], [3, 4, -1]], dtype=torch.int32),
        "seq_lens": torch.tensor([48, 20], dtype=torch.int32),
    }


def test_the_op_is_registered_as_torch_wants_it():
    c = good_call()
    text = pattern_text(S2, 16, True, 0, None)
    q, lengths, cu = c["q"].reshape(1, 2, 4, 16), c["seq_lens"], torch.tensor([0, 1, 2])
    arguments = (q, c["k_pages"], c["v_pages"], None, None, None, c["block_table"], lengths, cu, [], text, 0.25, 0.0, "auto", True, False)
    torch.library.opcheck(decode_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compilers_take_it_as_one_operator():
    """One graph serves all lengths; nothing in it looks at numbers."""
    c = good_call()

    def call(q, k_pages, v_pages, table, lengths):
        return s2attn.decode(2 * q, k_pages, v_pages, S2, block_table=table, seq_lens=lengths) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths in (torch.tensor([47, 20]), torch.tensor([48, 21])):
        arguments = c["q"], c["k_pages"], c["v_pages"], c["block_table"], lengths
        assert torch.equal(compiled(*arguments), call(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"block_table": torch.tensor([[0, 5, 2], [3, 4, -1]])},
            r"block_table must name one of the 5 pages .*; got 5 for sequence 0",
        ),
        ({"block_table": torch.tensor([[0, 1, 2], [3, -1, -1]])}, r"block_table must name .*; got -1 for sequence 1, KV head 0, entry 1"),
        ({"block_table": torch.tensor([[0, 1, 2], [-(2**31), 4, 1]])}, "block_table must name"),
        ({"block_table": torch.tensor([[0, 1, 2]])}, "block_table must have a line for each sequence of q, 2"),
        ({"block_table": torch.zeros(2, 3, 3, dtype=torch.int32)}, r"block_table must have shape \(batch, max_pages\), or \(batch, 2, max"),
        ({"block_table": torch.zeros(2, 3)}, "block_table must be an int32 or int64 tensor"),
        ({"block_table": [[0, 1, 2]]}, "block_table must be an int32 or int64 tensor"),
        ({"seq_lens": torch.tensor([49, 20])}, "seq_lens must be 0 to 48, .*; got 49 for sequence 0"),
        ({"seq_lens": torch.tensor([48, -1])}, "seq_lens must be 0 to 48, .*; got -1 for sequence 1"),
        ({"seq_lens": torch.tensor([48])}, r"seq_lens must have shape \(2,\)"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 2])}, r"q must have shape \(total_q, heads, head_dim\) with cu_seqlens_q"),
        ({"q": torch.randn(2, 4, 16), "cu_seqlens_q": torch.tensor([0, 1])}, r"cu_seqlens_q must have shape \(3,\)"),
        ({"q": torch.randn(2, 4, 16), "cu_seqlens_q": torch.tensor([0, 3, 2])}, "cu_seqlens_q must never decrease"),
        ({"q": torch.randn(2, 1, 3, 16)}, "q must have a multiple of the 2 heads of k_pages"),
        ({"q": torch.randn(2, 1, 4, 8)}, "k_pages must have the head_dim of q, 8"),
        ({"q": torch.randn(2, 1, 4, 16, dtype=torch.float64)}, "k_pages must have the dtype of q"),
        ({"v_pages": torch.randn(5, 32, 2, 16)}, "v_pages must have the shape of k_pages"),
        ({"k_pages": torch.randn(5, 24, 2, 16), "v_pages": torch.randn(5, 24, 2, 16)}, "k_pages must have a page_size that is a multiple"),
        ({"k_scale": torch.ones(2)}, "k_scale must be left out unless the pages are float8"),
        ({"pattern": Recipe(S2)}, r"pattern must be a Pattern or a Layout; take recipe.pattern\(layer\)"),
        ({"pattern": XAttention(8, block=32)}, r"pattern must be a Pattern or a Layout; a selector has no pages .*PageBounds.pages"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"sinks": torch.ones(3)}, "sinks must have shape"),
        ({"heads": HeadRange(0, 2, 4, 2)}, "heads must name as many heads as q has"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        s2attn.decode(**{**good_call(), **change})


@settings(max_examples=100)
@given(st.lists(st.integers(-3, 8), min_size=6, max_size=6), st.lists(st.integers(-5, 60), min_size=2, max_size=2))
def test_garbage_tables_are_refused_or_not_read(entries, lengths):
    """Any numbers: either an error that names them, or a finite result from pages of the table alone."""
    call = {**good_call(), "block_table": torch.tensor(entries).view(2, 3), "seq_lens": torch.tensor(lengths), "pattern": Window(10)}
    needed = [entries[3 * i + j] for i, n in enumerate(lengths) if n > 0 for j in range(max(0, n - 10) // 16, -(-n // 16)) if j < 3]
    good = all(0 <= n <= 48 for n in lengths) and all(0 <= page < 5 for page in needed)
    if good:
        assert bool(s2attn.decode(**call).isfinite().all())
    else:
        with pytest.raises(ValueError, match=r"block_table must name|seq_lens must be"):
            s2attn.decode(**call)


def test_refusals_name_every_backend():
    with pytest.raises(Unsupported, match=r"decode cannot run with backend='reference'(.|\n)*reference: it does not read keys from pages"):
        s2attn.decode(**good_call(), backend="reference")
    call = good_call()
    call["q"].requires_grad_()
    with pytest.raises(Unsupported, match="decode has no gradient"):
        s2attn.decode(**call)
    with torch.no_grad():
        assert not s2attn.decode(**call).requires_grad
