"""New keys and values into the pages of a cache: one program for each token and head."""

import triton
import triton.language as tl

from s2attn.kernels.pieces.pages import to_float8


@triton.jit
def store_row(from_ptr, to_ptr, from_dim, to_dim, scale_ptr, head, D: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr):
    """One row of numbers; where they go to bytes, they are divided by their head's scale and become float8_e4m3fn."""
    d = tl.arange(0, BLOCK_D)
    row = tl.load(from_ptr + d * from_dim, mask=d < D, other=0.0)
    if to_ptr.dtype.element_ty == tl.uint8:
        numbers = row.to(tl.float32)
        if SCALED:
            numbers = tl.div_rn(numbers, tl.load(scale_ptr + head) + tl.zeros([BLOCK_D], tl.float32))
        tl.store(to_ptr + d * to_dim, to_float8(numbers), mask=d < D)
    else:
        tl.store(to_ptr + d * to_dim, row, mask=d < D)


@triton.jit(do_not_specialize=["limit"])
def store_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slots_ptr, k_scale_ptr, v_scale_ptr,
    limit: tl.int64,
    k_token: tl.int64, k_head: tl.int64, k_dim, v_token: tl.int64, v_head: tl.int64, v_dim,
    k_pages_page: tl.int64, k_pages_place: tl.int64, k_pages_head: tl.int64, k_pages_dim,
    v_pages_page: tl.int64, v_pages_place: tl.int64, v_pages_head: tl.int64, v_pages_dim,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr,
    SCALED_K: tl.constexpr, SCALED_V: tl.constexpr,
):  # fmt: skip
    """Slot s is token ``s % PAGE`` of page ``s // PAGE``; slots outside of 0 .. limit - 1 are left out. Grid ``(tokens, heads)``."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if (slot >= 0) & (slot < limit):
        page, place = slot // PAGE, slot % PAGE
        store_row(
            k_ptr + token * k_token + head * k_head, k_pages_ptr + page * k_pages_page + place * k_pages_place + head * k_pages_head,
            k_dim, k_pages_dim, k_scale_ptr, head, D, BLOCK_D, SCALED_K,
        )  # fmt: skip
        store_row(
            v_ptr + token * v_token + head * v_head, v_pages_ptr + page * v_pages_page + place * v_pages_place + head * v_pages_head,
            v_dim, v_pages_dim, v_scale_ptr, head, DV, BLOCK_DV, SCALED_V,
        )  # fmt: skip
