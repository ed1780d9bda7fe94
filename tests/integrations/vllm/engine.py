"""Runs real vLLM engines, one after another in a process of their own: ``python engine.py cases.json results.json``.

A case is an object: ``model``, ``options`` for `LLM`, ``rounds`` (a list of prompts for each call of `generate`), and how many ``new``
tokens to write. Its result is the tokens, what came from the prefix cache and what each group of layers held of the KV cache; or ``error``.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any


def watch(manager: Any) -> dict[str, Any]:
    """What a group of layers is managed by, and the most blocks that one request held after an allocation."""
    seen = {"kind": type(manager).__name__, "held": 0, "asked": 0}
    plain = manager.allocate_new_blocks

    def allocate(request_id: str, *args: Any) -> Any:
        new = plain(request_id, *args)
        blocks = manager.req_to_blocks[request_id]
        seen["held"] = max(seen["held"], sum(not block.is_null for block in blocks))
        seen["asked"] = max(seen["asked"], len(blocks))
        return new

    manager.allocate_new_blocks = allocate
    return seen


def run(case: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(case["model"], skip_tokenizer_init=True, dtype="float32", disable_log_stats=True, **case["options"])
        # Where the engine has a process of its own, as `vllm serve` runs it, its cache is out of sight.
        core = getattr(llm.llm_engine.engine_core, "engine_core", None)
        managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers if core else []
        groups = [watch(manager) for manager in managers]
        how = SamplingParams(temperature=0, max_tokens=case["new"], ignore_eos=True, detokenize=False)
        tokens, cached = [], []
        for prompts in case["rounds"]:
            written = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
            tokens.append([list(text.outputs[0].token_ids) for text in written])
            cached.append([text.num_cached_tokens for text in written])
        return {"tokens": tokens, "cached": cached, "groups": groups}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    results = {}
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        start = time.monotonic()
        results[name] = run(case)
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    Path(sys.argv[2]).write_text(json.dumps(results))
