"""A tiny model learns to copy from far away, which it can do only where its pattern reaches."""

import torch
from torch import nn

from s2attn import Pattern, Recipe, Sink, Window
from s2attn.nn import SparseAttention

torch.set_num_threads(1)  # a model this small only waits for a second thread
WIDTH, HEADS, LENGTH, SYMBOLS = 32, 2, 128, 8


class Block(nn.Module):
    def __init__(self, pattern: Pattern, layer: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attend = SparseAttention(pattern, HEADS, layer=layer)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.attend(q, k, v).flatten(-2)
        return x + self.mlp(x)


def final_loss(recipe: Recipe, steps: int = 60) -> float:
    """Train to say, at the end of a sequence, the symbol at its beginning."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(SYMBOLS, WIDTH), *(Block(recipe.pattern(i), i) for i in range(2)), nn.Linear(WIDTH, SYMBOLS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randint(SYMBOLS, (16, LENGTH))
        loss = nn.functional.cross_entropy(model(x)[:, -1], x[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


near = final_loss(Recipe(Window(16)))  # two layers of 16 tokens cannot see the beginning
with_sink = final_loss(Recipe(Sink(1) | Window(16)))  # the first token is always seen
print(f"loss with Window(16) {near:.2f}, with Sink(1) | Window(16) {with_sink:.2f}; guessing gives {torch.tensor(SYMBOLS).log():.2f}")
assert with_sink < 0.5 * near
