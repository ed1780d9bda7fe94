"""The Triton backend: launchers for `s2attn.kernels`. Nothing here imports triton before it is asked to."""

from s2attn.backends.triton.backend import Triton

__all__ = ["Triton"]
