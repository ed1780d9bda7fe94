"""Layouts from masks of blocks: the same pairs as the mask spelled out token by token, with all invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2attn.layout import Layout, from_blocks

LENGTH = st.integers(0, 150)


def spelled_out(masks, lengths, block, causal):
    heads, total_q, total_k = masks[0].shape[0], sum(t for t, _ in lengths), sum(s for _, s in lengths)
    dense, at_q, at_k = torch.zeros(heads, total_q, total_k, dtype=torch.bool), 0, 0
    for mask, (t, s) in zip(masks, lengths, strict=True):
        tokens = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :t, :s]
        dense[:, at_q : at_q + t, at_k : at_k + s] = tokens.tril(s - t) if causal else tokens
        at_q, at_k = at_q + t, at_k + s
    return dense


@settings(max_examples=60)
@given(st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([16, 64]), st.booleans(), st.data())
def test_allows_the_chosen_blocks_and_nothing_else(lengths, heads, block, causal, data):
    density = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    masks = [torch.rand(heads, -(-t // block), -(-s // block)) < density for t, s in lengths]
    layout = from_blocks(masks, lengths, block=block, causal=causal)
    assert layout.validate().packed == (len(lengths) > 1)
    assert torch.equal(layout.to_dense(), spelled_out(masks, lengths, block, causal))


def test_lists_what_the_dense_mask_lists():
    mask = torch.rand(2, 4, 5) < 0.5
    layout, dense = from_blocks([mask], [(60, 75)], block=16), Layout.from_dense(spelled_out([mask], [(60, 75)], 16, True), block=16)
    assert layout.causal
    for head in range(2):
        for line in range(4):
            full, partial = layout.rows.line(head, line)
            expected_full, expected_partial = dense.rows.line(head, line)
            assert (full, [b for b, _ in partial]) == (expected_full, [b for b, _ in expected_partial])


@pytest.mark.parametrize(
    ("masks", "lengths", "error", "words"),
    [
        ([], [], ValueError, "one mask for each of the 0 sequences"),
        ([torch.ones(1, 2, 2)], [(100, 100)], TypeError, "chosen must hold bool tensors; got Tensor"),
        ([torch.ones(1, 2, 3, dtype=torch.bool)], [(100, 100)], ValueError, r"masks of shape \(1, 2, 2\).*got \(1, 2, 3\)"),
        ([torch.ones(0, 2, 2, dtype=torch.bool)], [(100, 100)], ValueError, "at least one head"),
    ],
)
def test_masks_that_do_not_fit(masks, lengths, error, words):
    with pytest.raises(error, match=words):
        from_blocks(masks, lengths)
