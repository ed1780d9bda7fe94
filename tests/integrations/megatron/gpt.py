"""A tiny GPT of Megatron-core on a CPU, for the tests beside it; as a script it takes one step on several ranks and saves what came out.

Megatron expects a CUDA device in a few places. `STAND_INS` are what a CPU needs there, and nothing of s2attn depends on them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from s2attn import Dense, Local, PerHead, Recipe, Sink, Stride, Window
from s2attn.integrations.megatron import with_s2

VOCABULARY = 64
TOKENS = 128
SPARSE = Recipe(
    Sink(3) | Window(20),
    layers={
        1: PerHead({0: Dense(), 1: Window(9)}, default=Local(2, block=16) | Stride(3, block=16)),
        2: Local(1, block=16) | Stride(4, block=16, heads="query"),
    },
)


def _zigzag_embedding(embedding: Tensor, axis: int, group: Any) -> Tensor:
    """What Megatron does on a GPU, without pinned memory."""
    ranks, rank = group.size(), group.rank()
    chunks = embedding.chunk(2 * ranks, axis)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), axis)


STAND_INS: list[tuple[Any, str, Any]] = [
    (torch.cuda, "current_device", lambda: "cpu"),
    (rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _zigzag_embedding),
]


@dataclass(frozen=True)
class Case:
    """One model and its batch."""

    recipe: Any = None
    groups: int = 4
    lengths: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def config_of(case: Case, tp: int = 1, cp: int = 1) -> TransformerConfig:
    """Three layers of eight heads."""
    settings = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "gradient_accumulation_fusion": False, "add_bias_linear": False}
    shape = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": case.groups, "use_cpu_initialization": True}
    parallel = {"tensor_model_parallel_size": tp, "context_parallel_size": cp}
    return TransformerConfig(**{**shape, **settings, **parallel, **case.settings})


def build(case: Case, tp: int = 1, cp: int = 1) -> GPTModel:
    """The model with s2attn, or with Megatron's own attention when the case has no recipe; its weights depend on their names alone."""
    config, spec = config_of(case, tp, cp), get_gpt_layer_local_spec()
    if case.recipe is not None:
        spec = with_s2(spec, config, case.recipe)
    model = GPTModel(config, spec, VOCABULARY, 2 * TOKENS, position_embedding_type="rope")
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, weight in model.named_parameters():
        axis = split_axis(weight)
        shape = [size * (tp if place == axis else 1) for place, size in enumerate(weight.shape)]
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))
        whole = 1 + 0.1 * whole if "norm" in name else 0.3 * whole
        with torch.no_grad():
            weight.copy_(whole if axis is None else whole.chunk(tp, axis)[rank])
    return model


def split_axis(weight: Tensor) -> int | None:
    """The axis along which tensor-parallel ranks share a weight, or None."""
    return weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None


def batch_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and positions of all ranks: two rows, or packed sequences in one."""
    rows = 1 if case.lengths else 2
    tokens, labels = torch.randint(VOCABULARY, (2, rows, TOKENS), generator=torch.Generator().manual_seed(5)).unbind(0)
    places = torch.cat([torch.arange(length) for length in case.lengths or (TOKENS,)])
    return tokens, labels, places.expand(rows, -1)


def packing(case: Case) -> PackedSeqParams | None:
    """The cumulative lengths of the packed sequences of a case."""
    if not case.lengths:
        return None
    cu = torch.tensor((0, *case.lengths)).cumsum(0).int()
    longest = max(case.lengths)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=longest, max_seqlen_kv=longest)


def own_tokens(case: Case, rank: int, ranks: int) -> list[int]:
    """The tokens of a context-parallel rank: chunk ``rank`` and chunk ``2 * ranks - 1 - rank`` of every sequence."""
    own = []
    edges = torch.tensor((0, *(case.lengths or (TOKENS,)))).cumsum(0).tolist()
    for start, end in pairwise(edges):
        chunk = (end - start) // (2 * ranks)
        for number in (rank, 2 * ranks - 1 - rank):
            own += range(start + number * chunk, start + (number + 1) * chunk)
    return own


def step(case: Case, model: GPTModel, cp: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss over all tokens and this rank's part of the gradients."""
    own = own_tokens(case, parallel_state.get_context_parallel_rank(), cp)
    tokens, labels, places = (part[:, own] for part in batch_of(case))
    losses = model(tokens, places, None, labels=labels, packed_seq_params=packing(case))
    loss = losses.sum() / (TOKENS * len(tokens))
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def whole_step(case: Case, tp: int, cp: int) -> dict[str, Tensor]:
    """Loss and gradients of the whole model over the whole batch, put together from all ranks."""
    model = build(case, tp, cp)
    loss, grads = step(case, model, cp)
    found = {"loss": loss}
    for name, weight in model.named_parameters():
        axis, group = split_axis(weight), parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(grads[name]) for _ in range(tp)]
        dist.all_gather(parts, grads[name].contiguous(), group=group)
        found[name] = parts[0] if axis is None else torch.cat(parts, axis)
    for value in found.values():
        dist.all_reduce(value, group=parallel_state.get_context_parallel_group())
    return found


def start_model_parallel(tp: int, cp: int) -> None:
    """The process groups and the random states that Megatron expects."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)


CASES: dict[str, tuple[Case, list[tuple[int, int]]]] = {
    "rows": (Case(SPARSE), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]),
    "fewer groups than ranks": (Case(SPARSE, groups=2), [(1, 1), (4, 1)]),
    "packed": (Case(SPARSE, lengths=(56, 8, 0, 64), settings={"softmax_type": "learnable"}), [(1, 1), (1, 2), (2, 2), (1, 4)]),
}


def all_cases(rank: int, out: Path) -> None:
    """Every case on every split of four ranks; rank 0 saves loss and gradients."""
    found = {}
    for name, (case, splits) in CASES.items():
        for tp, cp in splits:
            start_model_parallel(tp, cp)
            found[name, tp, cp] = whole_step(case, tp, cp)
    if rank == 0:
        torch.save(found, out)


def rank_dies(rank: int, out: Path) -> None:
    """Rank 1 ends without a word while the others wait for its keys."""
    start_model_parallel(1, 2)
    case = Case(SPARSE)
    model = build(case, 1, 2)
    if rank == 1:
        model.decoder.layers[1].self_attention.core_attention.register_forward_pre_hook(lambda *_: os._exit(3))
    step(case, model, 2)
    out.write_text("a step without one of its ranks")


WORK: dict[str, tuple[int, Callable[[int, Path], None]]] = {"all_cases": (4, all_cases), "rank_dies": (2, rank_dies)}


def _rank(work: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for owner, name, value in STAND_INS:
        setattr(owner, name, value)
    ranks, function = WORK[work]
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    function(rank, folder / "found.pt")
    dist.destroy_process_group()


def _ended(processes: list[Any], limit: float) -> Iterator[int | None]:
    """The exit codes of processes; once one has failed the others have a minute. None: it had to be killed."""
    end = time.monotonic() + limit
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + 60)
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
        time.sleep(0.02)
    for process in processes:
        killed = process.is_alive()
        process.kill()
        process.join()
        yield None if killed else process.exitcode


def main(work: str, folder: str, limit: str) -> None:
    """Fork the ranks, so that Megatron is imported once, and print their exit codes."""
    context = get_context("fork")
    processes = [context.Process(target=_rank, args=(work, rank, Path(folder)), daemon=True) for rank in range(WORK[work][0])]
    for process in processes:
        process.start()
    codes = list(_ended(processes, float(limit)))
    print(*codes)
    sys.exit(any(code != 0 for code in codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
