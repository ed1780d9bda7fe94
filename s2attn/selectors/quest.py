"""Quest over a paged cache (arXiv:2406.10774): bounds kept beside the pages, and the few pages that a step of decoding reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2attn.core import BLOCKS, bad_kind, bad_value
from s2attn.ops.checks import check_scale, check_softcap
from s2attn.ops.pooled import bound_logits


@dataclass(frozen=True, eq=False)
class KeyBounds:
    """The least and the greatest number of every coordinate among the keys in each page.

    Nothing here looks at numbers on the host, so a CUDA graph may capture it.

    Attributes:
        low, high: ``(num_pages + 1, G, D)`` in the dtype of the keys; the last row takes what has no page.
        page_size: tokens per page.
    """

    low: Tensor
    high: Tensor
    page_size: int

    @classmethod
    def of(cls, k_pages: Tensor) -> KeyBounds:
        """Bounds for pages ``(num_pages, page_size, G, D)``, as `s2attn.decode` takes them, that hold nothing yet."""
        if not isinstance(k_pages, Tensor) or k_pages.dim() != 4:
            raise bad_kind("k_pages", "must be a tensor (num_pages, page_size, kv_heads, head_dim)", k_pages)
        if not k_pages.is_floating_point() or k_pages.element_size() < 2:
            raise TypeError(f"k_pages must have a floating point dtype of 16 bits or more; got {k_pages.dtype}")
        if k_pages.shape[1] not in BLOCKS:
            raise bad_value("k_pages", f"must have a page_size among {', '.join(map(str, BLOCKS))}", k_pages.shape[1])
        shape = k_pages.shape[0] + 1, *k_pages.shape[2:]
        return cls(k_pages.new_full(shape, torch.inf), k_pages.new_full(shape, -torch.inf), k_pages.shape[1])

    def store(self, k: Tensor, slot_mapping: Tensor) -> None:
        """Widen the bounds of the pages to which new keys go: what `s2attn.store_kv` is told of keys, here once more.

        A page forgets its old keys when its first slot is written. Tokens with a slot that does not exist are left out.

        Args:
            k: ``(tokens, G, D)``, or with a batch axis before it.
            slot_mapping: ``(tokens,)``, or with the batch axis, int32 or int64.
        """
        if not isinstance(k, Tensor) or not isinstance(slot_mapping, Tensor) or k.shape != (*slot_mapping.shape, *self.low.shape[1:]):
            came = [tuple(x.shape) if isinstance(x, Tensor) else x for x in (k, slot_mapping)]
            raise bad_value("k and slot_mapping", f"must be tensors (tokens, {self.low.shape[1]}, {self.low.shape[2]}) and (tokens,)", came)
        if slot_mapping.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"slot_mapping must be an int32 or int64 tensor; got {slot_mapping.dtype}")
        if k.dtype != self.low.dtype:
            raise TypeError(f"k must have the dtype of the bounds, {self.low.dtype}; got {k.dtype}")
        slots, nowhere = slot_mapping.reshape(-1).long(), self.low.shape[0] - 1
        page = torch.where((slots >= 0) & (slots < nowhere * self.page_size), slots // self.page_size, nowhere)
        begun = torch.where(slots % self.page_size == 0, page, nowhere)
        keys = k.detach().reshape(-1, *self.low.shape[1:])
        place = page[:, None, None].expand_as(keys)
        with torch.no_grad():
            for bounds, empty, reduce in ((self.low, torch.inf, "amin"), (self.high, -torch.inf, "amax")):
                bounds.index_fill_(0, begun, empty)
                bounds.scatter_reduce_(0, place, keys, reduce)


def choose_pages(
    q: Tensor,
    bounds: KeyBounds,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    top_k: int,
    keep_first: bool,
    scale: float | None = None,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """See `s2attn.selectors.PageBounds.pages`."""
    table, size = _check(q, bounds, block_table, seq_lens), bounds.page_size
    (_, new, heads, dim), kv_heads = q.shape, bounds.low.shape[1]
    tail = (new + size - 2) // size + 1  # pages in which the new tokens may lie
    if top_k < tail + keep_first:
        rule = f"must be at least {tail + keep_first}: the pages of {new} new tokens" + (" and the first one" if keep_first else "")
        raise bad_value("top_k", rule, top_k)
    factor, cap = check_scale(scale, dim), check_softcap(softcap)
    number = torch.arange(table.shape[2], device=q.device)
    lengths = seq_lens.long().clamp(min=0, max=table.shape[2] * size)
    held = (lengths + size - 1) // size
    there = (table >= 0) & (table < len(bounds.low) - 1)
    page = torch.where(there, table, len(bounds.low) - 1).long()
    there = there.expand(-1, kv_heads, -1)
    head = torch.arange(kv_heads, device=q.device)[:, None]
    low, high = (x[page.expand(-1, kv_heads, -1), head].transpose(1, 2) for x in (bounds.low, bounds.high))
    last = lengths[:, None] - new + torch.arange(new, device=q.device)  # position of each query
    late = (number * size > last[..., None])[:, None]  # (B, 1, T, pages)
    unseen = late | ~there.repeat_interleave(heads // kv_heads, 1).unsqueeze(2)
    logits = bound_logits(q.detach().float() * factor, low.float(), high.float(), cap).masked_fill(unseen, -torch.inf)
    mass = torch.softmax(logits, dim=-1).masked_fill(unseen, 0.0).unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))
    kept = (number >= held[:, None] - tail) | ((number == 0) & keep_first)
    # Evicted pages stand below all others, so they come only where too few are left; `decode` refuses them or leaves them out.
    mass = mass.masked_fill(~there, -1.0)
    mass = mass.masked_fill(kept[:, None], torch.inf).masked_fill((number >= held[:, None])[:, None], -torch.inf)
    # In ascending order pages that do not exist come last, and before them those of the new tokens, so positions still mean what they did.
    chosen = mass.topk(min(top_k, table.shape[2]), dim=-1).indices.sort(dim=-1).values
    count = held.clamp(max=top_k)
    tokens = lengths - (held - count) * size
    return {"block_table": table.expand(-1, kv_heads, -1).gather(2, chosen), "seq_lens": tokens.to(seq_lens.dtype)}


def _check(q: Tensor, bounds: KeyBounds, block_table: Tensor, seq_lens: Tensor) -> Tensor:
    """The table with an axis for KV heads."""
    if not isinstance(bounds, KeyBounds):
        raise bad_kind("bounds", "must be KeyBounds", bounds)
    for name, numbers in (("block_table", block_table), ("seq_lens", seq_lens)):
        if not isinstance(numbers, Tensor) or numbers.dtype not in (torch.int32, torch.int64):
            raise bad_kind(name, "must be an int32 or int64 tensor", numbers)
    kv_heads, dim = bounds.low.shape[1:]
    if not isinstance(q, Tensor) or q.dim() != 4 or q.shape[3] != dim or not q.shape[2] or q.shape[2] % kv_heads or not q.shape[1]:
        rule = f"must be a tensor (batch, new tokens, heads, {dim}) with a multiple of {kv_heads} heads"
        raise bad_value("q", rule, tuple(q.shape) if isinstance(q, Tensor) else q)
    table = block_table.unsqueeze(1) if block_table.dim() == 2 else block_table
    if table.dim() != 3 or table.shape[0] != len(q) or table.shape[1] not in (1, kv_heads) or not table.shape[2]:
        raise bad_value(
            "block_table", f"must have shape ({len(q)}, max_pages) or ({len(q)}, {kv_heads}, max_pages)", tuple(block_table.shape)
        )
    if seq_lens.shape != (len(q),):
        raise bad_value("seq_lens", f"must have shape ({len(q)},)", tuple(seq_lens.shape))
    return table
