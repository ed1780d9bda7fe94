"""`patch` and its undoing, saving and loading, compiled and checkpointed models, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import s2attn
from s2attn import Dense, Local, PerHead, Recipe, Sink, Stride, Unsupported, Window
from s2attn.integrations import transformers as host
from s2attn.integrations.transformers.interface import check_version
from tests.integrations.transformers.models import SHAPE, TOKENS, text, tiny

SPARSE = Recipe(Local(2, block=16) | Stride(3, block=16), layers={0: Sink(3) | Window(20)})
RECENT = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that other tests have compiled counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_patched_models_return_to_what_they_were() -> None:
    model, tokens = tiny(), text(1, 80)
    dense = model(tokens).logits
    assert s2attn.patch(model, SPARSE) is model
    sparse = model(tokens).logits
    with s2attn.patched(model, Window(16)):
        assert not torch.equal(model(tokens).logits, sparse)
    assert torch.equal(model(tokens).logits, sparse)
    s2attn.patch(model, Dense())
    torch.testing.assert_close(model(tokens).logits, dense, atol=1e-6, rtol=0)
    s2attn.unpatch(model)
    assert torch.equal(model(tokens).logits, dense)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "s2_attention")
    with pytest.raises(RuntimeError, match="on purpose"), s2attn.patched(model, SPARSE):
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_model_is_saved_with_its_recipe(tmp_path: Path) -> None:
    model, tokens = s2attn.patch(tiny(), SPARSE), text(1, 80)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "first")
    saved = json.loads((tmp_path / "first" / "config.json").read_text())
    assert saved["attn_implementation"] == "s2attn"
    assert saved["s2_attention"] == json.loads(SPARSE.to_json())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")  # before it was ever run
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == saved
    assert torch.equal(again(tokens).logits, expected)
    assert again.config._attn_implementation == "s2attn"
    s2attn.unpatch(again).save_pretrained(tmp_path / "third")
    assert not {"attn_implementation", "s2_attention"} & set(json.loads((tmp_path / "third" / "config.json").read_text()))


@torch.no_grad()
def test_a_language_model_inside_of_another_model(tmp_path: Path) -> None:
    words = {**SHAPE, **TOKENS, "num_key_value_heads": 2, "head_dim": 8, "image_token_index": 60}
    seen = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=words, vision_config=seen, mm_tokens_per_image=1)
    model, tokens = transformers.Gemma3ForConditionalGeneration(config).eval(), text(1, 40) % 59
    with pytest.raises(Unsupported, match="patch the language model inside"):
        s2attn.patch(model, SPARSE)
    s2attn.patch(model.model.language_model, SPARSE)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert [part._attn_implementation for part in (again.config.text_config, again.config.vision_config)] == ["s2attn", "sdpa"]
    assert torch.equal(again(tokens).logits, expected)


def test_a_saved_model_does_not_load_where_s2attn_is_unknown(tmp_path: Path) -> None:
    s2attn.patch(tiny(), SPARSE).save_pretrained(tmp_path)
    code = (
        f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})(transformers.torch.zeros(1, 4).long())"
    )
    code = code.replace("transformers.torch", "__import__('torch')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode
    assert "s2attn" in done.stderr.splitlines()[-1]


@torch.no_grad()
def test_an_unmodified_checkpoint_needs_a_recipe(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    host.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="s2attn")
    with pytest.raises(ValueError, match=r"config.s2_attention must hold a recipe.*s2attn.patch\(model, recipe\).*got nothing"):
        model(text(1, 8))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.s2_attention = json.loads(SPARSE.to_json())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=config, attn_implementation="s2attn")
    assert torch.equal(model(text(1, 80)).logits, s2attn.patch(tiny(), SPARSE)(text(1, 80)).logits)
    model.config.s2_attention = json.loads(Recipe(Window(8)).to_json())  # a changed configuration is read again
    assert torch.equal(model(text(1, 80)).logits, s2attn.patch(tiny(), Window(8))(text(1, 80)).logits)


def test_training_with_checkpoints() -> None:
    grads = []
    for checkpointing in (False, True):
        model = s2attn.patch(tiny(), SPARSE).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model(text(2, 80), labels=text(2, 80), use_cache=False).loss.backward()
        grads.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("loaded", [False, True])
@torch.no_grad()
def test_compiled_prefill(loaded: bool, tmp_path: Path, fresh_compiler: None) -> None:
    model, tokens = s2attn.patch(tiny("Mistral", sliding_window=30, num_hidden_layers=1), SPARSE.default), text(2, 80)
    expected = model(tokens, use_cache=False).logits
    if loaded:  # a model that has never run
        model.save_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, atol=1e-6, rtol=0)
    model.config.s2_attention = json.loads(Recipe(Window(8)).to_json())
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_compiled_rows(fresh_compiler: None) -> None:
    model, tokens = s2attn.patch(tiny(num_hidden_layers=1), SPARSE.default), text(2, 80)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[0, :30] = 0
    got = compiled(tokens, attention_mask=mask, use_cache=False).logits[0, 30:]
    expected = model(tokens[:1, 30:], position_ids=torch.arange(30, 80)[None]).logits[0]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    packed = torch.cat([torch.arange(30), torch.arange(50)])[None]
    with pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        compiled(tokens[:1], position_ids=packed, use_cache=False)


def test_compiled_training(fresh_compiler: None) -> None:
    model, tokens = s2attn.patch(tiny(num_hidden_layers=1), SPARSE.default), text(2, 80)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(tokens, labels=tokens, use_cache=False).loss.backward()
    got = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for one, weight in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(one, weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@torch.no_grad()
def test_compiled_decoding_with_a_static_cache(family: str, fresh_compiler: None) -> None:
    own = {"sliding_window": 24} if family == "Mistral" else {}
    model, tokens = s2attn.patch(tiny(family, num_hidden_layers=1, **own), Dense() if own else SPARSE.default), text(2, 70)
    mask = torch.ones_like(tokens)
    mask[0, :20] = 0
    past = transformers.StaticCache(config=model.config, max_cache_len=96)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out, new = [], tokens
    for _ in range(4):
        more = {} if RECENT else {"cache_position": torch.arange(mask.shape[1])[-new.shape[1] :]}
        run = model if new.shape[1] > 1 else step
        where = places[:, -new.shape[1] :]
        new = run(new, attention_mask=mask, position_ids=where, **{host.CACHE_ARGUMENT: past}, **more).logits[:, -1:].argmax(-1)
        out.append(new)
        mask, places = torch.cat([mask, mask[:, -1:]], 1), torch.cat([places, places[:, -1:] + 1], 1)
    for row, length in ((0, 20), (1, 0)):
        alone = model.generate(tokens[row : row + 1, length:], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=[])
        assert torch.equal(torch.cat(out, 1)[row], alone[0, -4:])


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dropout": ({"attention_dropout": 0.1}, {}, "dropout 0.1"),
    "a mask of the caller's own": ({}, {"attention_mask": torch.zeros(1, 1, 8, 8)}, r"\(1, 1, 8, 8\) torch.float32"),
}


@pytest.mark.parametrize(("changes", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    model = s2attn.patch(tiny(**changes), SPARSE).train()
    with pytest.raises(Unsupported, match=message):
        model(text(1, 8), **arguments)


@torch.no_grad()
def test_a_backend_of_choice_never_falls_back() -> None:
    model, tokens = s2attn.patch(tiny(), SPARSE), text(1, 40)
    expected = model(tokens).logits
    with s2attn.patched(model, SPARSE, backend="reference"):
        assert {layer.self_attn._s2attn_plan.backend for layer in model.model.layers} == {"reference"}
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-6, rtol=0)
        with pytest.raises(Unsupported, match="decode cannot run with backend='reference'"):
            model.generate(tokens, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    assert model.generate(tokens, max_new_tokens=2, cache_implementation="static", disable_compile=True).shape[1] > 40
    with pytest.raises(ValueError, match=r"backend must be one of 'auto'.*got 'fast'"):
        s2attn.patch(model, SPARSE, backend="fast")


class OldAttention(nn.Module):
    """Attention with code of its own: Transformers takes such classes for what they are by their source."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, 0, True


