"""What would a sparse recipe do to a model that was trained without it? Measured, with no training, on a tiny model of random weights.

The weights are random, so the numbers say nothing about any model: they show what is measured and how it is read.
"""

import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import s2attn
from s2attn import Dense, PerHead, Recipe, Sink, Window
from s2attn.analysis.compare import NeedsTraining

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape, bos_token_id=0, eos_token_id=0)).eval()
with torch.no_grad():
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight *= 20  # so that attention is far from uniform
texts = torch.randint(100, (2, 400))

# A recipe: half of the KV heads of the first two layers see sinks and a window.
streaming = Sink(8) | Window(64)
half = PerHead({1: streaming, 3: streaming}, default=Dense())
found = s2attn.compare(model, Recipe(Dense(), layers={0: half, 1: half}), texts)
print(found, end="\n\n")
assert (found.mass[2] == 1).all() and found.mass[0].min() < 1 and found.kl > 0

# Dense changes nothing at all: the model's own attention runs.
assert s2attn.compare(model, Recipe(Dense()), texts).nll_change == 0

# Patterns that a model must be trained with are called by their name.
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always", NeedsTraining)
    s2attn.compare(model, s2attn.preset("s2", local=1, stride=2), texts)
print(*(warning.message for warning in said), sep="\n", end="\n\n")
assert any("NEEDS TRAINING" in str(warning.message) for warning in said)

# Which heads can be sparse, at a hundredth of a nat per token?
advice = s2attn.suggest(model, texts, budget=0.01, sink=8, window=64)
print(advice)
assert advice.comparison.nll_change <= 0.01
Path("recipe.json").write_text(advice.recipe.to_json())
assert Recipe.from_json(Path("recipe.json").read_text()) == advice.recipe
