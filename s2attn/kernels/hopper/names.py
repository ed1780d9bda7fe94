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

__all__ = ["copy_in", "fence_async_shared", "gl", "gluon", "make_descriptor", "mbarrier", "warpgroup_mma", "warpgroup_mma_wait"]