class OldModel(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig

    def __init__(self, config: Any, layer: Any) -> None:
        super().__init__(config)
        self.layer = layer(config)


def test_models_without_the_interface() -> None:
    config = transformers.LlamaConfig(**SHAPE)
    with pytest.raises(Unsupported, match="OldModel: its class does not use Transformers' AttentionInterface"):
        s2attn.patch(OldModel(config, OldAttention), Window(8))
    with pytest.raises(Unsupported, match="none of its modules is an attention layer"):
        s2attn.patch(OldModel(config, lambda config: nn.Identity()), Window(8))


def test_a_patch_that_fails_changes_nothing() -> None:
    model = tiny()
    model.config.is_causal = False
    with pytest.raises(Unsupported, match="configuration says is_causal=False"):
        s2attn.patch(model, SPARSE)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "s2_attention")


def test_models_that_recipes_have_no_meaning_for() -> None:
    with pytest.raises(TypeError, match="model must be a model of Transformers; got Linear"):
        s2attn.patch(torch.nn.Linear(2, 2), SPARSE)
    t5 = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(Unsupported, match="cross attention"):
        s2attn.patch(transformers.T5Model(t5), SPARSE)
    with pytest.raises(TypeError, match="recipe must be a Recipe or a Pattern; got str"):
        s2attn.patch(tiny(), "dense")
    with pytest.raises(ValueError, match="layers below 2, those of this model; got layer 5"):
        s2attn.patch(tiny(), Recipe(Dense(), layers={5: Window(8)}))
    with pytest.raises(ValueError, match="does not fit 4 heads over 2 KV heads"):
        s2attn.patch(tiny(), PerHead({3: Dense()}, default=Window(8)))


