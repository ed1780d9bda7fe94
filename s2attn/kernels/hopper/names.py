"""Gluon's names that move between releases of Triton, in the one place that has to follow them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
make_descriptor = tma.make_tensor_descriptor
# Triton 3.9 drops the underscore.
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

__all__ = [
    "REINTERPRET",
    "copy_in",
    "fence_async_shared",
    "gl",
    "gluon",
    "make_descriptor",
    "mbarrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
