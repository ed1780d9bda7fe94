"""Who does which tile when: pure functions over counts, provable on a CPU."""

from s2attn.schedule.limits import piece_limits
from s2attn.schedule.pieces import Schedule, plan_by_length, plan_by_range

__all__ = ["Schedule", "piece_limits", "plan_by_length", "plan_by_range"]
