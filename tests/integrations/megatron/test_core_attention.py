"""One rank: against Megatron's own attention where a recipe is dense, and under an explicit mask where it is not."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import random as random_states
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from s2attn import Dense, PerHead, Recipe, Window
from s2attn.integrations.megatron import S2CoreAttention, with_s2
from s2attn.integrations.spec import to_spec
from tests.support import dense_mask

pytestmark = pytest.mark.usefixtures("world")


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Loss and gradients to float32 rounding."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(
            found[1][name], grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=lambda text, of=name: f"{of}: {text}"
        )


def use_masks(gpt: ModuleType, model: Any, recipe: Recipe) -> None:
    """Hand every layer of Megatron's own attention the mask that the recipe spells out; True hides a key."""
    for number, layer in enumerate(model.decoder.layers):
        core = layer.self_attention.core_attention
        hidden = ~dense_mask(recipe.pattern(number), 8, model.config.num_query_groups, gpt.TOKENS, gpt.TOKENS, layer=number)[None]

        def mask(module: Any, args: tuple, kwargs: dict, hidden: Tensor = hidden) -> tuple[tuple, dict]:
            return (*args[:3], hidden), kwargs

        core.register_forward_pre_hook(mask, with_kwargs=True)


@pytest.mark.parametrize("softmax_type", ["vanilla", "off-by-one", "learnable"])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_dense_recipe_is_megatrons_own_attention(gpt: ModuleType, softmax_type: str, groups: int) -> None:
    settings = {"softmax_type": softmax_type}
    dense, own = gpt.Case(Dense(), groups, settings=settings), gpt.Case(None, groups, settings=settings)
    megatrons = gpt.build(own)
    use_masks(gpt, megatrons, Recipe(Dense()))  # the plain causal mask, which Megatron would make on a CUDA device
    assert_same(gpt.step(dense, gpt.build(dense)), gpt.step(own, megatrons))


@pytest.mark.parametrize("settings", [{}, {"softmax_scale": 0.5}, {"apply_query_key_layer_scaling": True}], ids=str)
def test_a_sparse_recipe_is_megatrons_attention_under_its_mask(gpt: ModuleType, settings: dict) -> None:
    case, own = gpt.Case(gpt.SPARSE, settings=settings), gpt.Case(None, settings={**settings, "attention_softmax_in_fp32": True})
    oracle = gpt.build(own)
    use_masks(gpt, oracle, gpt.SPARSE)
    found = gpt.step(case, gpt.build(case))
    assert_same(found, gpt.step(own, oracle))
    dense = gpt.step(gpt.Case(Dense()), gpt.build(gpt.Case(Dense(), settings=settings)))
    assert abs(found[0] - dense[0]) > 1e-3, "the recipe must matter for this to be a test"


