"""A paged cache that keeps only the keys which some later query can read."""

from s2attn.cache.ledger import CacheFull, Ledger
from s2attn.cache.needs import page_needs, pages_needed
from s2attn.cache.sparse import SparseCache

__all__ = ["CacheFull", "Ledger", "SparseCache", "page_needs", "pages_needed"]
