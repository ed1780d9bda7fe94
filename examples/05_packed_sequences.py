"""Sequences of different lengths, one after another without padding, give what each would give alone; gradients too."""

from itertools import pairwise

import torch

import s2attn
from s2attn import Local, Stride

torch.manual_seed(0)
lengths = [300, 45, 700]
cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
q, k, v = (torch.randn(sum(lengths), heads, 32, requires_grad=True) for heads in (8, 2, 2))
pattern = Local(2) | Stride(4)

out = s2attn.attention(q, k, v, pattern, cu_seqlens_q=cu, cu_seqlens_k=cu)
packed_grads = torch.autograd.grad(out.square().sum(), (q, k, v))

cuts = [slice(lo, hi) for lo, hi in pairwise(cu.tolist())]
alone = torch.cat([s2attn.attention(q[None, cut], k[None, cut], v[None, cut], pattern)[0] for cut in cuts])
alone_grads = torch.autograd.grad(alone.square().sum(), (q, k, v))

torch.testing.assert_close(out, alone)
torch.testing.assert_close(packed_grads, alone_grads, rtol=1e-4, atol=1e-4)
print(f"{len(lengths)} sequences, {sum(lengths)} tokens, no padding; padded they would be {len(lengths) * max(lengths)} tokens")
