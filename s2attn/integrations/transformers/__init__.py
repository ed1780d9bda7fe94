"""Hugging Face Transformers: any model with the attention interface runs on s2attn, by the recipe in its configuration.

>>> import torch, transformers, s2attn
>>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
>>> model = transformers.LlamaForCausalLM(config)
>>> with s2attn.patched(model, s2attn.Sink(4) | s2attn.Window(32)):
...     model(torch.arange(50)[None]).logits.shape
torch.Size([1, 50, 64])
"""

from s2attn.core import requires

with requires("s2attn.integrations.transformers cannot run", "transformers", "transformers"):
    from s2attn.integrations.transformers.interface import CACHE_ARGUMENT, NAME, OLDEST, register
    from s2attn.integrations.transformers.model import patch, patched, unpatch
    from s2attn.integrations.transformers.past import PastKeyValues

__all__ = ["CACHE_ARGUMENT", "NAME", "OLDEST", "PastKeyValues", "patch", "patched", "register", "unpatch"]
