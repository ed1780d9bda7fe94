"""Pieces that dq and dkv share: probabilities in two steps around a product in flight, masks as bits, results written by row."""

from s2attn.kernels.hopper.names import gl, gluon, make_descriptor, mbarrier
from s2attn.kernels.pieces.scores import log2_logits

ROWS: gl.constexpr = gl.constexpr(64)
"""Rows of a product: one consumer warpgroup has 64."""
WORD: gl.constexpr = gl.constexpr(32)
"""Pairs of a row of a mask tile in one word."""


@gluon.jit
def rows_of_heads(of, HEADS: gl.constexpr, TILE: gl.constexpr, WIDTH: gl.constexpr):
    """A descriptor of tiles of TILE rows; rows from the end on read as zero. Further heads lie in columns from ``stride_head`` on."""
    base_ptr, end, stride_token, stride_head = of
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, WIDTH], base_ptr.dtype.element_ty)
    columns = ((HEADS - 1) * stride_head + WIDTH).to(gl.int32)
    return make_descriptor(base_ptr, [end, columns], [stride_token, 1], [TILE, WIDTH], layout)


@gluon.jit
def barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """STAGES barriers that change their phase after COUNT arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(made.index(i), count=COUNT)
    return made


@gluon.jit
def probabilities(products, minus_lse_log2, factor, cap_log2, allowed, CAPPED: gl.constexpr, MASKED: gl.constexpr):
    """P and the logits (base 2) of one tile of products."""
    logits = log2_logits(products, factor, cap_log2, CAPPED)
    # No probability exceeds 1; rounded logits of many millions would say otherwise, and overflow.
    p = gl.exp2(gl.minimum(logits + minus_lse_log2, 0.0))
    if MASKED:
        p = gl.where(allowed, p, 0.0)
    return p, logits


@gluon.jit
def allowed_bits(row_ptr, wanted, across, WIDTH: gl.constexpr):
    """Whether each pair of a tile is allowed, ``[rows, WIDTH]``; all pairs of a row that is not ``wanted``.

    ``row_ptr`` points to the first word of each row, whose bits ascend; ``across`` counts the columns. The words of a row take two
    registers where bytes would take one for each pair.
    """
    bits = gl.load(row_ptr, mask=wanted, other=-1)[:, None]
    if WIDTH > WORD:
        bits = gl.where((across < WORD)[None, :], bits, gl.load(row_ptr + 1, mask=wanted, other=-1)[:, None])
    return (bits >> (across % WORD)[None, :]) & 1 != 0


@gluon.jit
def store_rows(base_ptr, stride_token, values, count, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Write the first ``count`` rows of a tile of accumulators."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    at = row.to(gl.int64)[:, None] * stride_token + column[None, :]
    gl.store(base_ptr + at, values.to(base_ptr.dtype.element_ty), mask=(row < count)[:, None])
