"""The oracle: attention with a dense mask in float64, as plainly as it can be written."""

from s2attn.backends.reference.backend import Reference

__all__ = ["Reference"]
