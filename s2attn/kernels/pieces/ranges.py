"""Cutting lists into pieces on the device: each by itself, or all of them into equal ranges (`s2attn.schedule.stream_k`)."""

import triton
import triton.language as tl


@triton.jit
def cut(total, splits, least):
    """Pieces of an output of ``total`` key tiles, 1 to ``splits``, and the size of each but the last, ``least`` or more."""
    pieces = tl.minimum(tl.maximum(total // least, 1), splits)
    size = tl.maximum((total + pieces - 1) // pieces, 1)
    return tl.maximum((total + size - 1) // size, 1), size


@triton.jit
def range_begin(program, total, programs):
    """The first of ``total`` tiles that a program takes: ranges differ by one tile at most, the longer ones first."""
    most = (total + programs - 1) // programs
    longer = total - (most - 1) * programs
    return program * most - tl.maximum(program - longer, 0)


@triton.jit
def program_of(tile, total, programs):
    """Which program takes a tile."""
    most = (total + programs - 1) // programs
    longer = total - (most - 1) * programs
    in_long = longer * most
    late = longer + (tile - in_long) // tl.maximum(most - 1, 1)
    return tl.where(tile < in_long, tile // tl.maximum(most, 1), late)


@triton.jit
def find_output(ends_ptr, outputs, tile):
    """The output that holds a tile, from the running numbers of tiles of all outputs; ``outputs`` when there is none."""
    low = tl.zeros([], tl.int32)
    high = low + outputs
    while low < high:
        middle = (low + high) // 2
        passed = tl.load(ends_ptr + middle) <= tile
        low = tl.where(passed, middle + 1, low)
        high = tl.where(passed, high, middle)
    return low
