"""The backend's parts against dense attention: paged queries of all kinds in one call, ranks, what a step says, and what is refused."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

from s2attn import Dense, Local, PerHead, Recipe, Sink, Stride, Unsupported, Window, attention
from s2attn.integrations.spec import FIELD, to_spec
from s2attn.integrations.vllm import NAME, backend, plugin, register
from s2attn.integrations.vllm.backend import S2AttentionImpl, S2Backend, S2Metadata, S2MetadataBuilder
from s2attn.integrations.vllm.cache import S2CacheSpec
from s2attn.integrations.vllm.places import BACKEND_FIELD

HEADS, KV_HEADS, WIDTH, SIZE, LONGEST = 8, 2, 16, 16, 256
RECIPE = Recipe(
    PerHead({0: Sink(20) | Window(40)}, default=Window(30)), dense_layers=[0], layers={2: Local(2, block=16) | Stride(2, block=16)}
)


class Model(SimpleNamespace):
    def get_total_num_kv_heads(self) -> int:
        return KV_HEADS

    def get_total_num_hidden_layers(self) -> int:
        return 4


def config_of(recipe: Any = RECIPE, **changes: Any) -> Any:
    text = SimpleNamespace(**({} if recipe is None else {FIELD: to_spec(recipe)}))
    settings = {
        "model_config": Model(hf_text_config=text, hf_config=text, dtype=torch.float32, max_model_len=LONGEST),
        "compilation_config": SimpleNamespace(static_forward_context={}),
        "scheduler_config": SimpleNamespace(max_num_seqs=6, disable_hybrid_kv_cache_manager=False),
        "additional_config": {},
        "device_config": SimpleNamespace(device_type="cpu"),
        "kv_transfer_config": None,
        "speculative_config": None,
        "max_in_flight_tokens": 32,
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1),
    }
    return SimpleNamespace(**{**settings, **changes})


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A world of one rank, until the test says otherwise."""
    world = {"rank": 0, "size": 1}
    monkeypatch.setattr(backend, "get_tensor_model_parallel_rank", lambda: world["rank"])
    monkeypatch.setattr(backend, "get_tensor_model_parallel_world_size", lambda: world["size"])
    return world


def make(layer: int, config: Any = None, heads: int = HEADS, kv_heads: int = KV_HEADS, **arguments: Any) -> Any:
    """A layer as vLLM makes it, its weights loaded."""
    config = config or config_of()
    with set_current_vllm_config(config):
        impl = S2AttentionImpl(heads, WIDTH, WIDTH**-0.5, kv_heads, **arguments)
    name = f"model.layers.{layer}.self_attn.attn"
    made = SimpleNamespace(impl=impl, layer_name=name, attn_backend=S2Backend)
    config.compilation_config.static_forward_context[name] = made
    impl.process_weights_after_loading(torch.float32)
    return made


