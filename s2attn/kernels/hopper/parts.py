"""Pieces that dq and dkv share: barriers, probabilities, masks across the queries, and rows written."""

from s2attn.kernels.hopper.names import gl, gluon, mbarrier
from s2attn.kernels.hopper.pieces import kept_here
from s2attn.kernels.pieces.scores import log2_logits

ROWS: gl.constexpr = gl.constexpr(64)
"""Rows of a product: one consumer warpgroup has 64."""


@gluon.jit
def landed(ready, stage, phase, RING: gl.constexpr):
    """Wait for every copy into a ring, from the producer's place in it."""
    for i in gl.static_range(RING):
        mbarrier.wait(ready.index(i), gl.where(i < stage, phase ^ 1, phase))


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
def allowed_bits(bits_ptr, first, inside, WORDS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Which of WIDTH = 32 or 64 listed tokens each of 64 lines sees, ``first`` the row of the table of mask tiles, ``inside`` the token."""
    line = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    token = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    bits = gl.load(bits_ptr + (first + line).to(gl.int64) * WORDS + inside // 64)
    if WIDTH == 32:
        bits = (bits >> (inside % 64).to(gl.int64)).to(gl.int32)
    return ((bits[:, None] >> token[None, :]) & 1) != 0


@gluon.jit
def store_rows(base_ptr, stride_token, values, count, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Write the first ``count`` rows of a tile of accumulators."""
    # Where the rows lie is worked out here, and not held in registers through all that comes before.
    stride_token = kept_here(gl.to_tensor(stride_token).to(gl.int64))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    at = row.to(gl.int64)[:, None] * stride_token + column[None, :]
    gl.store(base_ptr + at, values.to(base_ptr.dtype.element_ty), mask=(row < count)[:, None])
