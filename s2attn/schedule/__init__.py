"""Who does which tile when: pure functions over counts, provable on a CPU."""

from s2attn.schedule.cuts import CUTS, Cut, RowLengths, choose_cut
from s2attn.schedule.limits import piece_limits
from s2attn.schedule.pieces import Schedule, plan_by_length, plan_by_range
from s2attn.schedule.stream_k import StreamK, list_pieces, most_pieces, stream_k, stream_k_programs

__all__ = [
    "CUTS",
    "Cut",
    "RowLengths",
    "Schedule",
    "StreamK",
    "choose_cut",
    "list_pieces",
    "most_pieces",
    "piece_limits",
    "plan_by_length",
    "plan_by_range",
    "stream_k",
    "stream_k_programs",
]
