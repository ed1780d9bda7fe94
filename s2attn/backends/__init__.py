"""Ways to compute attention over a layout: one protocol, an ordered list, and refusals with every reason."""

from s2attn.backends.base import Backend, Pages, Reduction, Scoring
from s2attn.backends.registry import backend_names, get_backend, pick, pick_mass, pick_paged

__all__ = ["Backend", "Pages", "Reduction", "Scoring", "backend_names", "get_backend", "pick", "pick_mass", "pick_paged"]
