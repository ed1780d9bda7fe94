"""`PastKeyValues` takes tokens back: under assisted decoding, of padded rows, and whole or not at all."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import CacheLayerMixin

import s2attn
from s2attn import Local, Sink, Stride, Window
from s2attn.integrations import transformers as host

SPARSE = Sink(4) | Window(32)
PATTERNS = [SPARSE, Local(2, block=16) | Stride(3, block=16)]
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


def tiny(layers: int = 2, seed: int = 0, pattern: s2attn.Pattern = SPARSE) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return s2attn.patch(transformers.LlamaForCausalLM(config).eval(), pattern)


def text(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 11, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: torch.Tensor, past: host.PastKeyValues, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **{CACHE: past}, **more).logits


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("hold", [0, 24])
@pytest.mark.parametrize("assistant", [False, True])
def test_assisted_decoding_gives_the_tokens_of_plain_generate(
    pattern: s2attn.Pattern, hold: int, assistant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = tiny(pattern=pattern), text(1, 90)
    expected = model.generate(prompt, **GREEDY)
    past, removed = host.PastKeyValues.for_model(model, max_tokens=256, hold=hold), []
    crop = past.crop
    monkeypatch.setattr(past, "crop", lambda count: (removed.append(-count), crop(count))[1])
    help_: dict[str, Any] = {"assistant_model": tiny(layers=1, seed=3)} if assistant else {"prompt_lookup_num_tokens": 6}
    found = model.generate(prompt, **GREEDY, **help_, **{CACHE: past})
    assert torch.equal(found, expected)
    assert len(removed) > 3 and max(removed) > 0  # drafts came, and some were refused
    plain = host.PastKeyValues.for_model(model, max_tokens=256, hold=hold)
    model.generate(prompt, **GREEDY, **{CACHE: plain})
    assert past.bytes_used <= plain.bytes_used + 4 * plain.pages.page_bytes


def test_a_cache_says_whether_it_can_be_cropped() -> None:
    model = tiny()
    past = host.PastKeyValues.for_model(model, max_tokens=64)
    assert not past.is_croppable
    past.activate_past_recording()
    assert past.is_croppable
    past.reset()
    assert not past.is_croppable
    assert host.PastKeyValues.for_model(model, max_tokens=64, hold=3).is_croppable


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_crop_takes_padding_back_before_tokens(side: str) -> None:
    """Rows of 30, 24 and 17 tokens in 30 slots, 8 slots back: then each row goes on as the row alone does."""
    model, lengths, back = tiny(), [30, 24, 17], 8
    rows = [text(1, count, seed=count) for count in lengths]
    padded, mask = torch.zeros(3, 30, dtype=torch.int64), torch.zeros(3, 30, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(0, lengths[i]) if side == "right" else slice(30 - lengths[i], 30)
        padded[i, where], mask[i, where] = row[0], 1
    past = host.PastKeyValues.for_model(model, max_tokens=64, sequences=3, hold=8)
    logits(model, padded, past, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    past.crop(-back)
    left = [min(count, 30 - back) if side == "right" else count - back for count in lengths]
    assert [past.pages.length(sequence) for sequence in past.sequences] == left and past.get_seq_length() == 22
    new, after = text(3, 5, seed=9), torch.cat([mask[:, :22], torch.ones(3, 5, dtype=torch.int64)], dim=1)
    positions = torch.tensor(left)[:, None] + torch.arange(5)
    found = logits(model, new, past, attention_mask=after, position_ids=positions)
    for i, row in enumerate(rows):
        alone = logits(model, torch.cat([row[:, : left[i]], new[i : i + 1]], dim=1), host.PastKeyValues.for_model(model, max_tokens=64))
        torch.testing.assert_close(found[i], alone[0, -5:], atol=2e-5, rtol=0)


def test_a_crop_that_is_refused_changes_no_row() -> None:
    """The second row has given back what a shorter one reads; the first has not."""
    model = tiny()
    past = host.PastKeyValues.for_model(model, max_tokens=256, sequences=2, page_size=16)
    mask = torch.ones(2, 150, dtype=torch.int64)
    mask[0, 10:] = 0
    logits(model, text(2, 150), past, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    with pytest.raises(ValueError, match=r"tokens must be at most .* hold= keeps them"):
        past.crop(-145)
    assert [past.pages.length(sequence) for sequence in past.sequences] == [10, 150] and past.get_seq_length() == 150
    for count in (1, -151):
        with pytest.raises(ValueError, match=f"tokens_to_remove must be negative, or 0, and at least -150; got {count}"):
            past.crop(count)


def test_older_versions_say_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    past = host.PastKeyValues.for_model(model, max_tokens=64, hold=4)
    logits(model, text(1, 20), past)
    monkeypatch.delattr(CacheLayerMixin, "is_croppable", raising=False)
    past.crop(17)
    assert past.get_seq_length() == past.pages.length(past.sequences[0]) == 17


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_fails_can_be_made_again(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer, so that no layer has taken anything."""
    model, tokens = tiny(), text(2, 50)
    past, whole = (host.PastKeyValues.for_model(model, max_tokens=64, sequences=2) for _ in range(2))
    expected = [logits(model, part, whole) for part in tokens.split(30, dim=1)]

    def broken(*_: Any, **__: Any) -> None:
        raise error("mine")

    for part, right in zip(tokens.split(30, dim=1), expected, strict=True):
        for name in ("decode", "store", "trim"):
            before = past.sequences, past.get_seq_length(), past.pages.bytes_used, past.pages.ledger.sequences
            with monkeypatch.context() as patch, pytest.raises(error, match="mine"):
                patch.setattr(past.pages, name, broken)
                logits(model, part, past)
            assert before == (past.sequences, past.get_seq_length(), past.pages.bytes_used, past.pages.ledger.sequences)
        assert torch.equal(logits(model, part, past), right)
    with monkeypatch.context() as patch, pytest.raises(error, match="mine"):
        patch.setattr(past.pages, "free", broken)
        past.reorder_cache(torch.tensor([1, 1]))
    assert past.pages.ledger.sequences == past.sequences and past.pages.bytes_used == whole.pages.bytes_used


def test_memory_follows_what_is_kept() -> None:
    """A prompt of 1,600 tokens, a window of 32 in 6 layers: one layer's prompt is the most that is held at a time."""
    model = tiny(layers=6)
    past = host.PastKeyValues.for_model(model, max_tokens=4096)
    assert past.bytes_allocated < 0.05 * 4096 * 6 * 2 * 16 * 4
    model.generate(text(1, 1600), **GREEDY, **{CACHE: past})
    assert past.bytes_used < 0.1 * past.bytes_dense
    assert past.bytes_used <= past.bytes_allocated < 0.35 * past.bytes_dense
    fixed = host.PastKeyValues.for_model(model, max_tokens=4096, num_pages=500)
    assert fixed.bytes_allocated == 500 * fixed.pages.page_bytes
