"""A Transformers model on s2attn: patched, padded, generated from pages that shrink, saved so that a reload cannot be silently dense."""

import json
import tempfile
import warnings
from pathlib import Path

import torch

import s2attn
from s2attn import Dense, Local, Recipe, Sink, Stride, Window

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing Transformers is not what this is about
    import transformers

    from s2attn.integrations.transformers import PastKeyValues, register

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=500, max_position_embeddings=2048, **shape)).eval()
tokens = torch.randint(3, 500, (2, 600))
mask = torch.ones_like(tokens)
mask[0, :200] = 0  # the first text is shorter, and padded on the left

# A dense recipe changes nothing.
with torch.no_grad():
    dense = model(tokens, attention_mask=mask).logits
    with s2attn.patched(model, Dense()):
        same = model(tokens, attention_mask=mask).logits
print(f"dense recipe against torch's attention: {(same - dense)[mask.bool()].abs().max():.1e}")

# A sparse one, with the first layer left dense. A padded row is what it is alone.
recipe = Recipe(Sink(4) | Local(2, block=16) | Stride(8, block=16), layers={0: Dense(), 3: Sink(4) | Window(64)})
s2attn.patch(model, recipe)
how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": []}
texts = model.generate(tokens, attention_mask=mask, **how)
alone = model.generate(tokens[:1, 200:], **how)
assert torch.equal(texts[0, -12:], alone[0, -12:])

# The same texts from pages: what no later token reads is given back.
past = PastKeyValues.for_model(model, max_tokens=640, sequences=2)
assert torch.equal(model.generate(tokens, attention_mask=mask, past_key_values=past, **how), texts)
print(f"cache: {past.bytes_used / 1e3:.0f} of {past.bytes_allocated / 1e3:.0f} kB in use; dense {past.bytes_dense / 1e3:.0f} kB")
assert past.bytes_used < 0.75 * past.bytes_dense

# The recipe is saved with the model, and the model says what it needs to be loaded.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    saved = json.loads((Path(folder) / "config.json").read_text())
    assert saved["attn_implementation"] == "s2attn" and saved["s2_attention"] == json.loads(recipe.to_json())
    register()  # in a new process; without it the next line raises
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
assert torch.equal(again.generate(tokens, attention_mask=mask, **how), texts)
print("saved, loaded, and the same tokens")
