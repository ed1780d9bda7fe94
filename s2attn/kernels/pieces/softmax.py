"""The online softmax in base 2 (FlashAttention, arXiv:2205.14135, algorithm 1)."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(acc, m_i, l_i, scores_log2, v_tile, PRECISION: tl.constexpr):
    """Fold one ``[BLOCK_M, BLOCK_N]`` tile of log2 scores, and the values behind it, into the running softmax.

    ``m_i`` is the running maximum (-inf at first), ``l_i`` the running sum, ``acc`` the unnormalised output, all float32.
    """
    m_new = tl.maximum(m_i, tl.max(scores_log2, 1))
    # A row that has seen nothing yet keeps -inf; it is shifted by 0 so that no -inf - -inf appears.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores_log2 - shift[:, None])
    keep = tl.exp2(m_i - shift)
    l_i = l_i * keep + tl.sum(p, 1)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, m_new, l_i


@triton.jit
def softmax_end(acc, m_i, l_i):
    """Output and natural-log lse of the running softmax; 0 and -inf for rows that have seen nothing."""
    seen = l_i > 0.0
    total = tl.where(seen, l_i, 1.0)
    out = acc / total[:, None]
    lse = tl.where(seen, (m_i + tl.log2(total)) * LN2, float("-inf"))
    return out, lse
