"""Layouts to and from the `BlockMask` of PyTorch's FlexAttention."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s2attn.core import BLOCKS, Unsupported, bad_kind, bad_value, check_int
from s2attn.layout.convert import index_of, sorted_entries
from s2attn.layout.entries import Entries, entries_of
from s2attn.layout.index import Spans, spans_of
from s2attn.layout.layout import Layout
from s2attn.layout.tiles import TileTable
from s2attn.layout.validate import broken_invariant

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_AT_ONCE = 1 << 22  # token pairs whose mask_mod is asked for together
_NO_BLOCK, _WHOLE_BLOCK = 0, 1  # the first two tiles that a mask_mod looks up


def to_block_mask(layout: Layout, num_heads: int | None = None) -> BlockMask:
    """The same mask for ``torch.nn.attention.flex_attention``, exact to the token.

    Full blocks stay full; for partial ones the ``mask_mod`` looks up the layout's mask tiles. A `BlockMask` holds tables of
    ``heads x query blocks x key blocks`` numbers by its own format, so this is for lengths where that is affordable.

    Args:
        layout: a layout of one sequence.
        num_heads: heads of the result, a multiple of ``layout.heads`` (which is the default): the query heads of the call.

    Raises:
        Unsupported: a packed layout.
        ValueError: ``num_heads`` is no multiple of the layout's heads.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if layout.packed:
        reason = "blocks of packed sequences do not begin at multiples of the block, and a BlockMask has no other ones"
        raise Unsupported("a packed layout cannot become a BlockMask", {"flex": [reason]})
    num_heads = layout.heads if num_heads is None else check_int("num_heads", num_heads, 1)
    if num_heads % layout.heads:
        raise bad_value("num_heads", f"must be a multiple of the layout's heads ({layout.heads})", num_heads)
    tables = [_tile_table(layout, head) for head in range(layout.heads)]
    table = torch.stack(tables).repeat_interleave(num_heads // layout.heads, dim=0)
    counts, indices = _ordered(table > _WHOLE_BLOCK)
    full_counts, full_indices = _ordered(table == _WHOLE_BLOCK)
    lengths = (layout.seqlen_q, layout.seqlen_k)
    lists = (counts, indices, full_counts, full_indices)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=layout.block, mask_mod=_mask_mod(layout, table), seq_lengths=lengths)


def _tile_table(layout: Layout, head: int) -> Tensor:
    """``(query blocks, key blocks)`` int32: which of the tiles of :func:`_mask_mod` each pair of blocks has."""
    table = torch.full((len(layout.q_spans), len(layout.k_spans)), _NO_BLOCK, dtype=torch.int32, device=layout.device)
    entries = entries_of(layout.rows, head)
    # A partial entry's tile n is number n + 2 of the tiles that begin with an empty and a whole one; -1 marks full entries.
    table[entries.line, entries.idx] = (entries.tile + 2).int()
    return table


