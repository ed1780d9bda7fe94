"""`store_kv`: every token in its slot, padding left out, nothing written when anything is wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import s2attn


@given(st.lists(st.integers(-4, 79), min_size=0, max_size=30, unique_by=lambda s: s if s >= 0 else object()), st.booleans(), st.booleans())
def test_tokens_land_in_their_slots(slots, heads_first, wide):
    shape = (5, 2, 16, 8) if heads_first else (5, 16, 2, 8)
    k_pages, v_pages = torch.zeros(2, *shape)
    if heads_first:
        k_pages, v_pages = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    torch.manual_seed(0)
    k, v = torch.randn(2, len(slots), 2, 8)
    s2attn.store_kv(k, v, k_pages, v_pages, torch.tensor(slots, dtype=torch.int64 if wide else torch.int32))
    for new, pages in ((k, k_pages), (v, v_pages)):
        expected = torch.zeros(80, 2, 8)
        for token, slot in zip(new, slots, strict=True):
            if slot >= 0:
                expected[slot] = token
        assert torch.equal(pages.reshape(80, 2, 8), expected)


def test_a_batch_of_tokens_and_values_of_another_width():
    k_pages, v_pages = torch.zeros(3, 16, 1, 4, dtype=torch.bfloat16), torch.zeros(3, 16, 1, 6, dtype=torch.bfloat16)
    k, v = torch.ones(2, 2, 1, 4, dtype=torch.bfloat16), torch.ones(2, 2, 1, 6, dtype=torch.bfloat16)
    s2attn.store_kv(k, v, k_pages, v_pages, torch.tensor([[0, 47], [-1, 20]]))
    assert k_pages.sum() == 12 and v_pages.sum() == 18
    assert k_pages[2, 15].sum() == 4 and v_pages[1, 4].sum() == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": torch.tensor([0, 48, 1])}, "slot_mapping must name slots below 48, the size of the cache; got 48"),
        ({"slot_mapping": torch.tensor([5, 1, 5])}, "slot_mapping must name no slot twice"),
        ({"slot_mapping": torch.tensor([0.0, 1.0, 2.0])}, "slot_mapping must be an int32 or int64 tensor"),
        ({"slot_mapping": torch.tensor([0, 1])}, r"k must have shape \(2, 2, 8\), by slot_mapping and k_pages; got \(3, 2, 8\)"),
        ({"slot_mapping": None}, "slot_mapping must be a tensor"),
        ({"v": torch.ones(3, 1, 8)}, r"v must have shape \(3, 2, 8\)"),
        ({"k": torch.ones(3, 2, 8, dtype=torch.float64)}, "k must have the dtype of its pages, torch.float32"),
        ({"v_scale": torch.ones(2)}, "v_scale must be left out unless the pages are float8"),
        ({"v_pages": torch.zeros(3, 16, 1, 8)}, "v_pages must have the shape of k_pages"),
    ],
)
def test_nothing_is_written_when_anything_is_wrong(change, message):
    pages = torch.zeros(3, 16, 2, 8), torch.zeros(3, 16, 2, 8)
    call = {"k": torch.ones(3, 2, 8), "v": torch.ones(3, 2, 8), "k_pages": pages[0], "v_pages": pages[1], "slot_mapping": torch.arange(3)}
    with pytest.raises((ValueError, TypeError), match=message):
        s2attn.store_kv(**{**call, **change})
    assert not pages[0].any() and not pages[1].any()
