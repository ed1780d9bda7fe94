"""Ways to compute attention over a layout: one protocol, an ordered list, and refusals with every reason."""

from s2attn.backends.base import Backend, Pages, Reduction, Requests, Scoring, Writes
from s2attn.backends.registry import backend_names, get_backend, pick, pick_mass, pick_paged, pick_store

__all__ = [
    "Backend",
    "Pages",
    "Reduction",
    "Requests",
    "Scoring",
    "Writes",
    "backend_names",
    "get_backend",
    "pick",
    "pick_mass",
    "pick_paged",
    "pick_store",
]
