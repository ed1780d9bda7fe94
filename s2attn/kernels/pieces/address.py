"""Where listed tokens lie: positions in a list of blocks become token numbers, and these become addresses.

A set of tokens is a first token (a scalar, int64) and one offset from it per lane. A tile inside one block needs a single scalar
look-up, and its lanes' offsets never change; only tiles made of several small blocks gather a token number per lane.

Rows of a tensor for one batch entry and head are a tuple ``(base pointer, stride of tokens, stride of columns)``.
"""

import triton
import triton.language as tl


@triton.jit
def listed_tokens(listed, at, blocks, RB: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens ``at .. at + WIDTH - 1`` of the listed blocks written one after another.

    Args:
        listed: first entry of the list, and the first token and the number of tokens of each block: three pointers.
        at: position in the list, in tokens; a multiple of WIDTH where a tile lies in one block.
        blocks: entries of the list that may be read.

    Returns:
        first token (scalar), offset of each lane from it, whether its token exists, its entry, and its place inside the block; entry is
        a scalar when the tile lies in one block.
    """
    idx_ptr, start_ptr, length_ptr = listed
    lane = tl.arange(0, WIDTH)
    if RB >= WIDTH:
        entry = at // RB
        block = tl.load(idx_ptr + entry)
        skipped = at % RB
        first = tl.load(start_ptr + block).to(tl.int64) + skipped
        return first, lane, lane < tl.load(length_ptr + block) - skipped, entry, skipped + lane
    else:
        entry = (at + lane) // RB
        inside = (at + lane) % RB
        known = entry < blocks
        block = tl.load(idx_ptr + entry, mask=known, other=0)
        token = tl.load(start_ptr + block).to(tl.int64) + inside
        return tl.zeros([], tl.int64), token, known & (inside < tl.load(length_ptr + block)), entry, inside


@triton.jit
def load_rows(rows, first, offset, exists, BLOCK_D: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr = True):
    """The rows of some tokens, ``[lanes, BLOCK_D]``; zero where a token or a column does not exist.

    Without MASKED every token is known to exist.
    """
    base_ptr, stride_token, stride_dim = rows
    d = tl.arange(0, BLOCK_D)
    pointers = base_ptr + first * stride_token + (offset.to(tl.int64)[:, None] * stride_token + d[None, :] * stride_dim)
    if MASKED:
        if D == BLOCK_D:
            return tl.load(pointers, mask=exists[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=exists[:, None] & (d[None, :] < D), other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(d[None, :] < D) & (offset[:, None] >= 0), other=0.0)


@triton.jit
def store_rows(base_ptr, first, offset, exists, stride_token, values, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Write the rows of some tokens, ``[lanes, BLOCK_D]`` with adjacent columns, where token and column exist."""
    d = tl.arange(0, BLOCK_D)
    pointers = base_ptr + first * stride_token + (offset.to(tl.int64)[:, None] * stride_token + d[None, :])
    if D == BLOCK_D:
        tl.store(pointers, values.to(base_ptr.dtype.element_ty), mask=exists[:, None])
    else:
        tl.store(pointers, values.to(base_ptr.dtype.element_ty), mask=exists[:, None] & (d[None, :] < D))
