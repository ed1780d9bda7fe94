"""The online softmax in base 2 (FlashAttention, arXiv:2205.14135, algorithm 1)."""

import triton
import triton.language as tl

from s2attn.kernels.pieces.scores import LN2, LOG2E


@triton.jit
def sink_logit(sinks_ptr, head, whole, SINKS: tl.constexpr):
    """The head's learned sink logit in base 2; -inf without sinks.

    A row in several pieces meets the sink where the pieces are joined, so ``whole`` says whether this is the only one.
    """
    if SINKS:
        return tl.where(whole, tl.load(sinks_ptr + head).to(tl.float32) * LOG2E, float("-inf"))
    else:
        return float("-inf")


@triton.jit
def softmax_begin(sink_log2, ROWS: tl.constexpr):
    """Running maximum and sum of rows that have seen nothing but a sink: -inf and 0 where that is -inf too."""
    m_i = tl.maximum(tl.full([ROWS], float("-inf"), tl.float32), sink_log2)
    return m_i, tl.where(m_i == float("-inf"), 0.0, 1.0)


@triton.jit
def rescaled(m_i, top):
    """New maximum, the shift to use, and the factor for what was summed under the old maximum."""
    m_new = tl.maximum(m_i, top)
    # A row that has seen nothing yet keeps -inf; it is shifted by 0 so that no -inf - -inf appears.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    # The same maximum keeps what was summed, also where it is a sink of +inf.
    return m_new, shift, tl.where(m_i == m_new, 1.0, tl.exp2(m_i - shift))


@triton.jit
def softmax_step(acc, m_i, l_i, scores_log2, v_tile):
    """Fold one ``[BLOCK_M, BLOCK_N]`` tile of log2 scores, and the values behind it, into the running softmax.

    ``m_i`` is the running maximum (-inf at first), ``l_i`` the running sum, ``acc`` the unnormalised output, all float32.
    """
    m_i, shift, keep = rescaled(m_i, tl.max(scores_log2, 1))
    p = tl.exp2(scores_log2 - shift[:, None])
    l_i = l_i * keep + tl.sum(p, 1)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return acc, m_i, l_i


@triton.jit
def softmax_end(acc, m_i, l_i):
    """Output and natural-log lse of the running softmax; 0 and -inf for rows that have seen nothing."""
    empty = l_i == 0.0  # [BLOCK_M]; a sum of NaN is not empty
    total = tl.where(empty, 1.0, l_i)  # [BLOCK_M]
    out = acc / total[:, None]  # [BLOCK_M, BLOCK_DV]
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(total)) * LN2)  # [BLOCK_M]
    return out, lse
