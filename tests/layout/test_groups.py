"""MergeQ: merged rows say exactly what the rows said, for every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn import Local, Sink, Stride, Window
from s2attn.layout import Layout, build_layout
from s2attn.layout.groups import ABSENT, FULL, RowGroups, group_rows, ranges, unique_heads
from tests.support.strategies import call_shapes, patterns


def expected_groups(layout: Layout, factor: int) -> list[tuple[int, int]]:
    """First block and number of blocks of each group, counted one by one."""
    groups: list[tuple[int, int]] = []
    before = None
    for line, seq in enumerate(layout.q_spans.seq.tolist()):
        if seq == before and groups[-1][1] < factor:
            groups[-1] = groups[-1][0], groups[-1][1] + 1
        else:
            groups.append((line, 1))
        before = seq
    return groups


def check(layout: Layout, factor: int) -> RowGroups:
    merged = group_rows(layout, factor)
    groups = expected_groups(layout, factor)
    assert merged.factor == factor and merged.heads == layout.heads and merged.groups == len(groups)
    assert list(zip(merged.first.tolist(), merged.count.tolist(), strict=True)) == groups
    assert [t.dtype for t in (merged.ptr, merged.full, merged.sub_ptr, merged.idx, merged.sub)] == [
        torch.int64,
        torch.int32,
        torch.int64,
        torch.int32,
        torch.int32,
    ]
    for head in range(layout.heads):
        for g, (first, count) in enumerate(groups):
            said: dict[int, list[int]] = {}
            for sub in range(count):
                full, partial = layout.rows.line(head, first + sub)
                for block, code in [*((b, FULL) for b in full), *partial]:
                    said.setdefault(block, [ABSENT] * count)[sub] = code
            full, rest = merged.group(head, g)
            assert full == sorted(b for b, codes in said.items() if codes == [FULL] * count)
            assert rest == sorted((b, codes) for b, codes in said.items() if codes != [FULL] * count)
            beyond = merged.sub[int(merged.sub_ptr[head, g]) :][: len(rest), count:]
            assert torch.all(beyond == ABSENT)
    return merged


@settings(max_examples=60, deadline=None)
@given(pattern=patterns(), shape=call_shapes(250), factor=st.integers(1, 6))
def test_every_pattern(pattern, shape, factor) -> None:
    layout = build_layout(
        pattern,
        shape.num_heads,
        shape.num_kv_heads,
        seqlen_q=shape.seqlen_q,
        seqlen_k=shape.seqlen_k,
        block=min(shape.block, 64),
        causal=shape.causal,
        layer=shape.layer,
    )
    check(layout, factor)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), lines=st.integers(1, 9), keys=st.integers(1, 9), factor=st.integers(1, 5))
def test_random_masks(seed, lines, keys, factor) -> None:
    """Also layouts that are not KV-efficient: blocks that come and go."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, (2, lines, keys)).repeat(16, 1).repeat(16, 2)
    mask = torch.from_numpy((kind == 2) | ((kind == 1) & (rng.random(kind.shape) < 0.5)))
    check(Layout.from_dense(mask[:, : lines * 16 - 3, : keys * 16 - 5], block=16), factor)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 16])
def test_groups_never_cross_sequences(factor: int) -> None:
    cu = torch.tensor([0, 100, 100, 133, 200, 207])
    check(build_layout(Local(2, 16) | Sink(3), 2, block=16, cu_seqlens_q=cu, cu_seqlens_k=cu), factor)


def test_no_query_blocks() -> None:
    cu = torch.tensor([0, 0])
    merged = group_rows(build_layout(Window(5), 2, block=16, cu_seqlens_q=cu, cu_seqlens_k=cu), 4)
    assert merged.groups == 0 and merged.ptr.tolist() == [[0], [0]]


def test_heads_that_share_storage_share_it_here() -> None:
    layout = build_layout(Local(4) | Stride(2, offset=0), 8, seqlen_q=2048)
    merged = check(layout, 4)
    assert len(unique_heads(layout)[0]) == 1
    assert torch.equal(merged.ptr, merged.ptr[:1].expand_as(merged.ptr))
    assert merged.idx.numel() == int(merged.ptr[0, -1])


def test_memory_follows_the_listed_blocks() -> None:
    layout = build_layout(Local(4) | Stride(16), 8, seqlen_q=65536)
    merged = group_rows(layout, 4)
    assert merged.idx.numel() <= layout.rows.idx.numel()
    assert merged.sub.numel() <= 4 * merged.idx.numel()


def test_factor_is_checked() -> None:
    with pytest.raises(ValueError, match="factor must be an integer >= 1; got 0"):
        group_rows(build_layout(Window(5), 1, seqlen_q=40), 0)


def test_ranges() -> None:
    assert ranges(np.array([3, 9, 0]), np.array([2, 0, 1])).tolist() == [3, 4, 0]
