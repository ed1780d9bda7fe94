"""From products q.k to the logits of the softmax, in base 2."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """The hyperbolic tangent in float32, accurate near 0 too, where ``1 - exp`` would cancel."""
    size = tl.abs(x)
    small = tl.exp2(size * (-2.0 * LOG2E))
    far = (1.0 - small) / (1.0 + small)
    square = x * x
    # The series of tanh(x) / x; at 1/4, where it is left, the first term that is missing is below 1e-8.
    near = size * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    result = tl.where(size < 0.25, near, far)
    return tl.where(x < 0.0, -result, result)


@triton.jit
def log2_logits(products, factor, cap_log2, CAPPED: tl.constexpr):
    """Logits in base 2.

    Plain: ``products * factor`` with ``factor = scale * log2(e)``. CAPPED: ``softcap * tanh(scale * products / softcap)`` in base 2, with
    ``factor = scale / softcap`` and ``cap_log2 = softcap * log2(e)``.
    """
    if CAPPED:
        return tanh(products * factor) * cap_log2
    else:
        return products * factor


@triton.jit
def product_gradient(d_logits, logits_log2, cap_log2, CAPPED: tl.constexpr):
    """The gradient of ``scale * products`` from the gradient of the logits."""
    if CAPPED:
        slope = logits_log2 / cap_log2
        return d_logits * (1.0 - slope * slope)
    else:
        return d_logits
