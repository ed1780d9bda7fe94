"""Ways to compute attention over a layout: one protocol, an ordered list, and refusals with every reason."""

from s2attn.backends.base import Backend, Scoring
from s2attn.backends.registry import backend_names, get_backend, pick

__all__ = ["Backend", "Scoring", "backend_names", "get_backend", "pick"]
