"""Keys and values that lie in pages: found through a block table whose numbers are never trusted, and read in the dtype of the queries."""

import triton
import triton.language as tl


@triton.jit
def from_float8(tile, like):
    """Numbers of the dtype of ``like``; bytes are float8_e4m3fn, spelled out for devices (and the interpreter) that do not know it."""
    if tile.dtype == tl.uint8:
        size = (tile & 0x7F).to(tl.uint16)
        # The same exponent and mantissa as a float16 mean 2 ** -8 of it; that holds for subnormal numbers too.
        bits = ((tile & 0x80).to(tl.uint16) << 8) | (size << 7)
        number = bits.to(tl.float16, bitcast=True) * 256.0
        return tl.where(size == 0x7F, float("nan"), number).to(like.dtype)
    else:
        return tile.to(like.dtype)


@triton.jit
def to_float8(numbers):
    """float32 to float8_e4m3fn as bytes: to the nearest, ties to even; beyond 448 the largest number, NaN stays."""
    size = tl.minimum(tl.abs(numbers), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    usual = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below the smallest normal number the steps are 2 ** -9: added to 2 ** 23, a float32 keeps no smaller ones.
    small = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    byte = tl.where(size < 0.015625, small, usual)
    byte = tl.where(numbers != numbers, 0x7F, byte)
    sign = (numbers.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (byte | sign).to(tl.uint8)


@triton.jit
def find_pages(table, first, key, exists, PAGE: tl.constexpr, WIDTH: tl.constexpr, ONE: tl.constexpr):
    """Where WIDTH keys of a sequence lie.

    Args:
        table: a sequence's line: pointer, stride of its entries, their number, and the number of pages that there are.
        first, key: position of the first key, and of each.
        exists: whether it is wanted.
        ONE: the keys lie in one page, one after another.

    Returns:
        page (int64; a scalar where ONE), place inside it, and whether the key is wanted and its page is there.
    """
    line_ptr, stride, entries, num_pages = table
    if ONE:
        number = first // PAGE
        page = tl.load(line_ptr + number.to(tl.int64) * stride, mask=number < entries, other=-1).to(tl.int64)
        place = first % PAGE + tl.arange(0, WIDTH)
    else:
        number = key // PAGE
        page = tl.load(line_ptr + number.to(tl.int64) * stride, mask=exists & (number < entries), other=-1).to(tl.int64)
        place = key % PAGE
    there = (page >= 0) & (page < num_pages)
    return tl.where(there, page, 0), place, exists & there


@triton.jit
def load_paged(rows, page, place, exists, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Rows of some keys, ``[keys, BLOCK_D]``; zero where a key or a column does not exist.

    ``rows``: pointer to the head's part of the cache, and the strides of pages, of places in a page, and of columns.
    """
    base_ptr, stride_page, stride_place, stride_dim = rows
    d = tl.arange(0, BLOCK_D)
    # One address per key, and then columns: fewer registers than an offset for every number.
    first = base_ptr + page * stride_page + place.to(tl.int64) * stride_place
    pointers = first[:, None] + (d * stride_dim)[None, :]
    if D == BLOCK_D:
        return tl.load(pointers, mask=exists[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=exists[:, None] & (d[None, :] < D), other=0.0)
