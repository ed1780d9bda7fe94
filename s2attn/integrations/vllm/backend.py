"""vLLM's attention backend: queries of prefills, chunks and decoding side by side, read through one block table by `s2attn.decode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vllm
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from s2attn.backends import Pages, pick_paged
from s2attn.core import Unsupported
from s2attn.integrations.spec import read_spec
from s2attn.integrations.vllm import NAME, check_version
from s2attn.integrations.vllm.cache import S2CacheSpec, spec_of
from s2attn.integrations.vllm.freeing import Model
from s2attn.integrations.vllm.places import find_backend, find_recipe, held_heads
from s2attn.ops.decode import decode
from s2attn.ops.store import store_kv
from s2attn.ops.warmup_decode import warmup_decode

check_version(vllm.__version__)


class S2Backend(AttentionBackend):
    """Attention by the model's recipe; the layers' own kind of cache is chosen when their weights are loaded."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[S2AttentionImpl]:
        return S2AttentionImpl

    @staticmethod
    def get_builder_cls() -> type[S2MetadataBuilder]:
        return S2MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class S2CpuBackend(S2Backend):
    """The same under the name of the only backend that vLLM has for CPUs."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


@dataclass
class S2Metadata(AttentionMetadata):
    """What a step says to all layers of a group.

    Attributes:
        tokens: queries of the step.
        cu_seqlens_q: ``(requests + 1,)``.
        seq_lens: ``(requests,)``, the new tokens included.
        block_table: ``(requests, blocks)``; -1 where a block was given back.
    """

    tokens: int
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor


class S2MetadataBuilder(AttentionMetadataBuilder):
    """Metadata in the runner's own buffers and one of ours, so that a CUDA graph of a step finds the next one's numbers."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rows = vllm_config.scheduler_config.max_num_seqs
        self.table: Tensor | None = None
        self.last: Tensor | None = None
        layers = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            layers[name].impl.warmup(kv_cache_spec.block_size, vllm_config.model_config.max_model_len, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Whole graphs of uniform batches, where no host looks at a number: with kernels. Graphs of mixed batches are not claimed."""
        spec = getattr(kv_cache_spec, "first_spec", kv_cache_spec)
        shape = (1, spec.block_size, spec.num_kv_heads, spec.head_size)
        k = torch.empty(shape, dtype=spec.dtype, device=vllm_config.device_config.device_type)
        pages = Pages(k, k, torch.zeros(1, 1, 1, dtype=torch.int32, device=k.device))
        chosen = pick_paged(find_backend(vllm_config.additional_config), k[:, :1], pages)
        return AttentionCGSupport.UNIFORM_BATCH if chosen.capturable else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> S2Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise Unsupported("s2attn cannot serve this step", {NAME: ["attention is not causal"]})
        table = common.block_table_tensor
        if isinstance(self.kv_cache_spec, S2CacheSpec):
            table = self._readable(self.kv_cache_spec, common)
        return S2Metadata(common.num_actual_tokens, common.query_start_loc, common.seq_lens, table)

    def _readable(self, spec: S2CacheSpec, common: CommonAttentionMetadata) -> Tensor:
        """The block table without the blocks that were given back: others may own them by now."""
        table = common.block_table_tensor
        requests, width = table.shape
        if self.table is None or self.table.shape[1] != width or len(self.table) < requests:
            self.table = table.new_empty(max(self.rows, requests), width)
            last = torch.full((width,), -1)
            known = torch.from_numpy(spec.lifetimes.last.copy())[:width]
            last[: len(known)] = known
            self.last = last.to(table.device)
        first = common.seq_lens - (common.query_start_loc[1:] - common.query_start_loc[:-1])
        mine = self.table[:requests]
        return mine.copy_(table).masked_fill_(self.last < first[:, None], -1)


class S2AttentionImpl(AttentionImpl):
    """One layer's attention by its pattern."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        self.config = config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.attn_type, self.sinks = kv_cache_dtype, attn_type, sinks
        self.softcap = logits_soft_cap or None
        asked = {
            "ALiBi slopes": alibi_slopes is not None,
            f"a sliding window of the model's own ({sliding_window}): unset it with hf_overrides and put Window({sliding_window}) into the "
            "recipe": sliding_window is not None,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "keys and values of another layer": kv_sharing_target_layer_name is not None,
            f"a KV cache of type {kv_cache_dtype}, which is not the model's": self._foreign(kv_cache_dtype),
            f"arguments that only other backends know ({', '.join(others)})": bool(others),
            "context parallelism": self.dcp_world_size > 1 or self.pcp_world_size > 1,
            "a KV connector": config.kv_transfer_config is not None,
        }
        if any(asked.values()):
            raise Unsupported("s2attn cannot serve this model as asked", {NAME: [reason for reason, came in asked.items() if came]})
        self.heads = held_heads(
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
            num_heads,
            self.num_kv_heads,
            config.model_config.get_total_num_kv_heads(),
        )
        model = config.model_config
        self.recipe = read_spec(
            find_recipe([model.hf_text_config, model.hf_config], config.additional_config),
            num_layers=model.get_total_num_hidden_layers(),
            num_heads=self.heads.num_heads,
            num_kv_heads=self.heads.num_kv_heads,
        )
        self.backend = find_backend(config.additional_config)
        self.layer = -1

    def _foreign(self, kv_cache_dtype: str) -> bool:
        model = self.config.model_config
        return kv_cache_dtype_str_to_dtype(kv_cache_dtype, model) != model.dtype

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find out which layer this is, and give it the kind of cache that its pattern allows."""
        layers = self.config.compilation_config.static_forward_context
        layer = next((layer for layer in layers.values() if getattr(layer, "impl", None) is self), None)
        if layer is None:
            raise Unsupported("s2attn cannot serve this model as asked", {NAME: ["attention outside of the layers that vLLM lists"]})
        self.layer = extract_layer_index(layer.layer_name)
        self.pattern = self.recipe.pattern(self.layer)
        if self.config.speculative_config is None and not self.config.scheduler_config.disable_hybrid_kv_cache_manager:
            layer.attn_backend = self._with_cache(layer.attn_backend)

    def _with_cache(self, backend: type[AttentionBackend]) -> type[AttentionBackend]:
        """The backend of this layer alone: vLLM asks a backend, not a layer, for the kind of cache."""
        model = self.config.model_config
        whole = Model(
            self.recipe.to_json(),
            model.get_total_num_hidden_layers(),
            self.heads.num_heads,
            self.heads.num_kv_heads,
            model.max_model_len,
        )
        layer, in_flight = self.layer, self.config.max_in_flight_tokens

        def customize_spec(cls: type, spec: AttentionSpec) -> AttentionSpec:
            return spec_of(spec, whole, layer, in_flight)

        return type(backend.__name__, (backend,), {"customize_spec": classmethod(customize_spec), "__module__": backend.__module__})

    def warmup(self, block_size: int, max_tokens: int, device: torch.device) -> None:
        """Build this layer's lists, compile and load its kernels: no request and no capture waits for that."""
        dtype = self.config.model_config.dtype
        warmup_decode(
            self.pattern,
            max_tokens=max_tokens,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            page_size=block_size,
            q_len=None,
            dtype=dtype,
            device=device,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks is not None,
            layer=self.layer,
            heads=self.heads,
            backend=self.backend,
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: S2Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise Unsupported("s2attn cannot serve this model as asked", {NAME: ["the output is quantised by the attention itself"]})
        if attn_metadata is None:  # a run that measures memory: there is no cache yet
            return output.zero_()
        tokens = attn_metadata.tokens
        k_pages, v_pages = self._pages(kv_cache)
        out = decode(
            query[:tokens],
            k_pages,
            v_pages,
            self.pattern,
            block_table=attn_metadata.block_table,
            seq_lens=attn_metadata.seq_lens,
            cu_seqlens_q=attn_metadata.cu_seqlens_q,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            layer=self.layer,
            heads=self.heads,
            backend=self.backend,
            validate=False,
        )
        output[:tokens].copy_(out)
        return output

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        tokens = len(slot_mapping)
        store_kv(key[:tokens], value[:tokens], *self._pages(kv_cache), slot_mapping, backend=self.backend, validate=False)

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Views ``(blocks, block_size, heads, width)`` of keys and values: a token's lie side by side, in whatever order all else is."""
        pages = kv_cache.transpose(1, 2)
        return pages[..., : self.head_size], pages[..., self.head_size :]
