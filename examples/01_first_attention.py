"""Sparse attention gives the same numbers as dense attention with a mask, and the same gradients."""

import torch

import s2attn
from s2attn import Local, Stride

torch.manual_seed(0)
B, T, H, G, D = 1, 1024, 8, 2, 64
q = torch.randn(B, T, H, D, requires_grad=True)
k = torch.randn(B, T, G, D, requires_grad=True)
v = torch.randn(B, T, G, D, requires_grad=True)

# The last 4 blocks of 64 tokens, and every 8th block before them; which 8th depends on the KV head.
pattern = Local(4) | Stride(8)
out = s2attn.attention(q, k, v, pattern)
grads = torch.autograd.grad(out.square().sum(), (q, k, v))

# What it means, spelled out: a (heads, T, T) mask and torch's own dense attention.
mask = s2attn.build_layout(pattern, H, G, T).to_dense().repeat_interleave(H // G, dim=0)
heads_first = [x.transpose(1, 2) for x in (q, k, v)]
dense = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True).transpose(1, 2)
dense_grads = torch.autograd.grad(dense.square().sum(), (q, k, v))

torch.testing.assert_close(out, dense)
torch.testing.assert_close(grads, dense_grads, rtol=1e-4, atol=1e-4)

causal_pairs = H * T * (T + 1) // 2
print(f"{pattern}")
print(f"reads {mask.sum() / causal_pairs:.0%} of the causal pairs; largest difference to dense with a mask {(out - dense).abs().max():.1e}")
