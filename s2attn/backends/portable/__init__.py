"""Gathered blocks in plain torch: exact sparse attention on any device that torch knows."""

from s2attn.backends.portable.backend import Portable

__all__ = ["Portable"]
