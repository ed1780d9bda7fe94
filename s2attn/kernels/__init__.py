"""Triton kernels over grouped block lists, put together from the jit functions of `s2attn.kernels.pieces`.

Every kernel works on *tiles*: ``BLOCK_M`` query tokens against ``BLOCK_N`` key tokens. A tile is chosen apart from the layout's block
``RB``: several small blocks share a tile (MergeQ for queries, gathered rows for keys), and a large block is walked in several tiles.
Products are asked for in "ieee" precision: float32 stays float32; 16-bit numbers know no other.
"""