def test_host_versions() -> None:
    for version in ("4.55.4", "6.0.0"):
        with pytest.raises(Unsupported, match=f"version {version}; tested from 4.56"):
            check_version(version)
    check_version(transformers.__version__)


@torch.no_grad()
def test_a_cache_of_pages_gives_memory_back() -> None:
    model, tokens = s2attn.patch(tiny(), Sink(4) | Window(32)), text(2, 200)
    how: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
    expected = model.generate(tokens, **how)
    past = host.PastKeyValues.for_model(model, max_tokens=256, sequences=2, page_size=16)
    assert torch.equal(model.generate(tokens, **how, **{host.CACHE_ARGUMENT: past}), expected)
    assert past.get_seq_length() == 219
    assert past.pages.bytes_used < 0.5 * past.pages.bytes_dense
    past.reset()
    assert past.pages.bytes_used == 0
    assert torch.equal(model.generate(tokens, **how, **{host.CACHE_ARGUMENT: past}), expected)
    past.reset()
    how = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    beams = model.generate(tokens, **how, num_beams=3)
    past = host.PastKeyValues.for_model(model, max_tokens=256, sequences=12)
    assert torch.equal(model.generate(tokens, **how, num_beams=3, **{host.CACHE_ARGUMENT: past}), beams)


@torch.no_grad()
def test_a_cache_of_pages_takes_tokens_back() -> None:
    model, tokens = s2attn.patch(tiny(), SPARSE), text(1, 80)
    past = host.PastKeyValues.for_model(model, max_tokens=256, hold=8)
    model(tokens[:, :70], **{host.CACHE_ARGUMENT: past})
    first = model(tokens[:, 70:], **{host.CACHE_ARGUMENT: past}).logits
    past.crop(-8)
    torch.testing.assert_close(model(tokens[:, 72:], **{host.CACHE_ARGUMENT: past}).logits, first[:, 2:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_cache_of_pages_is_refused_where_it_does_not_belong() -> None:
    model = s2attn.patch(tiny(), SPARSE)
    past = host.PastKeyValues.for_model(model, max_tokens=64)
    with s2attn.patched(model, Window(8)), pytest.raises(Unsupported, match="the cache was made for"):
        model(text(1, 8), **{host.CACHE_ARGUMENT: past})
    past = host.PastKeyValues.for_model(model, max_tokens=64)
    with pytest.raises(Unsupported, match="nobody attended to the keys of layer 0"):
        s2attn.unpatch(model)(text(1, 8), **{host.CACHE_ARGUMENT: past})
    with pytest.raises(TypeError, match=r"pages must be a s2attn.SparseCache; got int"):
        host.PastKeyValues(3)
