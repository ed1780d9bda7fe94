"""Which tiles a kernel uses: a pure function of widths, block and what the device has, never of its name."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST = 16  # rows and columns that a tensor core product needs
SHARED_MEMORY = {"sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
"""Bytes of shared memory one program can have, by target; a launch asks the device itself, compile checks ask this table."""


@dataclass(frozen=True)
class Tiles:
    """Tokens of a tile on the lines' axis and on the listed axis, warps, and stages of the software pipeline."""

    line_tokens: int
    listed_tokens: int
    num_warps: int
    num_stages: int

    def factor(self, block: int) -> int:
        """Blocks of the lines' axis that share a tile."""
        return max(1, self.line_tokens // block)

    def per_block(self, block: int) -> int:
        """Tiles in one block of the lines' axis."""
        return max(1, block // self.line_tokens)


def next_power(width: int) -> int:
    """The power of two, at least 16, that holds a head width.

    >>> [next_power(n) for n in (1, 16, 48, 128, 192)]
    [16, 16, 64, 128, 256]
    """
    return max(SMALLEST, 1 << (width - 1).bit_length())


def shared_bytes(op: str, tiles: Tiles, dim: int, dim_v: int, itemsize: int) -> int:
    """Shared memory that a kernel asks for, from above: operands of the lines, and stages of listed ones."""
    wide = next_power(dim) + next_power(dim_v)
    lines = tiles.line_tokens * (next_power(dim) if op == "forward" else wide) * itemsize
    listed = tiles.listed_tokens * wide * itemsize
    scratch = tiles.line_tokens * tiles.listed_tokens * itemsize * (1 if op == "forward" else 2)
    return lines + tiles.num_stages * listed + scratch


def choose_tiles(op: str, dim: int, dim_v: int, itemsize: int, block: int, shared_limit: int) -> Tiles:
    """The tiles for ``op`` ("forward", "dq" or "dkv"): the widest of a short list that fits into the shared memory.

    >>> choose_tiles("forward", 128, 128, 2, 64, 232448)
    Tiles(line_tokens=64, listed_tokens=64, num_warps=4, num_stages=3)
    """
    wide = max(next_power(dim), next_power(dim_v))
    tall = 128 if block >= 128 and wide <= 128 and itemsize == 2 and op == "forward" else 64
    if wide > 128 or itemsize > 2:
        tall = 32 if wide > 128 and itemsize > 2 else tall
    fallbacks = [(tall, 64), (64, 32), (32, 32), (32, 16), (16, 16)]
    for line_tokens, listed_tokens in fallbacks:
        for stages in (3, 2, 1):
            warps = 8 if line_tokens >= 128 or (wide > 128 and line_tokens >= 64) else 4
            tiles = Tiles(line_tokens, listed_tokens, warps, stages)
            if shared_bytes(op, tiles, dim, dim_v, itemsize) <= shared_limit:
                return tiles
    raise ValueError(f"shared_limit must hold one tile of {SMALLEST} x {SMALLEST} tokens; got {shared_limit}")
