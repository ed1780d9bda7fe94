"""What tests of s2attn, and of things built on it, need: independent masks, an oracle, and random patterns (hypothesis)."""

from s2attn.testing.masks import dense_mask
from s2attn.testing.oracle import assert_close, eager, oracle

__all__ = ["assert_close", "dense_mask", "eager", "oracle"]
