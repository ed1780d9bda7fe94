"""Where new tokens stand: for rotary angles, learned positions, and modules that look at the tokens before."""

from __future__ import annotations

from torch import Tensor

from s2attn.core import bad_value, check_int
from s2attn.ops.step import current_step, plain_look_back, plain_positions


def positions(tokens: Tensor) -> Tensor:
    """The position of each token in its sequence, int64 ``(B, T)``, on the tokens' device.

    Inside ``with cache.step(...)`` the new tokens follow those that the cache holds, row by row; elsewhere every row begins at 0. Padding
    has the position of the last token before it.

    Args:
        tokens: the model's input, ``(B, T)`` or with more axes behind.

    >>> import torch
    >>> positions(torch.zeros(2, 3, dtype=torch.int64)).tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        raise bad_value("tokens", "must be a tensor (batch, tokens), or with more axes", tokens)
    ask = current_step()
    return plain_positions(tokens) if ask is None else ask("positions", tokens)


def look_back(tokens: Tensor, count: int) -> Tensor:
    """The tokens behind the ``count`` tokens before them, ``(B, count + T)``; 0 where a sequence has none.

    Inside ``with cache.step(...)`` these are the last tokens that the cache was given.

    Args:
        tokens: the model's input, integers ``(B, T)``.

    >>> import torch
    >>> look_back(torch.tensor([[5, 6, 7]]), 2).tolist()
    [[0, 0, 5, 6, 7]]
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise bad_value("tokens", "must be a tensor (batch, tokens)", tokens)
    ask = current_step()
    check_int("count", count, 0)
    return plain_look_back(tokens, count) if ask is None else ask("look_back", tokens, count)
