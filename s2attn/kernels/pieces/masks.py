"""Which pairs of a tile are allowed, read from the codes of its sub-blocks and the table of mask tiles."""

import triton
import triton.language as tl

FULL = tl.constexpr(-1)


@triton.jit
def allowed_pairs(
    sub_ptr, tiles_ptr, entry, inside, place, exists,
    F: tl.constexpr, RB: tl.constexpr, WIDTH: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Whether each (line token, listed token) pair is allowed, ``[lines, listed]``.

    Args:
        sub_ptr: codes of the list's other entries, F per entry: -1 seen in full, -2 absent, or a mask tile.
        tiles_ptr: mask tiles ``[tile, query, key]`` as bytes.
        entry, inside, exists: entry, place in its block, and existence of each of the WIDTH listed tokens.
        place: place of each line token in its line (of F blocks).
        BY_COLUMN: the lines are keys and the listed tokens queries, so a tile is read across.
    """
    if BY_COLUMN:
        pair = inside[None, :] * RB + (place % RB)[:, None]
    else:
        pair = (place % RB)[:, None] * RB + inside[None, :]
    if F == 1 and RB >= WIDTH:
        # One block against one: the entry is partial, and its tile a scalar.
        code = tl.load(sub_ptr + entry).to(tl.int64)
        return exists[None, :] & (tl.load(tiles_ptr + code * (RB * RB) + pair) != 0)
    else:
        codes = sub_ptr + (tl.zeros([WIDTH], tl.int32) + entry)[None, :] * F + (place // RB)[:, None]
        code = tl.load(codes, mask=exists[None, :], other=-2)
        bit = tl.load(tiles_ptr + code.to(tl.int64) * (RB * RB) + pair, mask=code >= 0, other=0)
        return exists[None, :] & ((code == FULL) | (bit != 0))
