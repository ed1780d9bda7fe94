"""`warmup_decode`: lists and kernels of storing and decoding before the first step, or before a CUDA graph captures one."""

from __future__ import annotations

import torch

from s2attn.backends import Pages, Requests, Scoring, Writes, pick_paged
from s2attn.core import bad_value, check_int
from s2attn.layout import HeadRange
from s2attn.ops.checks import check_heads, check_scale, check_softcap
from s2attn.ops.paged import layout_by_position
from s2attn.ops.source import block_for, pattern_text
from s2attn.ops.warmup import check_shapes, usual_device
from s2attn.patterns import Pattern


def warmup_decode(
    pattern: Pattern,
    *,
    max_tokens: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int,
    v_dim: int | None = None,
    page_size: int = 64,
    q_len: int | None = 1,
    dtype: torch.dtype = torch.bfloat16,
    page_dtype: torch.dtype | None = None,
    page_scales: bool = False,
    index_dtype: torch.dtype = torch.int32,
    device: torch.device | str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    layer: int = 0,
    heads: HeadRange | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> None:
    """Build the lists of `decode`, compile and load its kernels and that of `store_kv`, ahead of calls of any batch and length.

    Afterwards a step can be captured by a CUDA graph, and no request waits for a compiler. Kernels run once, over a sequence without
    tokens. What is compiled apart, and so needs a call of its own: every argument here but ``max_tokens``, which the lists depend on.
    Backends that read lengths on the host have nothing to prepare: for them the arguments are checked and no more.

    Args:
        pattern: which keys are seen.
        max_tokens: what ``block_table`` has room for, its pages times ``page_size``.
        num_heads, num_kv_heads: H, and G (H by default).
        head_dim, v_dim: widths of q and keys, and of values (the same by default).
        page_size: tokens per page, a multiple of 16.
        q_len: new tokens of each sequence; None for packed calls, with ``cu_seqlens_q``, of any lengths.
        dtype, page_dtype: of q, and of the pages (the same by default, or float8_e4m3fn).
        page_scales: with ``k_scale`` and ``v_scale``.
        index_dtype: of ``block_table``, ``seq_lens`` and ``cu_seqlens_q``: int32 or int64.
        device: where calls will run; the current CUDA device if there is one, else the CPU.
        sinks: with a sink logit per head.
        scale, softcap, layer, heads, backend, batch_invariant: as in `decode`.

    Raises:
        ValueError, TypeError: a bad argument.
        Unsupported: no backend, or not the named one, could serve such a call.

    >>> from s2attn import Window
    >>> warmup_decode(Window(8), max_tokens=256, num_heads=2, head_dim=16, dtype=torch.float32, device="cpu")
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {"max_tokens": max_tokens, "head_dim": head_dim, "page_size": page_size, "q_len": 1 if q_len is None else q_len}
    check_shapes(pattern, dtype, num_heads, kv_heads, sizes)
    width = head_dim if v_dim is None else check_int("v_dim", v_dim, 1)
    if page_size % 16:
        raise bad_value("page_size", "must be a multiple of 16", page_size)
    kept = dtype if page_dtype is None else page_dtype
    if kept not in (dtype, torch.float8_e4m3fn):
        raise TypeError(f"page_dtype must be dtype, {dtype}, or float8_e4m3fn; got {kept}")
    if page_scales and kept != torch.float8_e4m3fn:
        raise bad_value("page_scales", "must be left out unless page_dtype is float8_e4m3fn", page_scales)
    if index_dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index_dtype must be torch.int32 or torch.int64; got {index_dtype}")
    scoring_scale, cap, number = check_scale(scale, head_dim), check_softcap(softcap), check_int("layer", layer, 0)
    where = usual_device(device)
    k, v = (torch.zeros(1, page_size, kv_heads, d, dtype=torch.float32, device=where).to(kept) for d in (head_dim, width))
    factor = torch.ones(kv_heads, dtype=torch.float32, device=where) if page_scales else None
    table = torch.zeros(1, 1, -(-max_tokens // page_size), dtype=index_dtype, device=where)
    pages = Pages(k, v, table, factor, factor)
    q = torch.zeros(1, q_len or 1, num_heads, head_dim, dtype=dtype, device=where)
    check_heads(heads, q)
    chosen = pick_paged(backend, q, pages)
    if not chosen.by_position:
        return
    text = pattern_text(pattern, None, True, number, heads)
    layout = layout_by_position(text, block_for(text, 0), table.shape[2] * page_size, num_heads, kv_heads, q.device)
    scoring = Scoring(scoring_scale, cap or None, torch.zeros(num_heads, device=where) if sinks else None)
    empty = table.new_zeros(1)
    # Packed calls have tiles as high as their sequences are long on average, up to a block.
    for length in packed_means(layout.block) if q_len is None else [q_len]:
        cu = table.new_zeros(2) if q_len is None else None
        requests = Requests(empty, cu, checked=False, batch_invariant=bool(batch_invariant))
        chosen.warmup_paged(q.new_zeros(1, length, num_heads, head_dim), pages, requests, layout, scoring)
    for slots in (table.new_full((1,), -1, dtype=kind) for kind in (torch.int32, torch.int64)):
        chosen.store(Writes(q.new_zeros(1, kv_heads, head_dim), q.new_zeros(1, kv_heads, width), k, v, slots, factor, factor))


def packed_means(block: int) -> list[int]:
    """Mean lengths that stand for all others, as far as the height of a tile goes.

    >>> packed_means(64)
    [1, 2, 4, 8, 16, 32, 64]
    """
    return [1 << power for power in range(block.bit_length())]
