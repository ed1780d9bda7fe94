"""Autocast over ranks: float32 queries and keys with bfloat16 values, as rotary embeddings leave them."""

from __future__ import annotations

import torch
import torch.distributed as dist

import s2attn
from s2attn import Local, Stride
from s2attn.distributed.context import context_attention
from s2attn.distributed.ulysses import ulysses_attention
from s2attn.testing.ranks import run_here, run_ranks, values

S2 = Local(1) | Stride(2)
WAYS = ("ulysses", "all-gather", "exchange", "ring")


def mixed() -> dict[str, bool]:
    """For each way, whether out is that of the cast tensors, and gradients come back in the dtypes that were given."""
    rank, found = dist.get_rank(), {}
    for way in WAYS:
        q, k, v = (torch.randn(1, 256, h, 16, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
        mine = slice(128 * rank, 128 * rank + 128)
        parts = [q[:, mine].clone(), k[:, mine].clone(), v[:, mine].bfloat16()]
        q_r, k_r, v_r = (x.requires_grad_() for x in parts)
        with torch.autocast("cpu", torch.bfloat16):
            if way == "ulysses":
                out = ulysses_attention(q_r, k_r, v_r, S2)
            else:
                out = context_attention(q_r, k_r, v_r, S2, way=way)
        expected = s2attn.attention(*(x.bfloat16() for x in (q, k, v)), S2)[:, mine]
        out.float().sum().backward()
        alike = out.dtype == torch.bfloat16 and torch.allclose(out, expected, rtol=2e-2, atol=2e-2)
        found[way] = alike and all(x.grad.dtype == x.dtype and bool(x.grad.any()) for x in parts)
    return found


def test_mixed_dtypes_are_cast_on_every_rank():
    assert values(run_ranks(__file__, "mixed", 2)) == [dict.fromkeys(WAYS, True)] * 2


if __name__ == "__main__":
    run_here(globals())