def _mask_mod(layout: Layout, table: Tensor) -> Any:
    block = layout.block
    ends = torch.zeros(2, block, block, dtype=torch.bool, device=layout.device)
    ends[_WHOLE_BLOCK] = True
    tiles = torch.cat([ends, layout.tiles])

    def mask_mod(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return tiles[table[head, q_idx // block, kv_idx // block], q_idx % block, kv_idx % block]

    return mask_mod


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """``(1, heads, rows)`` counts, and ``(1, heads, rows, key blocks)`` the chosen blocks first, ascending."""
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[None], order.int()[None]


def from_block_mask(block_mask: BlockMask) -> Layout:
    """The layout that allows exactly the pairs of a `BlockMask`; its ``mask_mod`` is evaluated on the partial blocks only.

    The layout has as many heads as the mask (1 for one that broadcasts over heads), and it is causal when no pair has its key after
    its query, queries at the end of the keys (``q_pos = i + S - T``).

    Raises:
        Unsupported: more than one batch entry, blocks that are not square or not of 16 to 256 tokens.
        TypeError: not a BlockMask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise bad_kind("block_mask", "must be a BlockMask", block_mask)
    reasons = _reasons(block_mask)
    if reasons:
        raise Unsupported("this BlockMask cannot become a layout", {"layout": reasons})
    block = block_mask.BLOCK_SIZE[0]
    seqlen_q, seqlen_k = block_mask.seq_lengths
    q_spans, k_spans = spans_of([seqlen_q], block, [seqlen_k - seqlen_q]), spans_of([seqlen_k], block)
    device = block_mask.kv_num_blocks.device
    tiles = TileTable(block)
    heads = [_head_entries(block_mask, head, q_spans, k_spans, tiles) for head in range(block_mask.kv_num_blocks.shape[1])]
    layout = Layout(block, False, index_of(heads, len(q_spans)), tiles.tensor(), q_spans, k_spans)
    causal = dataclasses.replace(layout, causal=True)
    return (layout if broken_invariant(causal) else causal).to(device)


def _reasons(block_mask: BlockMask) -> list[str]:
    reasons = []
    shape, size = block_mask.kv_num_blocks.shape, tuple(block_mask.BLOCK_SIZE)
    if len(shape) != 3 or shape[0] != 1:
        reasons.append(
            f"a layout is the same for every batch entry, so it must have batch 1; got {shape[0] if len(shape) == 3 else tuple(shape)}"
        )
    if size[0] != size[1] or size[0] not in BLOCKS:
        reasons.append(f"BLOCK_SIZE must be square and one of 16, 32, 64, 128, 256; got {size}")
    return reasons


def _head_entries(block_mask: BlockMask, head: int, q_spans: Spans, k_spans: Spans, tiles: TileTable) -> Entries:
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, head, len(k_spans))
    line, idx = _inside(partial, len(q_spans))
    number = _numbers(block_mask.mask_mod, head, line, idx, q_spans, k_spans, tiles, block_mask.kv_num_blocks.device)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, head, len(k_spans))
        more_line, more_idx = _inside(full, len(q_spans))
        more = _numbers(None, head, more_line, more_idx, q_spans, k_spans, tiles, torch.device("cpu"))
        line, idx, number = torch.cat([line, more_line]), torch.cat([idx, more_idx]), torch.cat([number, more])
    keep = number != tiles.EMPTY
    line, idx, number = line[keep], idx[keep], number[keep]
    order = torch.argsort(line * max(1, len(k_spans)) + idx, stable=True)
    return sorted_entries(line[order], idx[order], number[order])


def _listed(counts: Tensor, indices: Tensor, head: int, key_blocks: int) -> Tensor:
    """``(rows, key blocks)`` bool: which blocks a head's ordered table lists."""
    counts, indices = counts[0, head].cpu().long(), indices[0, head].cpu().long()
    valid = torch.arange(indices.shape[1])[None, :] < counts[:, None]
    listed = torch.zeros(len(counts), max(key_blocks, indices.shape[1]) + 1, dtype=torch.bool)
    listed.scatter_(1, torch.where(valid, indices, listed.shape[1] - 1), True)
    return listed[:, :key_blocks]


def _inside(listed: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    line, idx = listed[:rows].nonzero(as_tuple=True)
    return line, idx


def _numbers(
    mask_mod: Any, head: int, line: Tensor, idx: Tensor, q_spans: Spans, k_spans: Spans, tiles: TileTable, device: torch.device
) -> Tensor:
    """Tile numbers of some blocks; without a ``mask_mod`` every pair that exists is allowed."""
    block, token = tiles.block, torch.arange(tiles.block)
    numbers = [torch.zeros(0, dtype=torch.int64)]
    step = max(1, _AT_ONCE // (block * block))
    for at in range(0, len(line), step):
        rows, cols = line[at : at + step], idx[at : at + step]
        q_real = token[None, :] < q_spans.length[rows].long()[:, None]
        k_real = token[None, :] < k_spans.length[cols].long()[:, None]
        seen = q_real[:, :, None] & k_real[:, None, :]
        if mask_mod is not None:
            # Tokens beyond the end are asked for as the last one, so that a mask_mod may index tensors of the sequence's length.
            q = torch.where(q_real, rows[:, None] * block + token, q_spans.total - 1)
            k = torch.where(k_real, cols[:, None] * block + token, k_spans.total - 1)
            seen = seen & _evaluated(mask_mod, head, q.to(device), k.to(device)).cpu()
        exists = q_real[:, :, None].expand_as(seen)
        numbers.append(torch.from_numpy(tiles.number(seen.numpy(), exists.numpy())))
    return torch.cat(numbers)


def _evaluated(mask_mod: Any, head: int, q: Tensor, k: Tensor) -> Tensor:
    """``mask_mod`` on ``(n, block)`` query and key positions, ``(n, block, block)``, one scalar pair at a time as FlexAttention asks it."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    over_k = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_q = torch.vmap(over_k, in_dims=(None, None, 0, None))
    over_blocks = torch.vmap(over_q, in_dims=(None, None, 0, 0))
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    with TransformGetItemToIndex():  # captured tensors may be indexed with scalars
        return over_blocks(zero, zero + head, q, k).bool()
