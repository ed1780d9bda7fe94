"""Launches of the kernels that estimate the mass of blocks: as many rows of as many heads at a time as the workspace holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.backends.base import Reduction, Scoring
from s2attn.backends.triton.launch import factors
from s2attn.backends.triton.start import on_device
from s2attn.backends.triton.tiles import SMALLEST, next_power

AT_ONCE = 1 << 26
"""Sums over pieces that are in memory together: 256 MiB of float32."""
ROWS, WIDTH = 16, 256
"""Reduced rows, and pieces, that one program of the two small kernels takes."""


@dataclass(frozen=True)
class ScoreTiles:
    """The tile of the product: reduced rows, reduced columns, columns of q and k per step, warps, and stages of the pipeline."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def choose_score_tiles(dim: int, itemsize: int, shared_limit: int) -> ScoreTiles:
    """The largest tile whose stages fit, as for a matrix product; float32 multiplies on ordinary units and takes a small one.

    >>> choose_score_tiles(128, 2, 232448)
    ScoreTiles(rows=128, columns=128, depth=32, num_warps=8, num_stages=4)
    """
    small = itemsize > 2 or shared_limit <= 65536
    rows, warps = (32, 4) if small else (128, 8)
    depth = min(32, next_power(dim))  # twice as much spills on sm_100
    for stages in (4, 3, 2, 1):
        if stages * 2 * rows * depth * itemsize <= shared_limit - 4 * rows * rows:  # the sums over pieces pass through it too
            return ScoreTiles(rows, rows, depth, warps, stages)
    return ScoreTiles(SMALLEST, SMALLEST, SMALLEST, 4, 1)


def antidiagonal(q: Tensor, k: Tensor, reduction: Reduction, tiles: ScoreTiles) -> Tensor:
    """Block mass ``(B, H, query blocks, key blocks)`` float32 of tensors that are not empty."""
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    blocks = -(-seqlen_q // reduction.block), -(-seqlen_k // reduction.block)
    mass = torch.empty(batch, heads, *blocks, dtype=torch.float32, device=q.device)
    pieces = -(-seqlen_k // (reduction.stride * piece_groups(reduction.stride, reduction.block, tiles)))
    with on_device(q):
        for b in range(batch):
            for part in _parts(heads, blocks[0], reduction, seqlen_q, pieces, heads // k.shape[2]):
                _launch(q[b], k[b], mass[b], reduction, tiles, part)
    return mass


@dataclass(frozen=True)
class _Part:
    """Heads ``heads[0] .. heads[1] - 1`` and reduced rows ``rows[0] .. rows[1] - 1``, with ``pieces`` sums each."""

    heads: tuple[int, int]
    rows: tuple[int, int]
    pieces: int


def piece_groups(stride: int, block: int, tiles: ScoreTiles) -> int:
    """Key groups of a piece: those of a key block, or as many of them as a tile is wide."""
    return min(block // stride, tiles.columns)


def _parts(heads: int, query_blocks: int, reduction: Reduction, seqlen_q: int, pieces: int, group: int) -> Iterator[_Part]:
    """Whole groups of heads where they fit, else blocks of rows of one head."""
    per_block, rows = reduction.block // reduction.stride, -(-seqlen_q // reduction.stride)
    together = AT_ONCE // (rows * pieces)
    heads_at_once = max(together // group * group, 1 if together < group else group)
    blocks_at_once = query_blocks if together else max(AT_ONCE // (per_block * pieces), 1)
    for head in range(0, heads, heads_at_once):
        for block in range(0, query_blocks, blocks_at_once):
            some = block * per_block, min((block + blocks_at_once) * per_block, rows)
            yield _Part((head, min(head + heads_at_once, heads)), some, pieces)


def _launch(q: Tensor, k: Tensor, mass: Tensor, reduction: Reduction, tiles: ScoreTiles, part: _Part) -> None:
    """One sample: ``q (T, H, D)``, ``k (S, G, D)``, ``mass (H, query blocks, key blocks)``."""
    from s2attn.kernels.score import mass_kernel, piece_kernel, row_kernel

    first_head, end_head = part.heads
    first_row, end_row = part.rows
    heads, rows, group = end_head - first_head, end_row - first_row, q.shape[1] // k.shape[1]
    piece = piece_groups(reduction.stride, reduction.block, tiles)
    per_block = reduction.block // reduction.stride
    sums = torch.empty(heads, rows, part.pieces, dtype=torch.float32, device=q.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=q.device)
    # A part holds whole groups of heads, or a single head: counted from its own first one, head h reads KV head h // group.
    of_head, of_group = q[:, first_head:end_head], k[:, first_head // group :]
    span = (first_row, end_row, min(reduction.reach(q.shape[0], k.shape[0]), 1 << 29))
    squares = -(-rows // tiles.rows) * -(-part.pieces * piece // tiles.columns)
    piece_kernel[squares, heads](
        of_head, of_group, sums, *factors(Scoring(reduction.scale, reduction.softcap)),
        *span, q.shape[0], k.shape[0], group, part.pieces, *of_head.stride(), *of_group.stride(),
        D=q.shape[2], BLOCK_D=tiles.depth, STRIDE=reduction.stride, PIECE=piece, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
        CAPPED=reduction.softcap is not None, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    row_kernel[-(-rows // ROWS), heads](sums, lse, *span, part.pieces, PIECE=piece, ROWS=ROWS, WIDTH=WIDTH)
    first_block, blocks = first_row // per_block, -(-rows // per_block)
    target = mass[first_head:end_head, first_block : first_block + blocks]
    grid = blocks, heads, -(-part.pieces // WIDTH)
    mass_kernel[grid](
        sums, lse, target, target.stride(0), *span, part.pieces, mass.shape[2],
        PER_BLOCK=per_block, PIECE=piece, ROWS=ROWS, WIDTH=WIDTH,
    )  # fmt: skip
