"""A shared prefix attended once is what decode gives, for every pattern; the two layouts list what one did, and each block once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s2attn
from s2attn import Dense, HeadRange, Local, Power, Recipe, Stride, Window, build_layout, preset
from s2attn.layout.cascade import split_prefix
from s2attn.patterns import PRESETS
from s2attn.testing import assert_close, dense_mask, eager, oracle
from s2attn.testing.paging import scatter
from s2attn.testing.strategies import patterns

S2 = Local(2, 16) | Stride(3, block=16)
GROUPS = [(1, 1), (4, 2), (4, 1)]


def cumulative(numbers) -> torch.Tensor:
    return torch.tensor([0, *numbers]).cumsum(0)


@settings(max_examples=60)
@given(
    patterns(),
    st.sampled_from(GROUPS),
    st.sampled_from([16, 32]),
    st.integers(0, 8),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_two_layouts_list_what_one_did(pattern, group, block, blocks, tails, layer) -> None:
    """Pair by pair, in dense masks; with all invariants of layouts."""
    prefix = blocks * block
    queries, tokens = [n for n, _ in tails], [prefix + n + m for n, m in tails]
    cu_q, cu_k = cumulative(queries), cumulative(tokens)
    whole = build_layout(pattern, *group, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, block=block, layer=layer)
    halves = split_prefix(whole, prefix)
    expected, shared, own = (one.validate().to_dense() for one in (whole, halves.shared, halves.own))
    assert not shared[:, :, prefix:].any()
    for i, (n, m) in enumerate(zip(queries, tokens, strict=True)):
        rows, begin = slice(int(cu_q[i]), int(cu_q[i]) + n), int(cu_k[i])
        assert torch.equal(expected[:, rows, begin : begin + prefix], shared[:, rows, :prefix])
        assert torch.equal(expected[:, rows, begin + prefix : begin + m], own[:, rows, begin + prefix : begin + m])
        assert not own[:, rows, begin : begin + prefix].any()


def test_a_block_of_the_prefix_is_listed_once_for_all_sequences() -> None:
    """32 forks that decode together: the prefix costs what it costs one of them."""
    for pattern in (Dense(), S2):
        cu_q, cu_k = cumulative([1] * 32), cumulative([1024 + i % 5 + 1 for i in range(32)])
        whole = build_layout(pattern, 4, 2, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, block=32)
        one = build_layout(pattern, 4, 2, cu_seqlens_q=cu_q[:2], cu_seqlens_k=cu_k[:2], block=32)
        halves = split_prefix(whole, 1024)
        own = halves.own.rows.entries
        assert own <= 2 * 32 * 2
        assert halves.shared.rows.entries == one.rows.entries - split_prefix(one, 1024).own.rows.entries
        assert whole.rows.entries == own + 32 * halves.shared.rows.entries


def forks(pattern, group, prefix, tails, page_size, *, layer=0, dtype=torch.float32):
    """Queries, keys and values of sequences that begin alike, and the cache they lie in: each page of the prefix once."""
    heads, kv_heads = group
    head_k, head_v = torch.randn(prefix, kv_heads, 16).to(dtype), torch.randn(prefix, kv_heads, 24).to(dtype)
    q = [torch.randn(n, heads, 16).to(dtype) for n, _ in tails]
    k = [torch.cat([head_k, torch.randn(n + m, kv_heads, 16).to(dtype)]) for n, m in tails]
    v = [torch.cat([head_v, torch.randn(n + m, kv_heads, 24).to(dtype)]) for n, m in tails]
    masks = [dense_mask(pattern, *group, n, prefix + n + m, layer=layer) for n, m in tails]
    read = [mask.unflatten(0, (kv_heads, -1)).any(1).any(1) for mask in masks]
    some = torch.stack([mine[:, :prefix] for mine in read]).any(0)  # what any of them reads of the prefix
    paged = scatter(k, v, [torch.cat([some, mine[:, prefix:]], dim=1) for mine in read], page_size, per_head=True)
    pages = prefix // page_size
    paged.block_table[1:, :, :pages] = paged.block_table[:1, :, :pages]
    for i in range(len(tails)):
        for head, page in (~some.unflatten(1, (pages, -1)).any(2)).nonzero().tolist():
            paged.block_table[i, head, page] = -1  # evicted, and with it what garbage stood there
    return q, k, v, masks, paged


def compare(out, lse, q, k, v, masks, **scoring) -> None:
    at = 0
    for my_q, my_k, my_v, mask in zip(q, k, v, masks, strict=True):
        if len(my_q):
            sets = [formula(my_q[None], my_k[None], my_v[None], mask, **scoring) for formula in (eager, oracle)]
            for name, got, plain, exact in zip(("out", "lse"), (out[at:][: len(my_q)], lse[:, at:][:, : len(my_q)]), *sets, strict=True):
                assert_close(name, got, plain[0], exact[0].double())
        at += len(my_q)


SMALL = {
    "s2": {"local": 2, "stride": 3, "block": 16},
    "phi3_small": {"local": 2, "stride": 3, "block": 16},
    "power_attention": {"sink": 16, "local": 2, "block": 16},
    "streaming_llm": {"sink": 3, "window": 40},
    "duo_attention": {"sink": 5, "window": 30},
    "longnet": {"segment": 2, "levels": 3, "block": 16},
    "longformer": {"window": 40, "global_tokens": 7},
    "bigbird": {"window": 2, "random": 2, "global_blocks": 1, "block": 16},
}


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("group", [(2, 2), (8, 2)])
def test_every_preset_against_the_oracle(name, group) -> None:
    """Sequences at different positions, 0 to 16 queries each, what is not read evicted."""
    torch.manual_seed(0)
    given_pattern, tails = preset(name, **SMALL[name]), [(1, 0), (3, 40), (16, 5), (0, 3), (1, 77)]
    for layer in range(2):
        pattern = given_pattern.pattern(layer) if isinstance(given_pattern, Recipe) else given_pattern
        q, k, v, masks, paged = forks(pattern, group, 160, tails, 32, layer=layer)
        cu, sinks = cumulative([n for n, _ in tails]), torch.randn(group[0])
        where = {"block_table": paged.block_table, "seq_lens": paged.seq_lens, "cu_seqlens_q": cu}
        how = {"sinks": sinks, "softcap": 4.0, "layer": layer, "return_lse": True}
        out, lse = s2attn.decode_cascade(torch.cat(q), paged.k_pages, paged.v_pages, pattern, **where, **how, prefix_tokens=160)
        compare(out, lse, q, k, v, masks, sinks=sinks, softcap=4.0)
        plain = s2attn.decode(torch.cat(q), paged.k_pages, paged.v_pages, pattern, **where, **how)
        torch.testing.assert_close((out, lse), plain, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype) -> None:
    torch.manual_seed(0)
    q, k, v, masks, paged = forks(Dense(), (4, 2), 128, [(1, 0), (1, 30), (1, 9)], 16, dtype=dtype)
    where = {"block_table": paged.block_table, "seq_lens": paged.seq_lens}
    out, lse = s2attn.decode_cascade(torch.stack(q), paged.k_pages, paged.v_pages, Dense(), **where, return_lse=True)
    assert out.shape == (3, 1, 4, 24) and out.dtype == dtype and lse.shape == (3, 4, 1)
    compare(out[:, 0], lse[:, :, 0].T, q, k, v, masks)


def test_the_prefix_is_found_and_padding_is_no_part_of_it(monkeypatch) -> None:
    """Tables agree for 4 pages, or one sequence has 3 before its queries; a row of length 0 and one without queries count for nothing."""
    from s2attn.ops import cascade

    seen = []
    split = cascade.split_prefix
    monkeypatch.setattr(cascade, "split_prefix", lambda layout, prefix: seen.append(prefix) or split(layout, prefix))
    k_pages, v_pages = torch.randn(2, 30, 16, 2, 8)
    table = torch.tensor([[5, 6, 7, 8, 9], [5, -1, 7, 8, 10], [5, 6, 7, 8, 11], [0, 0, 0, 0, 0], [20, 21, 22, 23, 24]])
    for lens, expected in (([70, 70, 65, 0, 80], 64), ([70, 70, 60, 0, 80], 48)):
        call = {"block_table": table, "seq_lens": torch.tensor(lens), "cu_seqlens_q": torch.tensor([0, 1, 3, 4, 5, 5])}
        pattern, q = Stride(2, offset=0, block=16), torch.randn(5, 4, 8)
        out = s2attn.decode_cascade(q, k_pages, v_pages, pattern, **call)
        torch.testing.assert_close(out, s2attn.decode(q, k_pages, v_pages, pattern, **call), atol=2e-6, rtol=2e-6)
        assert seen.pop() == expected and (out[4] == 0).all() and not seen
    alone = {"block_table": table[:1], "seq_lens": torch.tensor([70])}
    s2attn.decode_cascade(q[None, :1], k_pages, v_pages, Dense(), **alone)
    assert not seen  # nobody to share with


def test_heads_of_one_rank_are_those_of_the_whole_model() -> None:
    torch.manual_seed(0)
    q, _, _, _, paged = forks(Dense(), (8, 4), 96, [(1, 20), (1, 3)], 16)
    where, heads = {"seq_lens": paged.seq_lens}, HeadRange(4, 8, num_heads=8, num_kv_heads=4)
    whole = s2attn.decode(torch.stack(q), paged.k_pages, paged.v_pages, S2, block_table=paged.block_table, **where)
    mine = (torch.stack(q)[:, :, 4:], paged.k_pages[:, :, 2:], paged.v_pages[:, :, 2:])
    out = s2attn.decode_cascade(*mine, S2, block_table=paged.block_table[:, 2:], **where, heads=heads)
    torch.testing.assert_close(out, whole[:, :, 4:], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_tokens": 8}, r"prefix_tokens must be a multiple of page_size \(16\), up to the 32 tokens that all tables share"),
        ({"prefix_tokens": 48}, r"prefix_tokens must be a multiple of page_size \(16\), up to the 32 tokens that all tables share"),
        ({"prefix_tokens": -16}, "prefix_tokens must be an integer >= 0; got -16"),
        ({"seq_lens": torch.tensor([40, 49])}, r"seq_lens must be 0 to 48, the tokens that block_table has room for; got \[40, 49\]"),
        ({"seq_lens": torch.tensor([40])}, r"seq_lens must have shape \(2,\)"),
        ({"pattern": "dense"}, "pattern must be a Pattern; .* got str"),
        ({"backend": "nobody"}, "backend must be"),
        ({"softcap": -1.0}, "softcap must be positive and finite"),
    ],
)
def test_bad_calls_are_refused(change, message) -> None:
    call = {"block_table": torch.tensor([[1, 2, 3], [1, 2, 4]]), "seq_lens": torch.tensor([40, 41]), "pattern": Dense(), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        s2attn.decode_cascade(torch.randn(2, 1, 2, 8), *torch.randn(2, 5, 16, 1, 8), **call)


def test_a_layout_is_split_before_its_queries_only() -> None:
    layout = build_layout(Window(20), 2, cu_seqlens_q=torch.tensor([0, 4]), cu_seqlens_k=torch.tensor([0, 40]), block=16)
    with pytest.raises(ValueError, match="prefix must end before the first query that sees anything; got 48"):
        split_prefix(layout, 48)
    with pytest.raises(ValueError, match=r"prefix must be a multiple of the layout's block \(16\); got 8"):
        split_prefix(layout, 8)
    with pytest.raises(ValueError, match="layout must be causal and of packed sequences"):
        split_prefix(build_layout(Power(), 2, seqlen_q=40), 0)
