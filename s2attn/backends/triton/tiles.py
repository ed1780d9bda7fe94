"""Which tiles a kernel uses: a pure function of widths, block and what the device has, never of its name."""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST = 16  # rows and columns that a tensor core product needs
SHARED_MEMORY = {
    "sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536,
}  # fmt: skip
"""Bytes of shared memory one program can have, by target; a launch asks the device itself, compile checks ask this table."""


FORMS = ("plain", "specialised", "hopper")
"""Plain Triton; Triton in the narrow form that its compiler cuts into warp groups; Gluon for Hopper."""


@dataclass(frozen=True)
class Tiles:
    """Tokens of a tile on the lines' axis and on the listed axis, warps, and stages of the software pipeline.

    ``key_range`` cuts the lists of forward and dq where they cross a multiple of so many keys, and takes range by range, so that K and V
    of one range stay in the second-level cache; 0 does not. ``form`` is one of `FORMS`: "plain", or another kernel whose tiles are its own
    wherever it can serve ("specialised": `s2attn.backends.triton.specialised`; "hopper": `s2attn.backends.triton.hopper`); where it
    cannot, the plain one with these. ``cut`` is how "decode" cuts lists, one of `s2attn.schedule.CUTS`; empty, the shape of the call says.
    """

    line_tokens: int
    listed_tokens: int
    num_warps: int
    num_stages: int
    key_range: int = 0
    form: str = "plain"
    cut: str = ""

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
    onward = op in ("forward", "decode")
    lines = tiles.line_tokens * (next_power(dim) if onward else wide) * itemsize
    listed = tiles.listed_tokens * wide * itemsize
    scratch = tiles.line_tokens * tiles.listed_tokens * itemsize * (1 if onward else 2)
    return lines + tiles.num_stages * listed + scratch


WIDE_MEMORY = 200_000
"""Devices with at least this much shared memory per program also have wide matrix units, which want taller tiles."""


def choose_tiles(op: str, dim: int, dim_v: int, itemsize: int, block: int, shared_limit: int, capped: bool = False) -> Tiles:
    """The tiles for ``op`` ("forward", "dq", "dkv" or "decode"): preferred ones that do not spill registers, made smaller until they fit.

    ``capped``: with a soft-cap, whose arithmetic needs registers too.

    >>> choose_tiles("forward", 128, 128, 2, 64, 232448)
    Tiles(line_tokens=64, listed_tokens=64, num_warps=4, num_stages=3, key_range=0, form='plain', cut='')
    """
    wanted = _preferred(op, (next_power(dim), next_power(dim_v)), itemsize, block, shared_limit, capped)
    line_tokens, listed_tokens = wanted.line_tokens, wanted.listed_tokens
    while True:
        for stages in range(wanted.num_stages, 0, -1):
            tiles = Tiles(line_tokens, listed_tokens, wanted.num_warps, stages)
            if shared_bytes(op, tiles, dim, dim_v, itemsize) <= shared_limit:
                return tiles
        if line_tokens == listed_tokens == SMALLEST:
            raise ValueError(f"shared_limit must hold one tile of {SMALLEST} x {SMALLEST} tokens; got {shared_limit}")
        if listed_tokens > SMALLEST and listed_tokens >= line_tokens // 2:
            listed_tokens //= 2
        else:
            line_tokens //= 2


def _preferred(op: str, widths: tuple[int, int], itemsize: int, block: int, shared_limit: int, capped: bool) -> Tiles:
    """What compiles without spills at widths 64 and 128 (`tests/compile`)."""
    large, wide = shared_limit >= WIDE_MEMORY, max(widths)
    if op == "decode":
        # Rows of a tile at most. Every listed key lies somewhere else, so addresses need registers, and latency wants many programs.
        if itemsize > 2:
            return Tiles(16, 16, 4, 3)
        return Tiles(32, 32, 4, 4 if large else 3) if wide <= 128 else Tiles(16, 32, 8, 3)
    if op == "dkv" and wide > 128 and itemsize == 2 and block >= 32 and shared_limit > SHARED_MEMORY["sm_75"]:
        return Tiles(32, 32, 8, 3)  # 16 lines and 4 warps, as for the others, spill
    if shared_limit <= SHARED_MEMORY["sm_75"] or itemsize > 2 or wide > 128:
        # Products on ordinary units, or rows too wide for the registers: small tiles.
        if itemsize > 2 and block < 32:
            return Tiles(32, 16, 4, 2) if wide <= 128 else Tiles(16, 16, 8, 2)
        return Tiles(32 if wide <= 128 else 16, 32, 4, 3)
    gathered = block < 64  # a token number per lane needs registers too
    if op == "dkv":
        if wide > 64:
            few = capped or (large and block != 64) or (not large and min(widths) < wide)
            return Tiles(64, 16 if few else 32, 8, 2 if large else 3)
        if large:
            return Tiles(64, 32, 8, 2) if gathered else Tiles(64, 64, 8, 3)
        return Tiles(32, 32 if gathered else 64, 4, 2)
    if op == "dq":
        roomy = wide <= 64 or (block == 64 and not capped)
        return Tiles(64, 64, 4, 3) if roomy else Tiles(64, 32, 4, 2 if gathered else 3)
    if large and block >= 128:
        return Tiles(128, 64, 8, 3)
    return Tiles(64, 64 if wide <= 64 or (large and not gathered) else 32, 4, 3)
