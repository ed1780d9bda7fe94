"""What Megatron offers and a recipe does not stand for is refused with its reason, never silently different."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from s2attn import Dense, PerHead, Recipe, Unsupported, Window
from s2attn.integrations.megatron import S2CoreAttention, S2SelfAttention, check_version, with_s2
from s2attn.integrations.megatron.zigzag import zigzag_attention

pytestmark = pytest.mark.usefixtures("world")


def core_of(gpt: ModuleType, mask_type: AttnMaskType = AttnMaskType.causal, **changes: Any) -> S2CoreAttention:
    """A core attention whose configuration is changed after it was checked by Megatron, or that is built with other arguments."""
    arguments = {"attention_type": "self", "attention_dropout": None, "cp_comm_type": None, "recipe": gpt.SPARSE}
    config = gpt.config_of(gpt.Case())
    for name in set(changes) - set(arguments) - {"k_channels", "v_channels", "num_kv_heads", "pg_collection", "layer_number"}:
        setattr(config, name, changes.pop(name))
    return S2CoreAttention(config, changes.pop("layer_number", 1), mask_type, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout: must be 0, since attention weights are never written down; got 0.1"),
        ({"attention_type": "cross"}, "attention_type: must be 'self'"),
        ({"window_size": (127, 0)}, r"window_size: write the window into the recipe, as Window\(n\); got \(127, 0\)"),
        ({"softmax_type": "sparsemax"}, "softmax_type: no other softmax is known; got sparsemax"),
        ({"attention_backend": AttnBackend.flash}, "attention_backend: the kernel is chosen by s2attn"),
        ({"qk_clip": True}, "qk_clip: the largest logits are not returned"),
        ({"log_max_attention_logit": True}, "log_max_attention_logit: the largest logits"),
        ({"multi_latent_attention": True}, "multi_latent_attention: latent attention has another core"),
        ({"k_channels": 24, "v_channels": 16}, r"k_channels and v_channels: must be left out.*\(24, 16\)"),
        ({"fp8_dot_product_attention": True}, "fp8_dot_product_attention: attention runs in the dtype of its tensors"),
        ({"fp8_multi_head_attention": True}, "fp8_multi_head_attention: attention runs in the dtype"),
        ({"use_kitchen_attention": True}, "use_kitchen_attention"),
        ({"flash_decode": True}, "flash_decode: it passes the core attention by"),
        ({"batch_invariant_mode": True}, "batch_invariant_mode"),
        ({"hybrid_context_parallel": True}, "hybrid_context_parallel"),
        ({"mtp_num_layers": 1}, "mtp_num_layers: its layers count from 1 again"),
        ({"context_parallel_size": 2, "cp_comm_type": "a2a"}, "cp_comm_type: must be left out, 'p2p' or 'all_gather'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_that_asks_for_more_is_refused(gpt: ModuleType, changes: dict, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        core_of(gpt, **changes)


def test_every_reason_is_given_at_once(gpt: ModuleType) -> None:
    with pytest.raises(Unsupported) as refused:
        core_of(gpt, qk_clip=True, window_size=(5, 0), attention_dropout=0.5)
    assert set(refused.value.reasons) == {"qk_clip", "window_size", "attention_dropout"}


def test_megatrons_default_dropout_is_refused_before_a_model_is_built(gpt: ModuleType) -> None:
    with pytest.raises(Unsupported, match="attention_dropout: must be 0"):
        with_s2(get_gpt_layer_local_spec(), gpt.config_of(gpt.Case(settings={"attention_dropout": 0.1})), gpt.SPARSE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recipe": None}, TypeError, "recipe must be given, or stand in config.s2_attention; got NoneType"),
        ({"recipe": 3}, TypeError, "s2_attention must be a recipe"),
        ({"recipe": Recipe(Window(4), layers={3: Dense()})}, ValueError, "s2_attention must name layers below 3"),
        ({"recipe": PerHead({4: Window(4)}, default=Dense())}, ValueError, "layer 0 does not fit 8 heads over 4 KV heads"),
        (
            {"recipe": Window(4), "s2_attention": Window(5)},
            ValueError,
            "recipe must be the one in config.s2_attention where both are there",
        ),
        ({"num_kv_heads": 3}, ValueError, r"num_kv_heads must be num_query_groups of the model \(4\); got 3"),
        ({"layer_number": 0}, ValueError, "layer_number must be an integer >= 1; got 0"),
        ({"context_parallel_size": 2}, ValueError, r"pg_collection.cp must have context_parallel_size \(2\) ranks; got 1"),
    ],
)
def test_what_does_not_fit_the_model_is_named(gpt: ModuleType, changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        core_of(gpt, **changes)


def test_key_value_heads_that_cannot_be_told_must_be_given(gpt: ModuleType) -> None:
    """With as many groups as tensor-parallel ranks the model may have had fewer: Megatron raises the number that it passes on."""
    pg = SimpleNamespace(tp=SimpleNamespace(rank=lambda: 1, size=lambda: 4), cp=None)
    with pytest.raises(ValueError, match=r"num_kv_heads must be given where num_query_groups is the tensor-parallel size \(4\)"):
        core_of(gpt, pg_collection=pg)
    assert core_of(gpt, pg_collection=pg, num_kv_heads=2).heads.num_kv_heads == 2


PACKED = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 8]), cu_seqlens_kv=torch.tensor([0, 8]))


@pytest.mark.parametrize(
    ("layer_type", "call", "keys", "reason"),
    [
        ("causal", {"attention_mask": torch.zeros(1, 1, 8, 8) > 0}, 8, r"attention_mask: must be None.*got one of shape \(1, 1, 8, 8\)"),
        ("causal", {"attention_bias": torch.zeros(8)}, 8, "attention_bias: must be None"),
        ("arbitrary", {}, 8, "AttnMaskType.arbitrary needs a mask"),
        ("padding", {}, 8, "AttnMaskType.padding is for padded batches: pack the sequences"),
        ("padding_causal", {}, 8, "AttnMaskType.padding_causal is for padded batches"),
        ("causal", {}, 12, "AttnMaskType.causal of 8 queries and 12 keys does not say where the queries stand"),
        ("causal", {"attn_mask_type": AttnMaskType.no_mask}, 12, "AttnMaskType.no_mask of 8 queries and 12 keys"),
        ("causal", {"attn_mask_type": AttnMaskType.no_mask}, 8, "AttnMaskType.no_mask in a layer that was made as AttnMaskType.causal"),
        ("causal", {"packed_seq_params": PackedSeqParams(qkv_format="sbhd")}, 8, "qkv_format: must be 'thd'; got 'sbhd'"),
        (
            "causal",
            {"packed_seq_params": PackedSeqParams(qkv_format="thd", local_cp_size=1)},
            8,
            "packed_seq_params.cp_group: must be None",
        ),
        (
            "causal",
            {"packed_seq_params": PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 8]), cu_seqlens_kv=torch.tensor([0, 4]))},
            8,
            "cu_seqlens must be the same for queries and keys",
        ),
        (
            "padding",
            {"packed_seq_params": PackedSeqParams("thd", *[torch.tensor([0, 7])] * 2, *[torch.tensor([0, 8])] * 2)},
            8,
            "padding between sequences would be seen",
        ),
    ],
)
def test_a_call_that_asks_for_more_is_refused(gpt: ModuleType, layer_type: str, call: dict, keys: int, reason: str) -> None:
    core = core_of(gpt, AttnMaskType[layer_type])
    query, key = torch.zeros(8, 1, 8, 8), torch.zeros(keys, 1, 4, 8)
    with pytest.raises(Unsupported, match=reason):
        core(query, key, key, **{"attention_mask": None, **call})


@pytest.mark.parametrize("layer_type", ["no_mask", "padding"])
def test_layers_without_causality_see_both_sides(gpt: ModuleType, layer_type: str) -> None:
    """Unpacked as no_mask, packed as padding: a dense recipe is the plain mean of values under equal logits."""
    core = core_of(gpt, AttnMaskType[layer_type], recipe=Dense())
    value = torch.randn(8, 4, 8)
    if layer_type == "padding":
        out = core(torch.zeros(8, 8, 8), torch.zeros(8, 4, 8), value, None, packed_seq_params=PACKED)
    else:
        out = core(torch.zeros(8, 1, 8, 8), torch.zeros(8, 1, 4, 8), value[:, None], None)
    expected = value.mean(0).repeat_interleave(2, 0).flatten().expand(8, -1)
    torch.testing.assert_close(out.reshape(8, -1), expected)


@pytest.mark.parametrize(
    ("rows", "lengths", "message"),
    [
        (7, None, "query must have an even number of tokens on each of 2 context-parallel ranks, two chunks; got 7"),
        (8, [0, 8, 14, 16], "cu_seqlens must have lengths that are multiples of 4, two chunks for each of 2 context-parallel ranks"),
        (8, [0, 8, 12], "cu_seqlens must rise from 0 to the 16 tokens of all 2 context-parallel ranks"),
        (8, [0, 20, 16], "cu_seqlens must rise from 0 to the 16 tokens"),
    ],
)
def test_lengths_that_cannot_be_shared_are_refused_before_anything_is_sent(rows: int, lengths: list[int] | None, message: str) -> None:
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    q = torch.zeros(rows, 8, 8)
    with pytest.raises(ValueError, match=message):
        zigzag_attention(q, q, q, lambda *_: q, group, None if lengths is None else torch.tensor(lengths))


def test_lengths_that_were_refilled_unseen_are_read_again() -> None:
    """Through NumPy, torch's version counter does not move."""
    group, q = SimpleNamespace(rank=lambda: 0, size=lambda: 2), torch.zeros(8, 8, 8)
    lengths = torch.tensor([0, 8, 16])
    asked: list[list[int]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        asked.append(own[0].tolist())
        return q

    gathered = "s2attn.integrations.megatron.zigzag.gather_from_sequence_parallel_region"
    with mock.patch(gathered, lambda x, group: torch.cat([x, x])):
        zigzag_attention(q, q, q, attend, group, lengths)
        lengths.numpy()[1] = 4
        zigzag_attention(q, q, q, attend, group, lengths)
    assert asked == [[0, 2, 4], [0, 2, 4], [0, 1, 4], [0, 1, 4]]


def test_bidirectional_layers_are_not_spread_over_ranks(gpt: ModuleType) -> None:
    pair = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    pg = SimpleNamespace(tp=SimpleNamespace(rank=lambda: 0, size=lambda: 1), cp=pair)
    core = core_of(gpt, AttnMaskType.no_mask, context_parallel_size=2, pg_collection=pg)
    with pytest.raises(Unsupported, match="only causal attention over whole sequences is spread over ranks"):
        core(torch.zeros(8, 1, 8, 8), torch.zeros(8, 1, 4, 8), torch.zeros(8, 1, 4, 8), None)


def test_a_backend_by_name_is_the_one_that_runs(gpt: ModuleType) -> None:
    config = gpt.config_of(gpt.Case())
    spec = with_s2(get_gpt_layer_local_spec(), config, gpt.SPARSE, backend="nobody")
    model = gpt.GPTModel(config, spec, gpt.VOCABULARY, 256, position_embedding_type="rope")
    with pytest.raises(ValueError, match="nobody"):
        gpt.step(gpt.Case(gpt.SPARSE), model)


def test_ways_around_the_core_attention_are_closed(gpt: ModuleType) -> None:
    model = gpt.build(gpt.Case(gpt.SPARSE))
    attention = model.decoder.layers[0].self_attention
    assert type(attention) is S2SelfAttention
    for way in ("flash_decode", "flash_decode_and_prefill"):
        assert hasattr(SelfAttention, way), "what is closed must be Megatron's"
        with pytest.raises(Unsupported, match="generation would be dense"):
            getattr(attention, way)(None)


def test_a_chunk_after_a_static_cache_is_refused(gpt: ModuleType) -> None:
    """Megatron turns the mask off behind the prompt, which is right for one new token and wrong for several."""
    case = gpt.Case(gpt.SPARSE)
    model, (tokens, _, places) = gpt.build(case).eval(), gpt.batch_of(case)
    context = StaticInferenceContext(2, gpt.TOKENS)
    how = {"inference_context": context, "runtime_gather_output": True}
    with torch.no_grad():
        model(tokens[:, :50], places[:, :50], None, **how)
        context.increment_sequence_len_offset(50)
        with pytest.raises(Unsupported, match="no_mask of 10 queries and 60 keys"):
            model(tokens[:, 50:60], places[:, 50:60], None, **how)


def test_a_spec_is_copied_and_the_rest_of_it_kept(gpt: ModuleType) -> None:
    config, plain = gpt.config_of(gpt.Case()), get_gpt_layer_local_spec()
    untouched = get_gpt_layer_local_spec()
    sparse = with_s2(plain, config, gpt.SPARSE)
    assert plain == untouched
    assert sparse.submodules.self_attention.submodules.core_attention.module is S2CoreAttention
    assert sparse.submodules.mlp == plain.submodules.mlp
    assert sparse.submodules.self_attention.submodules.linear_qkv is plain.submodules.self_attention.submodules.linear_qkv
    block = with_s2(TransformerBlockSubmodules(layer_specs=[plain, plain]), config, gpt.SPARSE)
    assert block.layer_specs == [sparse, sparse]
    assert with_s2(sparse, config, gpt.SPARSE) == sparse


def test_layers_that_are_not_known_are_refused(gpt: ModuleType) -> None:
    config = gpt.config_of(gpt.Case())
    with pytest.raises(TypeError, match="spec must be the ModuleSpec of a transformer layer"):
        with_s2(None, config, gpt.SPARSE)
    for inner in (None, ModuleSpec(module=CrossAttention)):
        layer = get_gpt_layer_local_spec()
        layer.submodules.self_attention = inner
        with pytest.raises(
            Unsupported, match=r"self_attention must be a ModuleSpec of Megatron's SelfAttention; got (CrossAttention|None)"
        ):
            with_s2(layer, config, gpt.SPARSE)
    with pytest.raises(Unsupported, match="got MLASelfAttention"):
        with_s2(get_gpt_layer_local_spec(multi_latent_attention=True), config, gpt.SPARSE)


def test_multi_token_prediction_refuses_the_layers_that_it_copies(gpt: ModuleType) -> None:
    config = gpt.config_of(gpt.Case(settings={"mtp_num_layers": 1}))
    with pytest.raises(Unsupported, match="mtp_num_layers"):
        get_gpt_mtp_block_spec(config, with_s2(get_gpt_layer_local_spec(), config, gpt.SPARSE), False)


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0rc0", "1.0", "0", "of today"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(Unsupported, match=rf"megatron-core: must be of version 0.16; got {version}"):
        check_version(version)


def test_this_version_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version()
    monkeypatch.setattr("megatron.core.__version__", "0.99.0")
    with pytest.raises(Unsupported, match=r"got 0\.99\.0"):
        check_version()
