"""What tests of s2attn, and of things built on it, need: independent masks, an oracle, and random patterns (hypothesis)."""

from tests.support.masks import dense_mask
from tests.support.oracle import assert_close, eager, oracle

__all__ = ["assert_close", "dense_mask", "eager", "oracle"]
