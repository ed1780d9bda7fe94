"""`PastKeyValues` that is full: no layer changes, and the same call succeeds when there is room."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Dense, Window
from s2attn.cache import CacheFull
from s2attn.integrations.transformers import CACHE_ARGUMENT, PastKeyValues
from tests.integrations.transformers.models import text, tiny


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_full_cache_changes_no_layer(padded: bool) -> None:
    model, tokens = s2attn.patch(tiny(), Dense()), text(1, 32)
    mask = torch.ones_like(tokens)
    if padded:
        tokens, mask = torch.cat([tokens, tokens[:, :5]], 1), torch.cat([mask, mask[:, :5] * 0], 1)
    past = PastKeyValues.for_model(model, max_tokens=64, num_pages=9, page_size=16)
    first, second = {"attention_mask": mask[:, :16]}, {"attention_mask": mask}
    first[CACHE_ARGUMENT] = second[CACHE_ARGUMENT] = past
    model(tokens[:, :16], **first)  # 2 layers of 2 heads: 4 pages
    other = past.pages.open()
    past.pages.append([other], 0, *torch.randn(2, 1, 16, 2, 8))
    for _ in range(2):
        with pytest.raises(CacheFull):  # layer 0 alone would fit into the 3 pages that are free
            model(tokens[:, 16:], **second)
        assert [past.pages.length(past.sequences[0], layer) for layer in range(2)] == [16, 16]
        assert past.get_seq_length() == 16
    past.pages.free(other)
    expected = model(tokens[:, :32], use_cache=False).logits[:, 16:]
    got = model(tokens[:, 16:], **second).logits[:, :16]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_layers_take_the_pages_that_earlier_layers_gave_back() -> None:
    model, tokens = s2attn.patch(tiny(), Window(16)), text(1, 64)
    past = PastKeyValues.for_model(model, max_tokens=128, num_pages=12, page_size=16)
    expected = model(tokens, use_cache=False).logits
    got = model(tokens, **{CACHE_ARGUMENT: past}).logits  # 8 pages for each layer
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    small = PastKeyValues.for_model(model, max_tokens=128, num_pages=8, page_size=16)
    with pytest.raises(CacheFull):
        model(tokens, **{CACHE_ARGUMENT: small})
    assert small.get_seq_length() == 0
    assert small.pages.bytes_used == 0


@torch.no_grad()
def test_a_call_that_an_error_ended_is_noticed() -> None:
    model, tokens = s2attn.patch(tiny(), Dense()), text(1, 16)
    past = PastKeyValues.for_model(model, max_tokens=64)

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(tokens, **{CACHE_ARGUMENT: past})
    hook.remove()
    with pytest.raises(ValueError, match=r"layers of one length: an error ended the last call.*got \[16, 0\]"):
        model(tokens, **{CACHE_ARGUMENT: past})
    past.reset()
    got = model(tokens, **{CACHE_ARGUMENT: past}).logits
    torch.testing.assert_close(got, model(tokens, use_cache=False).logits, atol=1e-6, rtol=0)
