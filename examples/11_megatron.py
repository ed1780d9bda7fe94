"""A recipe in Megatron-core: one step of a small GPT on a CPU, and the same recipe as a file that other hosts read."""

import json
import warnings

import torch
import torch.distributed as dist

from s2attn import Dense, Local, PerHead, Recipe, Sink, Stride, Window
from s2attn.integrations.spec import to_spec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import Megatron says what is not installed beside it
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from s2attn.integrations.megatron import with_s2
warnings.filterwarnings("ignore", module="megatron")

# Under torchrun these would be all ranks, and the sizes of the tensor-parallel and context-parallel groups.
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
parallel_state.initialize_model_parallel(tensor_model_parallel_size=1, context_parallel_size=1)

# Layer 0 is dense, heads of layer 1 differ, the others shard the context over their heads.
recipe = Recipe(Local(2, block=16) | Stride(2, block=16), dense_layers=[0], layers={1: PerHead({0: Sink(4) | Window(32)}, default=Dense())})
with open("recipe.json", "w") as file:
    json.dump(to_spec(recipe), file)


def train(recipe_of_model: object, steps: int = 30) -> list[float]:
    """Losses of a model that learns two rows of tokens by heart."""
    config = TransformerConfig(
        num_layers=3, hidden_size=64, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0, hidden_dropout=0.0,
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
    )  # fmt: skip
    torch.manual_seed(0)
    spec = with_s2(get_gpt_layer_local_spec(), config, recipe_of_model)
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=128, position_embedding_type="learned_absolute")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, places, losses = torch.randint(32, (2, 129)), torch.arange(128).expand(2, -1), []
    for _ in range(steps):
        loss = model(tokens[:, :-1], places, None, labels=tokens[:, 1:].contiguous()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


with open("recipe.json") as file:
    sparse = train(json.load(file))
dense = train(Dense())
print(f"loss after {len(sparse)} steps: {sparse[-1]:.3f} with the recipe, {dense[-1]:.3f} dense, {sparse[0]:.3f} before")
assert sparse[-1] < 0.5 * sparse[0]
parallel_state.destroy_model_parallel()
dist.destroy_process_group()
