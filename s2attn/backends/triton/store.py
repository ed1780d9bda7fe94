"""The launch of the kernel that writes new keys and values into pages."""

from __future__ import annotations

import torch

from s2attn.backends.base import Writes
from s2attn.backends.triton.start import Call, Starts, on_device, start
from s2attn.backends.triton.tiles import next_power


def store(new: Writes, starts: Starts) -> None:
    """Write every token whose slot is there."""
    from s2attn.kernels.store import store_kernel

    pools = [x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (new.k_pages, new.v_pages)]
    slots = new.slots.contiguous()
    scales = [slots if x is None else x.contiguous() for x in (new.k_scale, new.v_scale)]
    tensors = (new.k, new.v, *pools)
    page_size, width, v_width = pools[0].shape[1], new.k.shape[-1], new.v.shape[-1]

    def describe() -> Call:
        strides = [stride for x in tensors for stride in x.stride()]
        widths = {"D": width, "DV": v_width, "BLOCK_D": next_power(width), "BLOCK_DV": next_power(v_width)}
        scaled = {"SCALED_K": new.k_scale is not None, "SCALED_V": new.v_scale is not None}
        constants = {**widths, "PAGE": page_size, **scaled, "num_warps": 1}
        return Call((len(slots), new.k.shape[1], 1), (pools[0].shape[0] * page_size, *strides), constants)

    key = ("store", slots.dtype, scales[0].dtype, scales[1].dtype, *((x.dtype, x.shape, x.stride()) for x in tensors))
    with on_device(new.k_pages):
        start(store_kernel, (*tensors, slots, *scales), starts, key, describe)
