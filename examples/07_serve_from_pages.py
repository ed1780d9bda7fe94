"""A prompt in chunks, then token by token, from a cache that gives back the keys which no later token can read."""

import torch

import s2attn
from s2attn import Local, SparseCache, Stride
from s2attn.cache import pages_needed

torch.manual_seed(0)
PROMPT, NEW, CHUNK, H, G, D = 4096, 32, 256, 8, 4, 64
pattern = Local(4) | Stride(8)
q, k, v = (torch.randn(1, PROMPT + NEW, heads, D) for heads in (H, G, G))

pages = pages_needed(pattern, num_kv_heads=G, num_heads=H, tokens=PROMPT + NEW, chunk=CHUNK)
shape = {"num_kv_heads": G, "num_heads": H, "head_dim": D, "dtype": torch.float32}
cache = SparseCache(pattern, num_pages=pages, max_tokens=PROMPT + NEW, **shape)
sequence = cache.open()


def step(sequences: list[int], begin: int, tokens: int) -> torch.Tensor:
    """One layer's work for new tokens: store their keys, attend, give back what nobody will read."""
    new = [x[:, begin : begin + tokens].expand(len(sequences), -1, -1, -1) for x in (q, k, v)]
    return cache.attend(sequences, 0, *new)


outs = [step([sequence], begin, CHUNK) for begin in range(0, PROMPT, CHUNK)]
print(
    f"after the prompt: {cache.bytes_used / 1e6:.1f} of {cache.bytes_allocated / 1e6:.1f} MB in use; dense {cache.bytes_dense / 1e6:.1f} MB"
)

twin = cache.fork(sequence)  # a second continuation of the prompt costs nothing until it goes its own way
used = cache.bytes_used
both = step([sequence, twin], PROMPT, 1)
assert torch.equal(both[0], both[1]) and cache.bytes_used - used <= 2 * G * cache.page_bytes
cache.free(twin)

outs += [both[:1]]
outs += [step([sequence], PROMPT + i, 1) for i in range(1, NEW)]

whole = s2attn.attention(q, k, v, pattern)
torch.testing.assert_close(torch.cat(outs, dim=1), whole)
assert cache.bytes_used < 0.35 * cache.bytes_dense
print(f"{PROMPT + NEW} tokens, step by step, equal one call of attention over all of them")
