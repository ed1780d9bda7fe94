"""Soft-caps that float32 cannot divide by or multiply with are refused, by every op that takes one."""

from __future__ import annotations

import pytest
import torch

import s2attn
from s2attn import Dense


@pytest.mark.parametrize("softcap", [1e308, 1.1e30, 9e-31, 5e-324])
def test_softcaps_beyond_float32(softcap: float) -> None:
    x, pages = torch.randn(1, 5, 2, 16), torch.randn(1, 16, 2, 16)
    where = {"block_table": torch.zeros(1, 1, dtype=torch.int32), "seq_lens": torch.tensor([5])}
    for call in (
        lambda: s2attn.attention(x, x, x, Dense(), softcap=softcap),
        lambda: s2attn.decode(x, pages, pages, Dense(), **where, softcap=softcap),
        lambda: s2attn.SparseAttention(Dense(), 2, softcap=softcap),
    ):
        with pytest.raises(ValueError, match="softcap must be from 1e-30 to 1e30; got"):
            call()
