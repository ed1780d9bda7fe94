"""vLLM's view of a KV cache that gives blocks back by pattern: what a layer's cache looks like, and who owns its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from s2attn.integrations.vllm.freeing import WORTH, Lifetimes, Model, first_alike


@dataclass(frozen=True, kw_only=True)
class S2CacheSpec(AttentionSpec):
    """The cache of layers whose blocks are given back by pattern; equal specs share a block table.

    Attributes:
        model: recipe and model.
        layer: the first layer whose blocks live as long as these.
        in_flight: tokens that can be scheduled and not yet processed.
    """

    model: Model
    layer: int
    in_flight: int

    @property
    def lifetimes(self) -> Lifetimes:
        return Lifetimes.of(self.model, self.layer, self.block_size)

    @property
    def most_held(self) -> int:
        """Blocks of one request at most."""
        return self.lifetimes.most_held(self.in_flight)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.most_held * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Only layers whose blocks live equally long may share a table: vLLM manages it by the spec of its first layer alone."""
        return all(
            isinstance(spec, S2CacheSpec) and (spec.model, spec.layer) == (self.model, self.layer) for spec in kv_cache_specs.values()
        )


def spec_of(spec: AttentionSpec, model: Model, layer: int, in_flight: int) -> AttentionSpec:
    """The cache of a layer: with freed blocks where that is worth a block table of another kind, else as vLLM has it."""
    if not isinstance(spec, FullAttentionSpec):
        return spec
    most = Lifetimes.of(model, layer, spec.block_size).most_held(in_flight)
    if most > WORTH * -(-model.max_tokens // spec.block_size):
        return spec
    shared = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec) if field.init}
    return S2CacheSpec(**shared, model=model, layer=first_alike(model, layer, spec.block_size), in_flight=in_flight)


class S2CacheManager(SingleTypeKVCacheManager):
    """Gives a block back once no later query of any head reads it."""

    def __init__(self, kv_cache_spec: S2CacheSpec, **settings: Any) -> None:
        settings["max_admission_blocks_per_request"] = kv_cache_spec.most_held
        super().__init__(kv_cache_spec, **settings)
        self.lifetimes = kv_cache_spec.lifetimes
        self.processed: dict[str, int] = {}

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None) -> None:
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        gone = self.lifetimes.gone(processed_computed_tokens, self.processed.get(request_id, 0)).tolist()
        self.processed[request_id] = processed_computed_tokens
        # The last ones first, as vLLM does it: they are the first to be evicted from the prefix cache.
        freed = [blocks[i] for i in reversed(gone) if not blocks[i].is_null]
        for i in gone:
            blocks[i] = self._null_block
        self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.processed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """A prefix is hit where all is cached that a query behind it reads; what is not read need not be cached, and is not taken.

        Drafts (``drop_eagle_block``) and context parallelism never come here: `spec_of` is not asked for them.
        """
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size, alignment_tokens=alignment_tokens)
        found: list[Sequence[KVCacheBlock] | None] = []

        def cached(block: int) -> bool:
            found.append(block_pool.get_cached_block(hashes[block], kv_cache_group_ids))
            return found[-1] is not None

        lifetimes = kv_cache_spec.lifetimes
        multiple = max(1, alignment_tokens // size)
        count = lifetimes.longest_hit(cached, min(max_length // size, len(hashes)), multiple)
        read = lifetimes.needed(count).tolist()
        null = block_pool.null_block
        hit = tuple(
            [blocks[group] if needed and blocks is not None else null for needed, blocks in zip(read, found[:count], strict=True)]
            for group in range(len(kv_cache_group_ids))
        )
        return hit, count * size


# On import: in the process of the layers, and where their specs are unpickled. At the start of vLLM it would be too early, since vLLM's own
# kinds, which must be there first (a registry that is not empty is taken for complete), may depend on its configuration.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(S2CacheSpec, S2CacheManager)
