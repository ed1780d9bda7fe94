"""Who does which tile when: pure functions over counts, provable on a CPU."""

from s2attn.schedule.order import longest_first

__all__ = ["longest_first"]
