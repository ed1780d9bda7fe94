"""The causal cut for every distance of queries from keys, by every way to a layout: S - T = block - 2 is where full ends."""

from __future__ import annotations

import pytest
import torch

from s2attn import Dense, Local
from s2attn.layout import Layout, build_layout, from_block_table, from_blocks

BLOCK, T = 16, 40


def whole_blocks(seqlen_k: int) -> torch.Tensor:
    return torch.ones(1, -(-T // BLOCK), -(-seqlen_k // BLOCK), dtype=torch.bool)


def table(seqlen_k: int, causal: bool) -> Layout:
    chosen = whole_blocks(seqlen_k)
    blocks = torch.arange(chosen.shape[2], dtype=torch.int32).expand(chosen.shape)
    counts = torch.full(chosen.shape[:2], chosen.shape[2], dtype=torch.int32)
    return from_block_table(blocks.contiguous(), counts, seqlen_q=T, seqlen_k=seqlen_k, block=BLOCK, causal=causal)


WAYS = {
    "pattern": lambda s, causal: build_layout(Dense(), 1, 1, T, s, block=BLOCK, causal=causal),
    "blocks of a pattern": lambda s, causal: build_layout(Dense() | Local(2, block=BLOCK), 1, 1, T, s, block=BLOCK, causal=causal),
    "chosen": lambda s, causal: from_blocks([whole_blocks(s)], [(T, s)], block=BLOCK, causal=causal),
    "table": table,
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_distance(way, causal):
    for seqlen_k in range(T - BLOCK - 2, T + 2 * BLOCK + 3):
        query, key = torch.arange(T)[:, None], torch.arange(seqlen_k)
        expected = (key <= query + seqlen_k - T) if causal else torch.ones(T, seqlen_k, dtype=torch.bool)
        layout = WAYS[way](seqlen_k, causal)
        assert torch.equal(layout.validate().to_dense()[0], expected), f"S - T = {seqlen_k - T}"
        # A block is full exactly where every pair of it is allowed, and all of its keys exist.
        exact = Layout.from_dense(expected, block=BLOCK)
        assert torch.equal(layout.rows.full[0], exact.rows.full[0]), f"S - T = {seqlen_k - T}"
