"""A long sequence on two ranks: each holds half of the tokens and half of the weights, and the losses are those of one process.

`torchrun --nproc-per-node 2 examples/13_context_parallel.py` trains on gloo; started as a plain script it calls torchrun itself.
"""

import os
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import s2attn
from experiments.model import LanguageModel, ModelConfig
from s2attn import Local, Recipe, Shards, Stride
from s2attn.nn.rotary import frequencies, rotations

TOKENS, STEPS = 512, 4
CONFIG = ModelConfig(layers=2, width=64, hidden=128, recipe=Recipe(Local(1) | Stride(4), dense_layers=[1]))


class ContextAttention(nn.Module):
    """Stands where the model has `SparseAttention`: the same call, for the tokens of one rank."""

    def __init__(self, recipe: Recipe, layer: int, shards: Shards):
        super().__init__()
        self.pattern, self.layer, self.shards = recipe.pattern(layer), layer, shards

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2attn.context_attention(q, k, v, self.pattern, shards=self.shards, layer=self.layer)


class ShardedModel(LanguageModel):
    """The demo's model over the tokens of one rank, at their positions in the whole sequence."""

    def __init__(self, shards: Shards, rank: int):
        super().__init__(CONFIG)
        self.shards, self.rank = shards, rank
        for layer, block in enumerate(self.blocks):
            block.attention.attend = ContextAttention(CONFIG.recipe, layer, shards)

    def forward(self, tokens: Tensor) -> Tensor:
        place = self.shards.positions(self.rank)
        rotation = rotations(place[None], frequencies(CONFIG.head_dim, CONFIG.rope_base))
        x = self.shards.split(self.embed(tokens), self.rank)  # a byte's embedding looks at the bytes before it, whoever holds them
        for block in self.blocks:
            x = block(x, rotation)
        return F.linear(self.norm(x), self.embedding.weight)


def train(model: nn.Module, pick: object = None) -> list[float]:
    """Losses of a few steps on bytes that count up; ``pick`` takes this rank's part of the targets."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        text = (torch.arange(step, step + TOKENS + 1) * 7 % 251)[None]
        tokens, targets = text[:, :-1], text[:, 1:]
        loss = F.cross_entropy(model(tokens).flatten(0, 1), (pick(targets) if callable(pick) else targets).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shards = Shards.zigzag(TOKENS, ranks)
    model = ShardedModel(shards, rank)
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # averages gradients: every rank has as many tokens, so this is the mean over all of them
    found = torch.tensor(train(model, lambda targets: shards.split(targets, rank)))
    dist.all_reduce(found)
    found /= ranks
    if rank == 0:
        alone = torch.tensor(train(LanguageModel(CONFIG)))
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        traffic = s2attn.context_traffic(CONFIG.recipe.pattern(0), CONFIG.heads, CONFIG.kv_heads, shards=shards)
        shown = ", ".join(f"{loss:.4f}" for loss in found.tolist())
        print(f"{ranks} ranks of {shards.tokens} tokens each, losses {shown}: those of one process")
        print(f"the sparse layer brought rank 0 {int(traffic.received[0]):,} of {shards.tokens * CONFIG.kv_heads:,} keys")
    dist.barrier()  # no rank leaves while another one is still at work
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        subprocess.run([*launch, __file__], check=True)
