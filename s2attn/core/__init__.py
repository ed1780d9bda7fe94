"""The lowest room: errors, argument checks, atomic files and the legend of dimensions. Standard library only.

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

from s2attn.core.errors import BLOCKS, Unsupported, bad_kind, bad_value, check_block, check_bool, check_int
from s2attn.core.files import StrPath, as_path, atomic_write, write_text

__all__ = [
    "BLOCKS",
    "StrPath",
    "Unsupported",
    "as_path",
    "atomic_write",
    "bad_kind",
    "bad_value",
    "check_block",
    "check_bool",
    "check_int",
    "write_text",
]
