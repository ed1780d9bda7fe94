"""The lowest room: errors, argument checks and the legend of dimensions. Standard library only.

Dimension legend, used in every docstring:

==== =======================================================
B    batch
T    query tokens of one sequence (``seqlen_q``)
S    key tokens of one sequence (``seqlen_k``)
H    query heads
G    key/value heads; H is a multiple of G
D    head width of q and k; v may have its own
==== =======================================================
"""

from s2attn.core.errors import BLOCKS, Unsupported, bad_kind, bad_value, check_block, check_int, requires

__all__ = ["BLOCKS", "Unsupported", "bad_kind", "bad_value", "check_block", "check_int", "requires"]