def test_packed_sequences_are_the_sequences_alone(gpt: ModuleType) -> None:
    case = gpt.Case(gpt.SPARSE, lengths=(56, 1, 0, 71))
    model = gpt.build(case)
    tokens, labels, places = gpt.batch_of(case)
    together = model(tokens, places, None, labels=labels, packed_seq_params=gpt.packing(case))
    alone = [
        model(token, place, None, labels=label)
        for token, place, label in zip(*(part.split(case.lengths, 1) for part in (tokens, places, labels)), strict=True)
        if token.numel()
    ]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_padding_behind_packed_sequences_is_not_seen(gpt: ModuleType) -> None:
    """Sequences of 50 and 60 tokens in places for 64: the tokens behind them change nothing before them."""
    case = gpt.Case(gpt.SPARSE, lengths=(64, 64))
    model, (tokens, labels, places) = gpt.build(case), gpt.batch_of(case)
    packed = gpt.packing(case)
    real = torch.tensor([0, 50, 110], dtype=torch.int32)
    packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = packed.cu_seqlens_q
    packed.cu_seqlens_q = packed.cu_seqlens_kv = real
    keep = [*range(50), *range(64, 124)]
    padded = model(tokens, places, None, labels=labels, packed_seq_params=packed)
    close = gpt.Case(gpt.SPARSE, lengths=(50, 60))
    alone = model(tokens[:, keep], places[:, keep], None, labels=labels[:, keep], packed_seq_params=gpt.packing(close))
    torch.testing.assert_close(padded[:, keep], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", ["object", "text"])
def test_the_recipe_may_stand_in_the_configuration(gpt: ModuleType, kept: str) -> None:
    config = gpt.config_of(gpt.Case())
    config.s2_attention = to_spec(gpt.SPARSE) if kept == "object" else gpt.SPARSE.to_json()
    spec = with_s2(get_gpt_layer_local_spec(), config)
    model = gpt.GPTModel(config, spec, gpt.VOCABULARY, 256, position_embedding_type="rope")
    layers = [layer.self_attention.core_attention for layer in model.decoder.layers]
    assert [core.pattern for core in layers] == [gpt.SPARSE.pattern(number) for number in range(3)]
    by_hand = S2CoreAttention(config, 2, layers[0].attn_mask_type, "self")
    assert by_hand.pattern == gpt.SPARSE.pattern(1) and by_hand.layer == 1


def test_core_attention_may_be_recomputed(gpt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selective recomputation keeps no attention weights; here there are none to keep, and the result is the same."""
    monkeypatch.setattr(random_states, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    monkeypatch.setattr(random_states, "_set_cuda_rng_state", lambda *_, **__: None)
    case = gpt.Case(gpt.SPARSE, settings={"recompute_granularity": "selective", "recompute_modules": ["core_attn"]})
    assert_same(gpt.step(case, gpt.build(case)), gpt.step(gpt.Case(gpt.SPARSE), gpt.build(gpt.Case(gpt.SPARSE))))


def test_generation_with_a_static_cache_is_the_whole_pass(gpt: ModuleType) -> None:
    case = gpt.Case(gpt.SPARSE)
    model, (tokens, _, places) = gpt.build(case).eval(), gpt.batch_of(case)
    with torch.no_grad():
        whole = model(tokens, places, None)
        context = StaticInferenceContext(2, gpt.TOKENS)
        steps = []
        for start, end in [(0, 100), *((at, at + 1) for at in range(100, 104))]:
            steps.append(model(tokens[:, start:end], places[:, start:end], None, inference_context=context, runtime_gather_output=True))
            context.increment_sequence_len_offset(end - start)
    expected = torch.cat((whole[:, 99:100], whole[:, 100:104]), 1)
    torch.testing.assert_close(torch.cat([logits[:, -1:] for logits in steps], 1), expected, rtol=1e-4, atol=1e-4)


def fake_group(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


@pytest.mark.parametrize(("ranks", "groups", "passed"), [(1, 2, 2), (2, 2, 2), (4, 2, 4), (8, 2, 8), (4, 8, 8)])
def test_ranks_hold_their_range_of_global_heads(gpt: ModuleType, ranks: int, groups: int, passed: int) -> None:
    """Megatron tells a core attention of at least one group for each rank; the recipe still counts the model's own."""
    config = gpt.config_of(gpt.Case(groups=passed))
    recipe = Recipe(PerHead({groups - 1: Window(5)}, default=Dense()))
    for rank in range(ranks):
        pg = SimpleNamespace(tp=fake_group(rank, ranks), cp=fake_group(0, 1))
        core = S2CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=pg, recipe=recipe, num_kv_heads=groups)
        assert (core.heads.start, core.heads.end) == (rank * 8 // ranks, (rank + 1) * 8 // ranks)
        assert (core.heads.num_heads, core.heads.num_kv_heads) == (8, groups)


def test_learned_sinks_are_saved_as_megatron_saves_them(gpt: ModuleType) -> None:
    settings = {"softmax_type": "learnable"}
    ours, own = (gpt.build(gpt.Case(recipe, settings=settings)).sharded_state_dict() for recipe in (Dense(), None))
    assert {key for key in ours if "softmax_offset" in key} == {key for key in own if "softmax_offset" in key} != set()
    assert set(ours) == set(own)
