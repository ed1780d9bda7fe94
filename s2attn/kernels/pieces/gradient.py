"""The pieces of the backward pass: probabilities recomputed from lse, and the gradient of the scores."""

import triton
import triton.language as tl

from s2attn.kernels.pieces.scores import product_gradient


@triton.jit
def score_gradient(logits_log2, d_probability, lse_log2, delta, allowed, cap_log2, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """``P`` and ``dS = P * (dP - delta)`` of one tile; ``lse_log2`` and ``delta`` are broadcast along the keys.

    ``delta`` holds ``sum(dout * out) - dlse``, so the gradient of lse needs no term of its own. A query that does not exist comes with
    ``lse_log2 = +inf`` and so with P = 0.
    """
    # No probability exceeds 1; rounded logits of many millions would say otherwise, and overflow.
    p = tl.exp2(tl.minimum(logits_log2 - lse_log2, 0.0, propagate_nan=tl.PropagateNan.ALL))
    ds = product_gradient(p * (d_probability - delta), logits_log2, cap_log2, CAPPED)
    if MASKED:
        # Both by selection: 0 times an infinite dP, or a logit of NaN, would not be 0.
        p = tl.where(allowed, p, 0.0)
        ds = tl.where(allowed, ds, 0.0)
    return p, ds
