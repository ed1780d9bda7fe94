"""Caches: one of pages that keeps only the keys which some later query can read, and a plain one that keeps all."""

from s2attn.cache.contiguous import DynamicCache
from s2attn.cache.ledger import CacheFull, Ledger
from s2attn.cache.needs import page_needs, pages_needed
from s2attn.cache.sparse import SparseCache

__all__ = ["CacheFull", "DynamicCache", "Ledger", "SparseCache", "page_needs", "pages_needed"]
