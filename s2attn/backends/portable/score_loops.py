"""One tile of the reduced grid, written so that torch's own interpreter can run it; see `s2attn.backends.portable.loops`."""

# No `from __future__ import annotations`: torch.jit reads the annotations themselves, in the names of `typing`.

import torch
from torch import Tensor

from s2attn.backends.portable.loops import product


def query_groups(q: Tensor, at: int, end: int, stride: int, per_block: int) -> Tensor:
    """Blocks ``at .. end - 1`` of ``q (T, group, D)`` as ``(blocks * groups per block * group, stride * D)``: one matrix for all heads.

    Groups that do not exist hold zeros.
    """
    length, heads, width, block = q.size(0), q.size(1), q.size(2), stride * per_block
    whole = min(end, length // block)
    rows = torch.empty([end - at, per_block, heads, stride, width], dtype=torch.float32, device=q.device)
    by_token = rows.permute(0, 1, 3, 2, 4)
    by_token[: whole - at].copy_(q[at * block : whole * block].view(whole - at, per_block, stride, heads, width))
    if whole < end:
        last = (length - 1) % stride + 1  # tokens of the last group
        full = (length - last - whole * block) // stride
        final = by_token[end - at - 1]
        final.zero_()
        final[:full].copy_(q[whole * block : length - last].view(full, stride, heads, width))
        final[full][stride - last :].copy_(q[length - last :] * (stride / last))
    return rows.view(-1, stride * width)


def tile_mass(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    at: int,
    end: int,
    width: int,
    stride: int,
    per_block: int,
    corner: float,
    softcap: float | None,
    reach: int | None,
    onednn: bool,
) -> None:
    """Fill rows ``at .. end - 1`` of ``out (group, query blocks, key blocks)``, which is 0, from the first ``width`` key groups.

    The other arguments are those of `s2attn.backends.portable.score.Reduced`.
    """
    blocks, heads = end - at, q.size(1)
    logits = product(query_groups(q, at, end, stride, per_block), k[:width], None, onednn).view(blocks, per_block, heads, width)
    last = (q.size(0) + stride - 1) // stride - (end - 1) * per_block  # groups of the last block
    if last <= per_block and width == k.size(0):
        logits[blocks - 1, last - 1, :, width - 1].mul_(corner)
    if softcap is not None:
        logits = torch.tanh(logits / softcap).mul_(softcap)
    if reach is None:
        weights = torch.softmax(logits, -1)
    else:
        # What all rows see is left alone.
        edge = min(width, max(0, at * per_block + reach + 1))
        row = torch.arange(at * per_block, end * per_block, device=q.device).view(blocks, per_block, 1, 1)
        unseen = torch.arange(edge, width, device=q.device) > row + reach
        logits[:, :, :, edge:].masked_fill_(unseen, -torch.inf)
        weights = torch.softmax(logits, -1)
        # A row that sees nothing has become NaN, and is 0 where it is unseen; NaN of an input stays what it is.
        weights[:, :, :, edge:].masked_fill_(unseen, 0.0)
    if last < per_block:
        weights[blocks - 1, last:].zero_()
    # Rows first: that is one pass in the order of memory, and leaves little. The last columns may be cut.
    sums = torch.constant_pad_nd(weights.sum([1]), [0, (per_block - width % per_block) % per_block])
    mass = sums.view(blocks, heads, -1, per_block).sum([3])
    out[:, at:end, : mass.size(2)].copy_(mass.transpose(0, 1))
