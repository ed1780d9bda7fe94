"""Texts from a model that knows nothing of caches: a batch, a stream, forks of one prompt, and drafts that are taken back."""

import torch
from torch import nn

import s2attn
from s2attn import Dense, Local, Sampling, SparseAttention, SparseCache, Stride

torch.manual_seed(0)
VOCABULARY, WIDTH, H, G, D = 200, 64, 8, 4, 8


class Model(nn.Module):
    """Three layers of attention over embeddings: tokens (B, T) to logits (B, T, VOCABULARY)."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(2048, WIDTH)
        patterns = [Dense(), Local(2, block=16) | Stride(8, block=16), Local(2, block=16) | Stride(8, block=16)]
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, (H + 2 * G) * D) for _ in patterns)
        self.attend = nn.ModuleList(SparseAttention(p, num_heads=H, num_kv_heads=G, layer=i) for i, p in enumerate(patterns))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.place(s2attn.nn.positions(tokens))
        for qkv, attend in zip(self.qkv, self.attend, strict=True):
            q, k, v = qkv(x).unflatten(-1, (H + 2 * G, D)).split([H, G, G], dim=2)
            x = x + attend(q, k, v).flatten(2)
        return self.head(x)


model = Model().eval()
prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in (700, 30, 260)]

# Prompts of different lengths together, each with its own end: every text is the one that it is alone.
how = [Sampling(40, temperature=0.9, seed=1), Sampling(20), Sampling(30, temperature=0.9, top_p=0.8, seed=2)]
texts = s2attn.generate(model, prompts, how, chunk=128)
assert texts[2].new == s2attn.generate(model, prompts[2:], how[2:])[0].new
print("lengths:", [len(text.new) for text in texts])

# As they come, through a cache of one's own, which stays.
cache = SparseCache.for_model(model, max_tokens=800, sequences=3, chunk=128, hold=4)
sequence, written = cache.open(), []
for (token,) in s2attn.stream(model, prompts[:1], Sampling(40, temperature=0.9, seed=1), chunk=128, cache=cache, sequences=[sequence]):
    written.append(token.token)
assert written == texts[0].new
print(f"cache: {cache.bytes_used / 1e3:.0f} of {cache.bytes_allocated / 1e3:.0f} kB in use; dense {cache.bytes_dense / 1e3:.0f} kB")
assert cache.bytes_used < 0.75 * cache.bytes_dense  # one layer of three is dense

# Two continuations of one text: a fork costs nothing until it goes its own way.
used, forks = cache.bytes_used, [cache.fork(sequence), cache.fork(sequence)]
assert cache.bytes_used == used
ways = [Sampling(20, temperature=1.0, seed=seed) for seed in (5, 6)]
one, two = s2attn.generate(model, [prompts[0] + written] * 2, ways, cache=cache, sequences=forks)
assert one.new != two.new
print("two ways on:", one.new[:6], two.new[:6])

# A draft of four tokens, of which the model takes those that it would have written itself.
text = prompts[0] + written
greedy = s2attn.generate(model, [text], Sampling(6))[0].new
draft = [*greedy[:2], 0, 0]
piece = torch.tensor([[text[-1], *draft]])
with torch.no_grad(), cache.step([sequence], piece):
    says = model(piece)[0].argmax(-1).tolist()
taken = next(i for i, (mine, drafted) in enumerate(zip(says, draft, strict=False)) if mine != drafted)
cache.rollback(sequence, len(draft) - taken)
assert taken == 2 and says[: taken + 1] == greedy[:3] and cache.tokens(sequence) == text + greedy[:2]
print(f"draft: {taken} of {len(draft)} tokens taken, {len(draft) - taken} rolled back, one more written")
