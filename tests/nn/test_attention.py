"""`SparseAttention` as a module among others: layers that are compiled one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import s2attn
from s2attn import Local, SparseAttention, Stride

LAYERS = 12  # more than the recompilations that torch allows


class Block(nn.Module):
    def __init__(self, layer: int, num_kv_heads: int) -> None:
        super().__init__()
        self.attend = SparseAttention(Local(1) | Stride(4), 4, num_kv_heads, layer=layer)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.attend(q, k, k)


@pytest.mark.parametrize(("num_kv_heads", "graphs"), [(4, 1), (2, 2), (1, 4)])
def test_layers_that_see_alike_share_their_compiled_code(num_kv_heads: int, graphs: int) -> None:
    """With fewer KV heads than residues each layer goes on where the last one stopped, so that some of them come again."""
    torch.compiler.reset()
    made = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        made.append(graph)
        return graph

    q, k = torch.randn(1, 512, 4, 16), torch.randn(1, 512, num_kv_heads, 16)
    seen = set()
    for layer in range(LAYERS):
        block = Block(layer, num_kv_heads)
        out = torch.compile(block, fullgraph=True, backend=count)(q, k)
        expected = s2attn.attention(q, k, k, block.attend.pattern, layer=layer)
        assert torch.equal(out, expected)
        seen.add(expected.sum().item())
    assert len(made) == graphs == len(seen)
    torch.compiler.reset()
