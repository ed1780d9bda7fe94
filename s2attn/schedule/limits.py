"""How long a piece of a list may be."""

from __future__ import annotations

import numpy as np

PROGRAMS = 1024
"""A piece with more than this fraction of all work can hold up a GPU, which runs some hundreds of programs at once."""


def piece_limits(counts: np.ndarray, seq: np.ndarray, *, copies: int = 1, least: int = 16) -> np.ndarray:
    """The most entries that one piece of each line may have.

    A line is cut when it is longer than twice the mean of its sequence *and* long beside the sequence's whole work: with thousands of
    lines a long one that starts first is done before the others are, and cutting it would only cost memory. Every sequence of a packed
    batch is judged by itself, so that the bits of its result do not depend on its neighbours.

    Args:
        counts: ``(heads, lines)`` entries of each item.
        seq: ``(lines,)`` sequence of each line.
        copies: programs that walk each list (query heads that share a layout head).
        least: no limit is below so many entries.

    Returns:
        ``(lines,)`` int64.

    >>> piece_limits(np.array([[2, 2, 2, 2, 2, 2, 2, 100]]), np.zeros(8, int), least=4).tolist()
    [29, 29, 29, 29, 29, 29, 29, 29]
    """
    sequences = int(seq.max()) + 1 if len(seq) else 0
    total = np.bincount(seq, weights=counts.sum(0), minlength=sequences)
    listed = np.bincount(seq, weights=(counts > 0).sum(0), minlength=sequences)
    mean = np.ceil(2 * total / np.maximum(listed, 1))
    share = np.ceil(total * copies / PROGRAMS)
    return np.maximum(np.maximum(mean, share), least).astype(np.int64)[seq]
