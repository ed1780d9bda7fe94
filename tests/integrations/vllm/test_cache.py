"""The cache manager on vLLM's own block pool: blocks given back, prefixes found again, and nothing lost."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from s2attn import Dense, Local, Recipe, Sink, Stride, Window
from s2attn.integrations.vllm import register
from s2attn.integrations.vllm.cache import S2CacheManager, S2CacheSpec, spec_of
from s2attn.integrations.vllm.freeing import Model

SIZE, LONGEST = 16, 256
RECIPE = Recipe(Sink(16) | Window(40), dense_layers=[0], layers={3: Local(2, block=16) | Stride(4, offset=0, block=16)})
MODEL = Model(RECIPE.to_json(), 4, 8, 2, LONGEST)
FULL = FullAttentionSpec(block_size=SIZE, num_kv_heads=2, head_size=16, dtype=torch.float32)


def spec(layer: int = 1, in_flight: int = 32) -> S2CacheSpec:
    return spec_of(FULL, MODEL, layer, in_flight)


def make(layer: int = 1, *, caching: bool = True, blocks: int = 40) -> tuple[S2CacheManager, BlockPool]:
    pool = BlockPool(num_gpu_blocks=blocks, enable_caching=caching, hash_block_size=SIZE)
    settings = {"block_pool": pool, "enable_caching": caching, "kv_cache_group_id": 0, "scheduler_block_size": SIZE}
    return S2CacheManager(spec(layer), **settings), pool


def request(name: str, tokens: int, text: str = "same") -> SimpleNamespace:
    hashes = [BlockHash(f"{text} {i}".encode()) for i in range(tokens // SIZE)]
    return SimpleNamespace(request_id=name, block_hashes=hashes, shared_prefix_boundary=0, all_token_ids=[0] * tokens)


def held(manager: S2CacheManager, name: str) -> list[int]:
    return [i for i, block in enumerate(manager.req_to_blocks[name]) if not block.is_null]


def step(manager: S2CacheManager, of: SimpleNamespace, processed: int, tokens: int) -> None:
    """What the scheduler does for a request that has so many processed tokens and gets more."""
    manager.remove_skipped_blocks(of.request_id, processed)
    manager.allocate_new_blocks(of.request_id, tokens, tokens)
    if manager.enable_caching:
        manager.cache_blocks(of, tokens, replay_boundaries=())


def test_a_layer_gets_the_cache_that_its_pattern_allows() -> None:
    assert spec_of(FULL, MODEL, 0, 32) is FULL, "it sees everything"
    assert isinstance(spec(1), S2CacheSpec) and spec(1) == spec(2) and hash(spec(1)) == hash(spec(2))
    assert spec(3) != spec(1)
    assert spec(1).page_size_bytes == FULL.page_size_bytes
    # Sink; and 39 tokens of the window with 32 in flight, wherever in a block they begin.
    assert spec(1).most_held == 1 + 6
    assert spec(1).max_memory_usage_bytes(None) == 7 * FULL.page_size_bytes
    assert spec_of(FULL, MODEL, 1, LONGEST) is FULL, "nothing would ever be freed"
    other = SlidingWindowSpec(block_size=SIZE, num_kv_heads=2, head_size=16, dtype=torch.float32, sliding_window=32)
    assert spec_of(other, MODEL, 1, 32) is other


def test_only_layers_that_free_alike_share_a_table() -> None:
    """vLLM would manage a common table by the spec of the first layer, and free what the others read."""
    assert UniformTypeKVCacheSpecs.is_uniform_type({"a": spec(1), "b": spec(2)})
    assert not UniformTypeKVCacheSpecs.is_uniform_type({"a": spec(1), "b": spec(3)})
    assert not UniformTypeKVCacheSpecs.is_uniform_type({"a": spec(1), "b": FULL})
    assert not UniformTypeKVCacheSpecs.is_uniform_type({"a": FULL, "b": spec(1)})


def test_vllm_finds_the_manager_and_its_own() -> None:
    register()
    register()
    assert KVCacheSpecRegistry.get_manager_class(spec()) is S2CacheManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec()) is S2CacheSpec
    assert KVCacheSpecRegistry.get_manager_class(FULL).__name__ == "FullAttentionManager"


def test_a_process_that_unpickles_a_spec_knows_its_manager() -> None:
    """The engine gets specs from its workers, and never makes a layer; vLLM's own kinds are registered too."""
    code = f"""
import pickle
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, _REGISTRY_KVCACHESPEC_LIST
spec = pickle.loads({pickle.dumps(spec())!r})
print(KVCacheSpecRegistry.get_manager_class(spec).__name__, FullAttentionSpec in _REGISTRY_KVCACHESPEC_LIST)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["S2CacheManager True"], done.stderr[-2000:]


def test_blocks_return_to_the_pool_and_no_two_requests_own_one() -> None:
    manager, pool = make(caching=False)
    everyone = pool.get_num_free_blocks()
    first, second = request("first", 240), request("second", 240)
    for tokens in range(16, 241, 16):
        for of in (first, second):
            step(manager, of, tokens - 16, tokens)
        owned = [block.block_id for of in (first, second) for block in manager.req_to_blocks[of.request_id] if not block.is_null]
        assert len(set(owned)) == len(owned) == everyone - pool.get_num_free_blocks()
        assert len(owned) <= 2 * manager.max_admission_blocks_per_request
    assert held(manager, "first") == [0, 11, 12, 13, 14]
    for of in (first, second):
        manager.free(of.request_id)
    assert pool.get_num_free_blocks() == everyone and not manager.processed


@given(steps=st.lists(st.integers(1, 32), min_size=1, max_size=40), layer=st.sampled_from([1, 3]))
@settings(max_examples=40)
def test_no_step_lacks_a_block_that_its_queries_read(steps: list[int], layer: int) -> None:
    """In any steps; blocks that the next queries read, or are written by them, are there, and no more than was reserved."""
    manager, _ = make(layer, caching=False)
    of, before = request("one", LONGEST), 0
    for length in steps:
        tokens = min(before + length, LONGEST)
        step(manager, of, before, tokens)
        there = held(manager, "one")
        last = manager.lifetimes.last
        assert set(range(before // SIZE, -(-tokens // SIZE))) <= set(there)
        assert {i for i in range(-(-tokens // SIZE)) if last[i] >= before} <= set(there)
        assert len(there) <= manager.max_admission_blocks_per_request
        before = tokens


def test_a_prefix_is_found_without_the_blocks_that_nobody_reads() -> None:
    manager, pool = make()
    of = request("first", 160)
    for tokens in range(32, 161, 32):
        step(manager, of, tokens - 32, tokens)
    manager.remove_skipped_blocks("first", 160)
    manager.free("first")
    hashes = request("again", 160).block_hashes
    (hit,), tokens = S2CacheManager.find_longest_cache_hit(hashes, 159, [0], pool, spec(), False, SIZE)
    assert tokens == 144 and len(hit) == 9
    assert [i for i, block in enumerate(hit) if not block.is_null] == [0, 6, 7, 8]
    again = make()[0]
    again.block_pool = pool
    again.add_local_computed_blocks("again", hit, tokens, 0)
    assert all(block.ref_cnt == 1 for block in hit if not block.is_null)
    again.allocate_new_blocks("again", 160, 160)
    assert held(again, "again") == [0, 6, 7, 8, 9]


@pytest.mark.parametrize(("lost", "tokens"), [(3, 144), (8, 128), (0, 0), (6, 96)])
def test_a_lost_block_costs_only_the_prefixes_that_read_it(lost: int, tokens: int) -> None:
    """Block 6 (tokens 96 to 111) is read by positions 96 to 150: prefixes of 112 to 144 tokens lack it, one of 96 does not."""
    _, pool = make()
    manager = make()[0]
    manager.block_pool = pool
    of = request("first", 160)
    manager.allocate_new_blocks("first", 160, 160)
    manager.cache_blocks(of, 160, replay_boundaries=())
    gone = manager.req_to_blocks["first"][lost]
    pool.evict_blocks({gone.block_id})
    found, length = S2CacheManager.find_longest_cache_hit(of.block_hashes, 159, [0], pool, spec(), False, SIZE)
    assert length == tokens
    assert len(found[0]) == length // SIZE


def test_hits_stand_at_multiples_of_the_alignment() -> None:
    manager, pool = make()
    of = request("first", 160)
    manager.allocate_new_blocks("first", 160, 160)
    manager.cache_blocks(of, 160, replay_boundaries=())
    (_,), tokens = S2CacheManager.find_longest_cache_hit(of.block_hashes, 159, [0], pool, spec(), False, 4 * SIZE)
    assert tokens == 128


def test_a_dense_recipe_changes_nothing() -> None:
    dense = Model(Recipe(Dense()).to_json(), 4, 8, 2, LONGEST)
    assert all(spec_of(FULL, dense, layer, 1) is FULL for layer in range(4))
