"""Padding, packed rows, caches: a row gives what it gives alone, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import s2attn
from s2attn import Dense, Local, Recipe, Sink, Stride, Unsupported, Window
from s2attn.integrations.transformers import CACHE_ARGUMENT, attend
from tests.integrations.transformers.models import oracle, text, tiny

SPARSE = Recipe(Local(2, block=16) | Stride(3, block=16), layers={0: Sink(3) | Window(20)})
LENGTHS = (70, 33, 1, 52)


def padded(side: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Rows of these lengths, and their mask; "gap" puts half of the padding into the middle."""
    tokens, mask = text(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(mask, lengths, strict=True):
        if side == "gap":
            row[: length // 2] = row[len(row) - (length - length // 2) :] = 1
        else:
            row[: length if side == "right" else None] = 1
            row[: 0 if side == "right" else len(row) - length] = 0
    return tokens, mask


def alone(model: Any, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of each row without its padding."""
    return [model(row[real.bool()][None]).logits[0] for row, real in zip(tokens, mask, strict=True)]


@pytest.mark.parametrize("side", ["left", "right", "gap"])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(side: str) -> None:
    model = s2attn.patch(tiny(), SPARSE)
    tokens, mask = padded(side)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=places).logits
    assert logits.isfinite().all()
    for got, real, expected in zip(logits, mask, alone(model, tokens, mask), strict=True):
        torch.testing.assert_close(got[real.bool()], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_under_a_dense_recipe_is_sdpa(side: str) -> None:
    model = tiny()
    tokens, mask = padded(side)
    expected = model(tokens, attention_mask=mask).logits
    with s2attn.patched(model, Dense()):
        got = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=0)


def test_gradients_of_a_padded_batch() -> None:
    model = tiny()
    tokens, mask = padded("left")
    labels = torch.where(mask.bool(), tokens, -100)
    grads = []
    for recipe in (None, Dense()):
        if recipe is not None:
            s2attn.patch(model, recipe)
        model.zero_grad()
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
    for got, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static", "sparse", "paged decode"])
@torch.no_grad()
def test_generation_from_left_padding_is_each_row_alone(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = s2attn.patch(tiny(), SPARSE)
    tokens, mask = padded("left")
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
    one_by_one = [model.generate(row[real.bool()][None], **how)[0, int(real.sum()) :] for row, real in zip(tokens, mask, strict=True)]
    if cache == "static":
        how |= {"cache_implementation": "static", "disable_compile": True}
    if cache == "sparse":
        how[CACHE_ARGUMENT] = transformers_past(model, rows=len(tokens))
    if cache == "paged decode":  # what other devices than CPUs do
        monkeypatch.setattr(attend, "_decodes", lambda *tensors: not torch.is_grad_enabled())
    together = model.generate(tokens, attention_mask=mask, **how)[:, tokens.shape[1] :]
    assert torch.equal(together, torch.stack(one_by_one))
    if cache == "paged decode":
        assert torch.equal(
            model.generate(tokens, **how), model.generate(tokens, **how, cache_implementation="static", disable_compile=True)
        )


def transformers_past(model: Any, rows: int, **more: Any) -> Any:
    from s2attn.integrations.transformers import PastKeyValues

    return PastKeyValues.for_model(model, max_tokens=256, sequences=rows, **more)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "sparse"])
@torch.no_grad()
def test_a_padded_prompt_in_chunks(side: str, cache: str) -> None:
    model = s2attn.patch(tiny(), SPARSE)
    tokens, mask = padded(side)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    past = {
        "dynamic": transformers.DynamicCache,
        "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=100),
        "sparse": lambda: transformers_past(model, len(tokens)),
    }[cache]()
    chunks = []
    for begin, end in ((0, 40), (40, 41), (41, 70)):
        where = {"position_ids": places[:, begin:end], CACHE_ARGUMENT: past, "use_cache": True}
        if cache == "static" and "cache_position" in str(transformers.LlamaForCausalLM.forward.__code__.co_varnames):
            where["cache_position"] = torch.arange(begin, end)
        chunks.append(model(tokens[:, begin:end], attention_mask=mask[:, :end], **where).logits)
    for got, real, expected in zip(torch.cat(chunks, 1), mask, alone(model, tokens, mask), strict=True):
        torch.testing.assert_close(got[real.bool()], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q"])
def test_packed_rows_are_their_sequences(how: str) -> None:
    model = s2attn.patch(tiny(), SPARSE)
    lengths = (40, 1, 29, 50)
    tokens = text(1, sum(lengths))
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    more = {}
    if how == "cu_seq_lens_q":
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        more = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 50, "max_length_k": 50}
    logits = model(tokens, position_ids=places, use_cache=False, **more).logits[0]
    for got, part in zip(logits.split(lengths), tokens[0].split(lengths), strict=True):
        torch.testing.assert_close(got, model(part[None]).logits[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_several_rows_that_are_packed(cached: bool) -> None:
    model = s2attn.patch(tiny(), SPARSE)
    tokens, places = text(2, 60), torch.stack([torch.cat([torch.arange(20), torch.arange(40)]), torch.arange(60)])
    logits = model(tokens, position_ids=places, use_cache=cached).logits
    for got, part in ((logits[0, :20], tokens[:1, :20]), (logits[0, 20:], tokens[:1, 20:]), (logits[1], tokens[1:])):
        torch.testing.assert_close(got, model(part).logits[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3Text", "Gemma2", "GptOss"])
@torch.no_grad()
def test_the_models_own_window_cuts_the_pattern(family: str) -> None:
    own: dict[str, Any] = {"sliding_window": 24}
    if family == "Gemma3Text":
        own["layer_types"] = ["sliding_attention", "full_attention"]
    if family == "GptOss":
        own |= {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        }
    model, tokens = tiny(family, "eager", **own), text(2, 80)  # soft-caps and sinks are not for sdpa
    expected = model(tokens).logits
    with s2attn.patched(model, Dense()):
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-6, rtol=0)
        dynamic = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        again = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False)
        assert torch.equal(dynamic, again)
        static = model.generate(
            tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, cache_implementation="static", disable_compile=True
        )
        assert torch.equal(dynamic, static)
    if family != "GptOss":
        with oracle(model, SPARSE):
            expected = model(tokens, use_cache=False).logits
        with s2attn.patched(model, SPARSE):
            torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_cache_that_forgets_keys_is_refused_for_patterns_of_places() -> None:
    model = s2attn.patch(tiny("Mistral", sliding_window=24), SPARSE)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(Unsupported, match=r"(?s)has no places.*layer 0: Sink.*PastKeyValues"):
        model.generate(text(1, 40), **how)
    expected = model.generate(text(1, 40), **how, use_cache=False)
    assert torch.equal(expected, model.generate(text(1, 40), **how, **{CACHE_ARGUMENT: transformers.DynamicCache()}))
    assert torch.equal(expected, model.generate(text(1, 40), **how, **{CACHE_ARGUMENT: transformers_past(model, 1)}))


@pytest.mark.parametrize("cache", ["dynamic", "sparse"])
@torch.no_grad()
def test_autocast(cache: str) -> None:
    model, (tokens, mask) = tiny(), padded("left")
    expected = model(tokens, attention_mask=mask).logits
    with s2attn.patched(model, Dense()), torch.autocast("cpu", torch.bfloat16):
        past = transformers.DynamicCache() if cache == "dynamic" else transformers_past(model, len(tokens))
        got = model(tokens, attention_mask=mask, **{CACHE_ARGUMENT: past}, use_cache=True).logits
    torch.testing.assert_close(got.float()[mask.bool()], expected[mask.bool()], atol=0.02, rtol=0)
