"""The order in which programs take the lines of an index."""

from __future__ import annotations

import torch
from torch import Tensor


def longest_first(counts: Tensor) -> Tensor:
    """Numbers of all (head, line) items, ``head * lines + line``, the longest lists first.

    Programs start in this order, so the last ones to run are short and no long list is left to one processor at the end. Items of equal
    length keep their order, line after line with the heads of a line side by side, so that neighbours read the same keys.

    Args:
        counts: ``(heads, lines)`` entries of each item.

    Returns:
        ``(heads * lines,)`` int32.

    >>> longest_first(torch.tensor([[1, 3], [1, 2]])).tolist()
    [1, 3, 0, 2]
    """
    heads, lines = counts.shape
    by_line = counts.t().reshape(-1)
    order = torch.sort(by_line, descending=True, stable=True).indices
    return (order % heads * lines + order // heads).int()
