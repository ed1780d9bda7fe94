"""Block mass from strided antidiagonals: a matrix product on the reduced grid, of which only sums over blocks are kept.

Three kernels, so that no logit is made twice and nothing waits for its neighbours: `piece_kernel` leaves, for each reduced row, one number
for each piece of a key block; `row_kernel` makes the denominator of each row of them; `mass_kernel` sums what is left over the rows of a
block. What the numbers mean is said in `s2attn.ops.antidiagonal`.
"""

import triton
import triton.language as tl

from s2attn.kernels.pieces.scores import log2_logits
from s2attn.kernels.pieces.softmax import rescaled


@triton.jit
def _square_of(number, rows, columns, HEIGHT: tl.constexpr):
    """Tile (row, column) of a program: HEIGHT rows of tiles are walked together, column by column, for the second-level cache."""
    band = number // (HEIGHT * columns)
    height = tl.minimum(rows - band * HEIGHT, HEIGHT)
    inside = number % (HEIGHT * columns)
    return band * HEIGHT + inside % height, inside // height


@triton.jit
def log2_total(shift, total):
    """``shift + log2(total)``; -inf where the total is 0."""
    return tl.where(total == 0.0, float("-inf"), shift + tl.log2(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def group_rows(base_ptr, token, exists, first, stride_token, stride_dim, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D columns from ``first`` on of some tokens; zero where a token or a column does not exist."""
    part = first + tl.arange(0, BLOCK_D)
    at = base_ptr + token.to(tl.int64)[:, None] * stride_token + part[None, :] * stride_dim
    if D % BLOCK_D == 0:
        return tl.load(at, mask=exists[:, None], other=0.0)
    else:
        return tl.load(at, mask=exists[:, None] & (part < D)[None, :], other=0.0)


@triton.jit
def piece_sums(logits_log2, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``log2`` of the sum of ``2 ** logit`` over each PIECE columns, ``[BLOCK_M, BLOCK_N // PIECE]``; -inf where all of them are."""
    if PIECE == 1:
        return logits_log2
    else:
        parts = tl.reshape(logits_log2, [BLOCK_M, BLOCK_N // PIECE, PIECE])
        top = tl.max(parts, 2)
        shift = tl.where(top == float("-inf"), 0.0, top)
        return log2_total(shift, tl.sum(tl.exp2(parts - shift[:, :, None]), 2))


@triton.jit(do_not_specialize=["first_row", "end_row", "reach", "seqlen_q", "seqlen_k", "group", "pieces"])
def piece_kernel(
    q_ptr, k_ptr, sums_ptr, factor, cap_log2,
    first_row: tl.int32, end_row: tl.int32, reach: tl.int32, seqlen_q: tl.int32, seqlen_k: tl.int32, group: tl.int32, pieces: tl.int32,
    q_token: tl.int64, q_head: tl.int64, q_dim, k_token: tl.int64, k_head: tl.int64, k_dim,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Sums over pieces of PIECE key groups for query groups ``first_row .. end_row - 1``; grid ``(tiles, heads)``.

    ``sums (heads, end_row - first_row, pieces)`` float32 is written in every tile that holds a pair which is seen, and nowhere else.
    ``factor`` is for the sum of products over an antidiagonal of one pair; the mean is taken here.
    """
    columns = tl.cdiv(pieces * PIECE, BLOCK_N)
    tile_row, tile_column = _square_of(tl.program_id(0), tl.cdiv(end_row - first_row, BLOCK_M), columns, 8)
    row = first_row + tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    last = tl.minimum(first_row + tile_row * BLOCK_M + BLOCK_M, end_row) - 1
    if tile_column * BLOCK_N > last + reach:
        return
    head = tl.program_id(1).to(tl.int64)
    queries, keys = q_ptr + head * q_head, k_ptr + head // group * k_head
    # Tokens of each group: all of them, or those that are left at the end; none beyond.
    height = tl.minimum(tl.maximum(seqlen_q - row * STRIDE, 0), STRIDE)
    width = tl.minimum(tl.maximum(seqlen_k - column * STRIDE, 0), STRIDE)
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(STRIDE * tl.cdiv(D, BLOCK_D)):
        s, first = step // tl.cdiv(D, BLOCK_D), step % tl.cdiv(D, BLOCK_D) * BLOCK_D
        q_tile = group_rows(queries, row * STRIDE + height - 1 - s, s < height, first, q_token, q_dim, D, BLOCK_D)
        k_tile = group_rows(keys, column * STRIDE + s, s < width, first, k_token, k_dim, D, BLOCK_D)
        products = tl.dot(q_tile, tl.trans(k_tile), products, input_precision="ieee")
    # One over the number of pairs, which is the smaller of both.
    per_row, per_column = 1.0 / tl.maximum(height, 1).to(tl.float32), 1.0 / tl.maximum(width, 1).to(tl.float32)
    logits = log2_logits(products * tl.maximum(per_row[:, None], per_column[None, :]), factor, cap_log2, CAPPED)
    seen = (column[None, :] <= row[:, None] + reach) & (width > 0)[None, :]
    sums = piece_sums(tl.where(seen, logits, float("-inf")), PIECE, BLOCK_M, BLOCK_N)
    piece = tile_column * (BLOCK_N // PIECE) + tl.arange(0, BLOCK_N // PIECE)
    rows = sums_ptr + (head * (end_row - first_row) + (row - first_row))[:, None] * pieces
    tl.store(rows + piece[None, :], sums, mask=(row < end_row)[:, None] & (piece < pieces)[None, :])


@triton.jit
def load_sums(sums_ptr, head, row, piece, first_row, end_row, reach, pieces, PIECE: tl.constexpr):
    """``sums[head, row - first_row, piece]``, -inf where a row does not exist or sees nothing of a piece."""
    at = sums_ptr + (head * (end_row - first_row) + (row - first_row))[:, None] * pieces + piece[None, :]
    seen = (row < end_row)[:, None] & (piece < pieces)[None, :] & (piece[None, :] * PIECE <= row[:, None] + reach)
    return tl.load(at, mask=seen, other=float("-inf"))


@triton.jit(do_not_specialize=["first_row", "end_row", "reach", "pieces"])
def row_kernel(
    sums_ptr, lse_ptr, first_row: tl.int32, end_row: tl.int32, reach: tl.int32, pieces: tl.int32,
    PIECE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The denominator of every row in base 2, ``lse (heads, end_row - first_row)``; -inf for rows that see nothing."""
    head = tl.program_id(1).to(tl.int64)
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_i, l_i = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    last = tl.minimum(first_row + tl.program_id(0) * ROWS + ROWS, end_row) - 1
    end = tl.minimum((last + reach) // PIECE + 1, pieces)
    for at in range(0, end, WIDTH):
        sums = load_sums(sums_ptr, head, row, at + tl.arange(0, WIDTH), first_row, end_row, reach, pieces, PIECE)
        m_i, shift, keep = rescaled(m_i, tl.max(sums, 1))
        l_i = l_i * keep + tl.sum(tl.exp2(sums - shift[:, None]), 1)
    at = lse_ptr + head * (end_row - first_row) + row - first_row
    tl.store(at, log2_total(m_i, l_i), mask=row < end_row)


@triton.jit(do_not_specialize=["first_row", "end_row", "reach", "pieces", "key_blocks"])
def mass_kernel(
    sums_ptr, lse_ptr, mass_ptr, mass_head: tl.int64,
    first_row: tl.int32, end_row: tl.int32, reach: tl.int32, pieces: tl.int32, key_blocks: tl.int32,
    PER_BLOCK: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of ``2 ** (sum - lse)`` over the rows and the pieces of a block; grid ``(query blocks, heads, tiles of WIDTH pieces)``.

    ``mass (heads, query blocks, key blocks)`` begins at the block of ``first_row``.
    """
    head = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for at in range(0, PER_BLOCK, ROWS):
        row = first_row + tl.program_id(0) * PER_BLOCK + at + tl.arange(0, ROWS)
        inside = (at + tl.arange(0, ROWS) < PER_BLOCK) & (row < end_row)
        lse = tl.load(lse_ptr + head * (end_row - first_row) + row - first_row, mask=inside, other=0.0)
        sums = load_sums(sums_ptr, head, row, piece, first_row, end_row, reach, pieces, PIECE)
        # A row that sees nothing has lse -inf, and -inf - -inf would be NaN.
        weights = tl.exp2(sums - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
        total += tl.sum(tl.where(inside[:, None], weights, 0.0), 0)
    pieces_of: tl.constexpr = PER_BLOCK // PIECE
    if pieces_of > 1:
        total = tl.sum(tl.reshape(total, [WIDTH // pieces_of, pieces_of]), 1)
    block = tl.program_id(2) * (WIDTH // pieces_of) + tl.arange(0, WIDTH // pieces_of)
    at = mass_ptr + head * mass_head + tl.program_id(0).to(tl.int64) * key_blocks + block
    tl.store(at, total, mask=block < key_blocks)
