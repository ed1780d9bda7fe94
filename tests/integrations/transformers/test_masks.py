"""The mask function and the attention function by themselves: what they know, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils as masks

import s2attn
from s2attn import Local, Recipe, Sink, Stride, Unsupported, Window
from s2attn.integrations.transformers.attend import attention_forward
from s2attn.integrations.transformers.places import make_places, read_places
from s2attn.nn import positions
from tests.integrations.transformers.models import text, tiny

SPARSE = Recipe(Local(2, block=16) | Stride(3, block=16), layers={0: Sink(3) | Window(20)})
SQUARE: dict[str, Any] = {"batch_size": 2, "q_length": 5, "kv_length": 5, "device": torch.device("cpu")}


def causal(**more: Any) -> Any:
    return make_places(**{**SQUARE, "mask_function": masks.causal_mask_function, **more})


def test_nothing_is_said_where_every_slot_is_real() -> None:
    ones = torch.ones(2, 5, dtype=torch.bool)
    for more in ({}, {"attention_mask": ones}, {"attention_mask": ones, "q_length": 1, "q_offset": 4}):
        places = read_places(causal(**more), more.get("q_length", 5), 5)
        assert (places.flags, places.cu, places.keys, places.key_order) == (0, None, None, None)


def test_places_of_padded_rows() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    places = read_places(causal(attention_mask=mask), 5, 5)
    assert places.keys.tolist() == [3, 2]
    assert places.key_order.tolist() == [[2, 3, 4, 0, 1], [0, 1, 2, 3, 4]]
    assert places.query_order is None
    places = read_places(causal(attention_mask=mask, q_length=2, q_offset=3), 2, 5)
    assert places.queries.tolist() == [2, 0]
    assert places.query_order.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("offset", [3, torch.tensor(3)])
def test_slots_behind_the_last_token_are_no_keys(offset: Any) -> None:
    places = read_places(causal(q_length=2, q_offset=offset, kv_length=8), 2, 8)
    assert places.keys.tolist() == [5, 5]
    assert places.key_order is None
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    places = read_places(causal(q_length=2, q_offset=offset, kv_length=8, attention_mask=mask), 2, 8)
    assert places.keys.tolist() == [4, 5]


def other(batch: Any, head: Any, q: Any, k: Any) -> Any:
    return q == k


def test_kinds_of_masks_that_are_not_known_are_refused() -> None:
    whole = masks.causal_mask_function
    for function, more in (
        (masks.or_masks(whole, other), {}),
        (masks.and_masks(whole, other), {}),
        (other, {}),
        (whole, {"use_vmap": True}),
        (masks.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)), {"local_size": 4}),
    ):
        with pytest.raises(Unsupported, match="more than causality, padding and windows"):
            causal(mask_function=function, **more)
    for mask in (torch.zeros(2, 1, 5, 5), torch.ones(2, 5, dtype=torch.int64), "causal"):
        with pytest.raises(Unsupported, match="cannot honour this attention mask"):
            read_places(mask, 5, 5)
    with pytest.raises(Unsupported, match="only 2-D padding masks"):
        causal(attention_mask=torch.ones(2, 5, 5, dtype=torch.bool))
    with pytest.raises(Unsupported, match="not of the keys"):
        read_places(causal(attention_mask=torch.tensor([[True] * 4 + [False]] * 2)), 5, 6)
    bidirectional = getattr(masks, "bidirectional_mask_function", None)
    if bidirectional is not None:
        with pytest.raises(Unsupported, match="cross attention"):
            causal(mask_function=bidirectional, kv_length=9)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"dropout": 0.5}, "no dropout"),
    "a bias": ({"position_bias": torch.zeros(1, 4, 8, 8)}, "position_bias was given"),
    "a mask of heads": ({"head_mask": torch.ones(4)}, "head_mask was given"),
    "weights": ({"output_attentions": True}, "output_attentions was given"),
    "a window both ways": ({"sliding_window": 8, "is_causal": False}, "windows that look both ways"),
    "a window in the mask alone": ({"attention_mask": torch.empty(1, 2, 1, 0, dtype=torch.int64)}, "says nothing"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_cannot_be_honoured_are_refused(arguments: dict[str, Any], message: str) -> None:
    module = s2attn.patch(tiny(), SPARSE).model.layers[0].self_attn
    tensors = torch.randn(1, 4, 8, 8), *torch.randn(2, 1, 2, 8, 8)
    with pytest.raises(Unsupported, match=message):
        attention_forward(module, *tensors, **{"attention_mask": None, **arguments})


@torch.no_grad()
def test_a_step_of_a_cache_reaches_a_patched_model() -> None:
    model, tokens = s2attn.patch(tiny(), SPARSE), text(1, 60)
    expected = model(tokens).logits
    cache = s2attn.SparseCache.for_model(model, max_tokens=128)
    sequence, parts = cache.open(), []
    for part in tokens.split(25, dim=1):
        with cache.step([sequence], part):
            parts.append(model(part, position_ids=positions(part), use_cache=False).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"position_ids must be s2attn.nn.positions\(tokens\)"), cache.step([sequence], tokens[:, :4]):
        model(tokens[:, :4], use_cache=False)
    with pytest.raises(ValueError, match="attention_mask must be left out"), cache.step([sequence], tokens[:, :4]):
        model(tokens[:, :4], attention_mask=torch.tensor([[0, 1, 1, 1]]), use_cache=False)
    assert cache.length(sequence) == 60
