"""C++ kernels for CPUs, built on first use."""

from s2attn.backends.cpu.backend import Cpu

__all__ = ["Cpu"]
