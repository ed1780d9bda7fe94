"""One rank of a group of two: run by test_ranks.py as `python -m tests.integrations.transformers.ranks WAY RANK FOLDER`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from s2attn.integrations import transformers as host
from tests.integrations.transformers.models import text

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 60}


def tensor_parallel(folder: Path) -> dict[str, torch.Tensor]:
    """A saved model over two ranks, each with half of the heads: logits, the loss of training, and tokens from a cache of pages."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    settings, _, meshes = model.prepare_distribute_model(DistributedConfig(tp_size=2))  # as from_pretrained does, which wants accelerate
    model = model.maybe_distribute_model(model, settings, meshes)
    tokens = text(2, 80)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        past = host.PastKeyValues.for_model(model, max_tokens=128, sequences=2, page_size=16)
        heads = torch.tensor([past.pages.num_heads, past.pages.num_kv_heads, past.pages.heads.start])
        generated = model.generate(tokens, **GREEDY, **{host.CACHE_ARGUMENT: past})
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return {"logits": logits, "generated": generated, "heads": heads, "loss": loss.detach()}


def fully_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """The same model with weights in pieces, checkpointed and trained on a row for each rank."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    row = text(2, 80)[dist.get_rank()][None]
    loss = model(row, labels=row, use_cache=False).loss
    loss.backward()
    gradient = model.model.layers[0].self_attn.k_proj.weight.grad.full_tensor()
    return {"loss": loss.detach(), "gradient": gradient}


def main() -> None:
    way, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{way}.store", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    host.register()
    result = {"tensor_parallel": tensor_parallel, "fully_sharded": fully_sharded}[way](folder)
    torch.save(result, folder / f"{way}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
