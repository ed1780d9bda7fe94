"""A paged cache that keeps only the keys which some later query can read."""

from s2attn.cache.ledger import CacheFull, Ledger
from s2attn.cache.sparse import SparseCache

__all__ = ["CacheFull", "Ledger", "SparseCache"]
