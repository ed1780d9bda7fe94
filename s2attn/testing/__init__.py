"""What tests of s2attn, and of things built on it, need: independent masks, an oracle, and random patterns (hypothesis)."""

from s2attn.testing.masks import dense_mask

__all__ = ["dense_mask"]
