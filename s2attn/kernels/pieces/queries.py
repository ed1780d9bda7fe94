"""Which queries a program of the decode kernels has, found by arithmetic on the lengths: nothing is planned on the host.

Queries of a sequence are cut where their *positions* cross multiples of QUERIES, so that a tile lies in one row of a layout whose rows
are positions. Numbers that make no sense are clamped: lengths to 0 .. room, cumulative lengths to a rising walk inside the tokens.
"""

import triton
import triton.language as tl

EVEN = tl.constexpr(0)
"""Every sequence has ``q_len`` queries."""
PACKED = tl.constexpr(1)
"""Sequences have the queries that cumulative lengths say."""
LISTED = tl.constexpr(2)
"""The layout is packed itself, and its query blocks say which queries they hold."""

_AT_ONCE = tl.constexpr(128)


@triton.jit
def clamped(number, low, high):
    """An int32 between two bounds; the upper one wins."""
    return tl.minimum(tl.maximum(number.to(tl.int64), low), high).to(tl.int32)


@triton.jit
def first_tile(new, length, QUERIES: tl.constexpr):
    """Tile of the first of ``new`` queries that end at ``length``; and a shift, whole tiles, that keeps numbers from being negative."""
    shift = (new + QUERIES - 1) // QUERIES * QUERIES
    return (length - new + shift) // QUERIES, shift


@triton.jit
def tiles_of(new, length, QUERIES: tl.constexpr):
    """Tiles of a sequence of ``length`` tokens whose last ``new`` are queries (more than length: the first ones see nothing)."""
    first, shift = first_tile(new, length, QUERIES)
    return tl.where(new > 0, (length - 1 + shift) // QUERIES - first + 1, 0)


@triton.jit
def find_sequence(tile, cu_ptr, lens_ptr, batch, tokens, room, QUERIES: tl.constexpr):
    """The sequence of a tile among packed ones, and its number in that sequence; ``batch`` when there is no such tile."""
    sequence = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.int32)
    for low in range(0, batch, _AT_ONCE):
        number = low + tl.arange(0, _AT_ONCE)
        known = number < batch
        begin = clamped(tl.load(cu_ptr + number, mask=known, other=0), 0, tokens)
        end = tl.maximum(clamped(tl.load(cu_ptr + number + 1, mask=known, other=0), 0, tokens), begin)
        length = clamped(tl.load(lens_ptr + number, mask=known, other=0), 0, room)
        count = tl.where(known, tiles_of(end - begin, length, QUERIES), 0)
        passed = known & (total + tl.cumsum(count, 0) <= tile)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, count, 0), 0)
        total += tl.sum(count, 0)
    return sequence, tile - before


@triton.jit
def find_queries(tile, lengths, batch, tokens, room, q_len, per, QUERIES: tl.constexpr, RB: tl.constexpr, MODE: tl.constexpr):
    """The queries of a tile.

    Args:
        lengths: three pointers: tokens and cumulative queries of the sequences, and for LISTED the ``(3, blocks)`` starts, lengths and
            sequences of query blocks.
        room: tokens that a line of the block table has room for.
        q_len, per: EVEN: queries of each sequence, and tiles kept for it; LISTED: per is the number of query blocks.

    Returns:
        sequence, first query token, how many (0: there is no such tile), their row in the layout (-1: they see nothing), the place of
        the first in its row, and the number of keys of the sequence.
    """
    lens_ptr, cu_ptr, spans_ptr = lengths
    if MODE == LISTED:
        row = tile // (RB // QUERIES)
        place = tile % (RB // QUERIES) * QUERIES
        sequence = tl.load(spans_ptr + 2 * per + row)
        token = tl.load(spans_ptr + row) + place
        count = tl.minimum(tl.load(spans_ptr + per + row) - place, QUERIES)
        count = tl.where((sequence >= 0) & (sequence < batch) & (token >= 0), tl.minimum(count, tokens - token), 0)
        sequence = clamped(sequence, 0, batch - 1)
        length = clamped(tl.load(lens_ptr + sequence), 0, room)
        return sequence, token, tl.maximum(count, 0), row, place, length
    else:
        if MODE == PACKED:
            sequence, inside = find_sequence(tile, cu_ptr, lens_ptr, batch, tokens, room, QUERIES)
            exists = sequence < batch
            sequence = tl.minimum(sequence, batch - 1)
            begin = clamped(tl.load(cu_ptr + sequence), 0, tokens)
            new = tl.maximum(clamped(tl.load(cu_ptr + sequence + 1), 0, tokens), begin) - begin
        else:
            sequence, inside = tile // per, tile % per
            exists = sequence < batch
            begin, new = sequence * q_len, q_len
        length = clamped(tl.load(lens_ptr + sequence), 0, room)
        exists = exists & (inside < tiles_of(new, length, QUERIES))
        first, shift = first_tile(new, length, QUERIES)
        corner = (first + inside) * QUERIES - shift
        low = tl.maximum(corner, length - new)
        count = tl.where(exists, tl.minimum(corner + QUERIES, length) - low, 0)
        # The number of rows is looked at where the list is: a layout may be shorter than the table.
        row = tl.where(low >= 0, tl.maximum(low, 0) // RB, -1)
        return sequence, begin + low - (length - new), count, row, tl.maximum(low, 0) % RB, length