class Batch:
    """Requests in one call: their keys in blocks in random order, of a cache that holds nothing else but NaN."""

    def __init__(self, lengths: list[tuple[int, int]], *, heads_first: bool = True) -> None:
        self.lengths = lengths  # tokens of each request, and how many of them are new
        self.q = [torch.randn(new, HEADS, WIDTH) for _, new in lengths]
        self.k, self.v = ([torch.randn(total, KV_HEADS, WIDTH) for total, _ in lengths] for _ in range(2))
        width = LONGEST // SIZE
        count = 1 + len(lengths) * width
        order = (count, KV_HEADS, SIZE) if heads_first else (count, SIZE, KV_HEADS)
        cache = torch.full((*order, 2 * WIDTH), torch.nan)
        self.cache = cache if heads_first else cache.transpose(1, 2)
        self.table = torch.zeros(len(lengths), width, dtype=torch.int32)
        free = iter((1 + torch.randperm(count - 1)).tolist())
        for i, (total, _) in enumerate(lengths):
            for block in range(-(-total // SIZE)):
                self.table[i, block] = next(free)

    def slots(self, i: int, tokens: Tensor) -> Tensor:
        return self.table[i, tokens // SIZE].long() * SIZE + tokens % SIZE

    def store(self, impl: S2AttentionImpl, kv: slice) -> None:
        for i, (k, v) in enumerate(zip(self.k, self.v, strict=True)):
            impl.do_kv_cache_update(None, k[:, kv], v[:, kv], self.cache[:, kv], self.slots(i, torch.arange(len(k))))

    def common(self, padding: int = 0) -> CommonAttentionMetadata:
        new = torch.tensor([new for _, new in self.lengths] + [0] * padding)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).int()
        seq_lens = torch.tensor([total for total, _ in self.lengths] + [0] * padding).int()
        table = torch.cat([self.table, self.table.new_zeros(padding, self.table.shape[1])])
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            num_reqs=len(seq_lens),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(new.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=table,
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        )

    def expected(self, pattern: Any, layer: int, **scoring: Any) -> Tensor:
        outs = [
            attention(q[None], k[None], v[None], pattern, layer=layer, **scoring)[0] for q, k, v in zip(self.q, self.k, self.v, strict=True)
        ]
        return torch.cat(outs)


MIXED = [(100, 1), (37, 37), (160, 24), (1, 1), (64, 3)]


def spec_of(layer: Any) -> Any:
    full = FullAttentionSpec(block_size=SIZE, num_kv_heads=layer.impl.num_kv_heads, head_size=WIDTH, dtype=torch.float32)
    return layer.attn_backend.customize_spec(full)


def builder_of(layer: Any) -> S2MetadataBuilder:
    return layer.attn_backend.get_builder_cls()(spec_of(layer), [layer.layer_name], layer.impl.config, torch.device("cpu"))


def run(layer: Any, batch: Batch, metadata: S2Metadata, heads: slice = slice(None), kv: slice = slice(None)) -> Tensor:
    batch.store(layer.impl, kv)
    q = torch.cat(batch.q)[:, heads]
    output = torch.full_like(q, torch.nan)
    assert layer.impl.forward(layer, q, None, None, batch.cache[:, kv], metadata, output) is output
    return output


@pytest.mark.parametrize("heads_first", [True, False], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("layer", range(4))
def test_prefills_chunks_and_decoding_in_one_call(layer: int, heads_first: bool, ranks: dict[str, int]) -> None:
    made, batch = make(layer), Batch(MIXED, heads_first=heads_first)
    found = run(made, batch, builder_of(made).build(0, batch.common()))
    torch.testing.assert_close(found, batch.expected(RECIPE.pattern(layer), layer))


@pytest.mark.parametrize("layer", [1, 2])
def test_ranks_together_are_the_whole(layer: int, ranks: dict[str, int]) -> None:
    batch = Batch(MIXED)
    expected = batch.expected(RECIPE.pattern(layer), layer)
    for size in (2, 4):
        for rank in range(size):
            ranks.update(rank=rank, size=size)
            heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
            kv = slice(rank * KV_HEADS // size, max(1, KV_HEADS // size) + rank * KV_HEADS // size)
            made = make(layer, heads=HEADS // size, kv_heads=max(1, KV_HEADS // size))
            assert spec_of(made) == spec_of(make(layer, heads=HEADS // size, kv_heads=max(1, KV_HEADS // size)))
            found = run(made, batch, builder_of(made).build(0, batch.common()), heads, kv)
            torch.testing.assert_close(found, expected[:, heads])


def test_caps_and_sinks_are_honoured(ranks: dict[str, int]) -> None:
    sinks = torch.randn(HEADS)
    made, batch = make(1, logits_soft_cap=3.0, sinks=sinks), Batch(MIXED)
    found = run(made, batch, builder_of(made).build(0, batch.common()))
    torch.testing.assert_close(found, batch.expected(RECIPE.pattern(1), 1, softcap=3.0, sinks=sinks))


def test_without_a_cache_the_output_is_zero(ranks: dict[str, int]) -> None:
    made = make(1)
    q = torch.randn(5, HEADS, WIDTH)
    assert not made.impl.forward(made, q, None, None, torch.tensor([]), None, torch.full_like(q, torch.nan)).any()


def test_a_step_lies_where_the_last_one_lay(ranks: dict[str, int]) -> None:
    """A captured graph reads the addresses of its own step: the numbers of later steps must come to lie there."""
    made = make(1)
    builder = builder_of(made)
    first = builder.build(0, Batch([(200, 1), (90, 1)]).common(padding=4))
    address, stride = first.block_table.data_ptr(), first.block_table.stride()
    batch = Batch([(180, 1), (250, 1), (17, 1)])
    second = builder.build(0, batch.common())
    assert second.block_table.data_ptr() == address and second.block_table.stride() == stride
    found = run(made, batch, second)
    torch.testing.assert_close(found, batch.expected(RECIPE.pattern(1), 1))


KERNELS = {BACKEND_FIELD: "triton"}


@pytest.mark.parametrize(("asked", "support"), [({}, "NEVER"), ({BACKEND_FIELD: "torch"}, "NEVER"), (KERNELS, "UNIFORM_BATCH")])
def test_graphs_are_claimed_for_kernels_alone(asked: dict[str, str], support: str, ranks: dict[str, int]) -> None:
    """The torch backend reads lengths on the host at every step, which no graph repeats."""
    config = config_of(additional_config=asked)
    made = make(1, config)
    group = UniformTypeKVCacheSpecs(block_size=SIZE, kv_cache_specs={made.layer_name: spec_of(made)})
    for spec in (spec_of(made), group):
        assert S2MetadataBuilder.get_cudagraph_support(config, spec) == AttentionCGSupport[support]


@pytest.mark.parametrize("layer", [1, 2])
def test_kernels_read_the_same_step(layer: int, ranks: dict[str, int]) -> None:
    """In Triton's interpreter; nothing is looked at, as in a graph, and the step is padded as one."""
    made, batch = make(layer, config_of(additional_config=KERNELS)), Batch(MIXED)
    metadata = builder_of(made).build(0, batch.common(padding=2))
    found = run(made, batch, metadata)
    torch.testing.assert_close(found, batch.expected(RECIPE.pattern(layer), layer))


def test_unknown_backends_are_refused(ranks: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="s2_attention_backend must be one of auto, cpu, torch, triton, reference; got 'cuda'"):
        make(1, config_of(additional_config={BACKEND_FIELD: "cuda"}))


def test_rows_of_padding_give_nothing(ranks: dict[str, int]) -> None:
    made, batch = make(1), Batch(MIXED)
    found = run(made, batch, builder_of(made).build(0, batch.common(padding=1)))
    torch.testing.assert_close(found, batch.expected(RECIPE.pattern(1), 1))


def test_blocks_that_were_given_back_are_not_touched(ranks: dict[str, int]) -> None:
    """The runner's own table still names them, and another request may own them."""
    made, batch = make(1), Batch([(200, 2), (60, 30)])
    spec = spec_of(made)
    assert isinstance(spec, S2CacheSpec)
    metadata = builder_of(made).build(0, batch.common())
    gone = [set(spec.lifetimes.gone(before).tolist()) for before in (198, 30)]
    for row, lost in zip(metadata.block_table.tolist(), gone, strict=True):
        assert lost <= {i for i, block in enumerate(row) if block == -1}
    assert len(gone[0]) > 5
    batch.store(made.impl, slice(None))
    for row, lost in zip(batch.table, gone, strict=True):
        batch.cache[row[sorted(lost)].long()] = torch.nan
    output = torch.empty(32, HEADS, WIDTH)
    made.impl.forward(made, torch.cat(batch.q), None, None, batch.cache, metadata, output)
    torch.testing.assert_close(output, batch.expected(RECIPE.pattern(1), 1))


def test_layers_get_the_cache_of_their_pattern(ranks: dict[str, int]) -> None:
    kinds = [type(spec_of(make(layer))) for layer in range(4)]
    assert kinds == [FullAttentionSpec, S2CacheSpec, FullAttentionSpec, S2CacheSpec]
    assert spec_of(make(1)) == spec_of(make(3))
    assert make(1).attn_backend.full_cls_name() == (backend.__name__, "S2Backend")
    for changes in (
        {"speculative_config": object()},
        {"scheduler_config": SimpleNamespace(max_num_seqs=6, disable_hybrid_kv_cache_manager=True)},
    ):
        assert type(spec_of(make(1, config_of(**changes)))) is FullAttentionSpec


REFUSED = {
    "ALiBi": ({"alibi_slopes": [1.0] * HEADS}, "ALiBi slopes"),
    "window": ({"sliding_window": 64}, r"a sliding window of the model's own \(64\): .* put Window\(64\) into the recipe"),
    "encoder": ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
    "shared keys": ({"kv_sharing_target_layer_name": "model.layers.0"}, "keys and values of another layer"),
    "float8": ({"kv_cache_dtype": "fp8"}, "a KV cache of type fp8"),
    "other type": ({"kv_cache_dtype": "bfloat16"}, "a KV cache of type bfloat16, which is not the model's"),
    "latent attention": (
        {"q_lora_rank": None, "kv_lora_rank": 8},
        r"arguments that only other backends know \(q_lora_rank, kv_lora_rank\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused(name: str, ranks: dict[str, int]) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(Unsupported, match=f"s2attn cannot serve this model as asked\n  S2ATTN: .*{message}"):
        make(1, **arguments)


def test_all_reasons_are_given_at_once(ranks: dict[str, int]) -> None:
    with pytest.raises(Unsupported, match=r"ALiBi slopes; .*; a KV connector"):
        make(1, config_of(kv_transfer_config=object()), alibi_slopes=[1.0], sliding_window=3)


def test_steps_that_are_not_causal_are_refused(ranks: dict[str, int]) -> None:
    common = Batch(MIXED).common()
    for causal in (False, torch.ones(5, dtype=torch.bool)):
        with pytest.raises(Unsupported, match="attention is not causal"):
            builder_of(make(1)).build(0, common.replace(causal=causal))


def test_an_output_that_is_to_be_quantised_is_refused(ranks: dict[str, int]) -> None:
    made, q = make(1), torch.randn(1, HEADS, WIDTH)
    with pytest.raises(Unsupported, match="the output is quantised"):
        made.impl.forward(made, q, None, None, torch.tensor([]), None, q, output_scale=torch.ones(1))


def test_recipes_are_checked(ranks: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="s2_attention must hold a recipe"):
        make(1, config_of(None))
    with pytest.raises(ValueError, match="s2_attention must name layers below 4"):
        make(1, config_of(Recipe(Dense(), dense_layers=[4])))


def test_vllm_knows_the_backend_by_its_name() -> None:
    register()
    register()
    assert AttentionBackendEnum[NAME].get_class() is S2Backend
    assert S2Backend.get_name() == NAME


def test_the_choice_reaches_a_process_that_has_not_loaded_plug_ins() -> None:
    """A spawned engine or worker unpickles its configuration first of all."""
    register()
    chosen = pickle.dumps(AttentionBackendEnum[NAME])
    assert pickle.loads(chosen) is AttentionBackendEnum[NAME] is copy.deepcopy(AttentionBackendEnum[NAME])
    code = f"import pickle; print(pickle.loads({chosen!r}).get_path())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1:] == ["s2attn.integrations.vllm.backend.S2Backend"], done.stderr[-2000:]


def test_another_version_is_refused_and_vllm_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    with pytest.raises(Unsupported, match=r"must be 0\.32 to 0\.33, the versions that were tested; got 0\.40\.1"):
        register()
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin()
    assert "S2ATTN is not available" in caplog.text


def test_what_vllm_may_select_it_for() -> None:
    usual = {"use_mla": False, "has_sink": True, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False}
    where = {"device_capability": None, "attn_type": "decoder", **usual}
    assert S2Backend.validate_configuration(96, torch.bfloat16, "auto", 16, **where) == []
    cases = {
        "head dtype": ((64, torch.float64, "auto", 16), {}, "dtype not supported"),
        "cache": ((64, torch.bfloat16, "fp8", 16), {}, "kv_cache_dtype not supported"),
        "block": ((64, torch.bfloat16, "auto", 24), {}, "block_size not supported"),
        "latent": ((64, torch.bfloat16, "auto", 16), {"use_mla": True}, "MLA not supported"),
        "window": ((64, torch.bfloat16, "auto", 16), {"has_sliding_window": True}, "sliding window not supported"),
        "encoder": ((64, torch.bfloat16, "auto", 16), {"attn_type": "encoder"}, "attention type encoder not supported"),
        "connector": ((64, torch.bfloat16, "auto", 16), {"use_kv_connector": True}, "KV connector not supported"),
        "both ways": ((64, torch.bfloat16, "auto", 16), {"use_non_causal": True}, "non-causal attention not supported"),
    }
    for positional, changes, reason in cases.values():
        assert S2Backend.validate_configuration(*positional, **{**where, **changes}) == [reason]
