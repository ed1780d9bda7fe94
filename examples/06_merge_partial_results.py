"""Attention over parts of the keys, joined into attention over all of them: the identity under every way to split the work."""

import torch

import s2attn
from s2attn import Dense, Layout

torch.manual_seed(0)
q, k, v = (torch.randn(1, 256, heads, 32, requires_grad=True) for heads in (4, 2, 2))

# Split the keys by position modulo 3: any disjoint parts will do.
parts = []
for residue in range(3):
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[:, residue::3] = True
    parts.append(s2attn.attention(q, k, v, Layout.from_dense(mask.tril()), return_lse=True))

out, lse = s2attn.merge(parts)
whole, whole_lse = s2attn.attention(q, k, v, Dense(), return_lse=True)
torch.testing.assert_close(out, whole)
torch.testing.assert_close(lse, whole_lse)

# The order does not matter, and a part that saw nothing changes nothing.
nothing = (torch.zeros_like(out), torch.full_like(lse, -torch.inf))
again, _ = s2attn.merge([parts[2], nothing, parts[0], parts[1]])
torch.testing.assert_close(again, whole)

# Gradients flow through the parts, their lse included.
joined = torch.autograd.grad(out.square().sum(), (q, k, v))
direct = torch.autograd.grad(whole.square().sum(), (q, k, v))
torch.testing.assert_close(joined, direct, rtol=1e-4, atol=1e-4)
print("three parts merged: the same output, lse and gradients as attention over all keys")
