"""Real engines on a CPU: greedy tokens equal to those of Transformers with the same weights and the same recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from s2attn import Dense, Local, PerHead, Recipe, Sink, Stride, Window
from s2attn.integrations.spec import FIELD, to_spec

HERE = Path(__file__).parent
NEW, BLOCK, LONGEST = 24, 16, 256
# The first test of the module waits for all engines.
pytestmark = pytest.mark.timeout(600)

DENSE = Recipe(Dense())
# Heads with strides of their own, which read all blocks between them, so nothing is freed.
STRIDED = Recipe(Local(2, block=16) | Stride(2, block=16), dense_layers=[1])
# Sink and window: all but a few blocks are freed. Two layers that see everything keep theirs.
WINDOWS = Recipe(PerHead({0: Sink(20) | Window(40)}, default=Window(30)), dense_layers=[0, 2])
# Every layer frees, layers of two kinds, the first less than the others need: there is no dense group.
NO_DENSE = Recipe(Sink(16) | Window(50), layers={0: Window(20), 2: Window(20)})


def prompts_of(*lengths: int, seed: int = 1) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=source).tolist() for length in lengths]


def options(recipe: Recipe, **more: Any) -> dict[str, Any]:
    usual = {"max_model_len": LONGEST, "block_size": BLOCK, "num_gpu_blocks_override": 120, "max_num_seqs": 8, "enforce_eager": True}
    return {**usual, "max_num_batched_tokens": LONGEST, "enable_prefix_caching": False, "hf_overrides": {FIELD: to_spec(recipe)}, **more}


MIXED = prompts_of(100, 37, 5, 150)
LONG = prompts_of(160)[0]
# The second text begins as the first did; the third is the first again; the fourth leaves it after 40 tokens.
SHARED = [[LONG], [LONG[:130] + prompts_of(9, seed=2)[0]], [LONG], [LONG[:40] + prompts_of(30, seed=3)[0]]]
CHUNKS = {"max_num_batched_tokens": 40, "enable_chunked_prefill": True}
CACHED = {"enable_prefix_caching": True}
# A CPU does not heed the choice, but it is read, and sent to all processes.
CHOSEN = {"attention_backend": "S2ATTN"}

# name: model, recipe, rounds of prompts, options
CASES: dict[str, tuple[str, Recipe, list[list[list[int]]], dict[str, Any]]] = {
    "dense": ("llama", DENSE, [MIXED], {}),
    "strides": ("llama", STRIDED, [MIXED], CHOSEN),
    "windows": ("llama", WINDOWS, [MIXED], {}),
    "windows in chunks": ("llama", WINDOWS, [MIXED], CHUNKS),
    "strides in chunks": ("llama", STRIDED, [MIXED], CHUNKS),
    "no dense layer": ("llama", NO_DENSE, [MIXED], CHUNKS),
    "prefix cache": ("llama", WINDOWS, SHARED, {**CHUNKS, **CACHED}),
    "prefix cache, no dense layer": ("llama", NO_DENSE, SHARED, CACHED),
    "prefix cache, few blocks": ("llama", WINDOWS, [MIXED, *SHARED], {**CHUNKS, **CACHED, "num_gpu_blocks_override": 34}),
    "large blocks": ("llama", WINDOWS, [MIXED], {"block_size": 48}),
    "compiled": ("llama", STRIDED, [MIXED], {"enforce_eager": False}),
    "capped logits": ("gemma", WINDOWS, [MIXED], {}),
    "from config.json": ("sparse llama", STRIDED, [MIXED], {"hf_overrides": {}}),
    "from additional_config": ("llama", STRIDED, [MIXED], {"hf_overrides": {}, "additional_config": {FIELD: to_spec(STRIDED)}}),
}
# Heads differ in three of the layers.
RANKS = Recipe(
    PerHead({0: Sink(20) | Window(40)}, default=Window(30)), dense_layers=[0], layers={2: Local(2, block=16) | Stride(2, block=16)}
)
TWO_RANKS = {"two ranks": ("llama", RANKS, [MIXED, *SHARED], {**CHUNKS, **CACHED, **CHOSEN, "tensor_parallel_size": 2})}
REFUSED = {
    "no recipe": ({"hf_overrides": {}}, "s2_attention must hold a recipe"),
    "another model's recipe": ({"hf_overrides": {FIELD: to_spec(Recipe(Dense(), dense_layers=[7]))}}, "must name layers below 4"),
    "two recipes": ({"additional_config": {FIELD: to_spec(Dense())}}, "must be the same in the model's configuration"),
    "float8 cache": ({"kv_cache_dtype": "fp8_e4m3"}, "a KV cache of type fp8"),
}


Greedy = Callable[[str, Recipe, list[list[int]], int], list[list[int]]]


@pytest.fixture(scope="module")
def folders(models: Callable[..., str]) -> dict[str, str]:
    return {"llama": models("llama"), "sparse llama": models("llama", **{FIELD: to_spec(STRIDED)}), "gemma": models("gemma")}


def run_engines(cases: dict[str, Any], folder: Path, seconds: int, served: bool = False) -> dict[str, Any]:
    """Results of engines in a process of their own, which is ended when it takes too long; ``served`` as `vllm serve` spreads them."""
    asked, answered = folder / "cases.json", folder / "results.json"
    asked.write_text(json.dumps(cases))
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_CI_ENV": "1", "HF_HUB_OFFLINE": "1"}
    how = {
        "S2ATTN_VLLM_CPU": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(served)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "engine.py"), str(asked), str(answered)]
    log = folder / "log.txt"
    with log.open("w") as out:
        engines = subprocess.Popen(command, env={**inherited, **quiet, **how}, stdout=out, stderr=out, start_new_session=True)
        try:
            status = engines.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(engines.pid, signal.SIGKILL)  # with its workers, which would go on without it
            raise
    assert status == 0, log.read_text()[-3000:]
    return json.loads(answered.read_text())


def asked_of(cases: dict[str, Any], folders: dict[str, str]) -> dict[str, Any]:
    return {
        name: {"model": folders[model], "options": options(recipe, **more), "rounds": rounds, "new": NEW}
        for name, (model, recipe, rounds, more) in cases.items()
    }


@pytest.fixture(scope="module")
def results(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    refused = {name: ("llama", STRIDED, [[[5]]], more) for name, (more, _) in REFUSED.items()}
    return run_engines(asked_of({**CASES, **refused}, folders), tmp_path_factory.mktemp("one"), 500)


def check_tokens(found: dict[str, Any], model: str, recipe: Recipe, rounds: list[list[list[int]]], greedy: Greedy) -> None:
    assert "error" not in found, found["error"]
    assert found["tokens"] == [greedy(model, recipe, prompts, NEW) for prompts in rounds]


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name: str, results: dict[str, Any], folders: dict[str, str], greedy: Greedy) -> None:
    model, recipe, rounds, _ = CASES[name]
    check_tokens(results[name], folders[model], recipe, rounds, greedy)


def test_patterns_matter(folders: dict[str, str], greedy: Greedy) -> None:
    """Else the tests above would not see whether a recipe is heeded."""
    texts = [greedy(folders["llama"], recipe, MIXED[:1], NEW) for recipe in (DENSE, STRIDED, WINDOWS, NO_DENSE)]
    assert len({str(text) for text in texts}) == 4


def test_blocks_are_freed_where_all_heads_allow_it(results: dict[str, Any]) -> None:
    for name in ("windows in chunks", "prefix cache", "prefix cache, few blocks"):
        groups = {group["kind"]: group for group in results[name]["groups"]}
        assert set(groups) == {"FullAttentionManager", "S2CacheManager"}
        assert groups["FullAttentionManager"]["held"] == groups["FullAttentionManager"]["asked"] >= 11
        # Sink (2 blocks), window (up to 4) and one chunk of 40 (up to 3, beside its first, partial one).
        assert groups["S2CacheManager"]["held"] <= 8 < groups["S2CacheManager"]["asked"]
    assert [group["kind"] for group in results["no dense layer"]["groups"]] == ["S2CacheManager"] * 2
    assert [group["kind"] for group in results["strides"]["groups"]] == ["FullAttentionManager"]
    # A recipe that frees holds less than one that does not, in the same run of vLLM.
    assert max(group["held"] for group in results["no dense layer"]["groups"]) < results["dense"]["groups"][0]["held"]


def test_prefixes_are_found(results: dict[str, Any]) -> None:
    for name in ("prefix cache", "prefix cache, no dense layer"):
        # All but the last block of 160 tokens, 130 shared ones and 40 shared ones, in whole blocks.
        assert [counts[0] for counts in results[name]["cached"]] == [0, 128, 144, 32], name


def test_two_ranks_hold_their_own_heads(folders: dict[str, str], greedy: Greedy, tmp_path: Path) -> None:
    """The front, the engine and both workers are processes of their own, and each loads the plug-in."""
    found = run_engines(asked_of(TWO_RANKS, folders), tmp_path, 400, served=True)
    for name, (model, recipe, rounds, _) in TWO_RANKS.items():
        check_tokens(found[name], folders[model], recipe, rounds, greedy)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused(name: str, results: dict[str, Any]) -> None:
    assert REFUSED[name][1] in results[name].get("error", "")
