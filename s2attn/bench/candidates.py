"""What `s2attn tune` measures: situations in order of their worth, and the tiles that could suit each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from s2attn.backends.triton.hopper import OPS as HOPPER_OPS
from s2attn.backends.triton.specialised import WIDTHS
from s2attn.backends.triton.table import Situation, density_class
from s2attn.backends.triton.tiles import SHARED_MEMORY, Tiles, choose_tiles, shared_bytes
from s2attn.core import bad_value, check_block, check_int
from s2attn.layout import Layout, build_layout, dense_pairs
from s2attn.patterns import Dense, Local, Pattern, Stride

OPS = ("forward", "dq", "dkv")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HOPPER_MEMORY = SHARED_MEMORY["sm_90"]
RANGES = (16384, 32768)
"""Key ranges, in tokens, that are tried for sparse lists."""


@dataclass(frozen=True)
class Target:
    """One situation, and the problem on which its tiles are measured."""

    situation: Situation
    pattern: Pattern
    seqlen: int
    heads: int
    kv_heads: int

    @property
    def name(self) -> str:
        s = self.situation
        return f"{s.op} {s.dtype} {s.head_dim} wide, block {s.block}, {s.density}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.situation.dtype]

    def layout(self, device: torch.device) -> Layout:
        return build_layout(self.pattern, self.heads, self.kv_heads, seqlen_q=self.seqlen, block=self.situation.block, device=device)


def targets(
    *, dims: Sequence[int], blocks: Sequence[int], ops: Sequence[str] = OPS, dtype: str = "bfloat16", tiny: bool = False
) -> list[Target]:
    """Every combination, for dense, medium and sparse patterns; what most models use comes first.

    Args:
        tiny: problems that Triton's interpreter can do, to see that all of it works.

    >>> [target.name for target in targets(dims=[128], blocks=[64], ops=["dq"])][:2]
    ['dq bfloat16 128 wide, block 64, medium', 'dq bfloat16 128 wide, block 64, sparse']
    """
    for op in ops:
        if op not in OPS:
            raise bad_value("ops", f"must be some of {', '.join(OPS)}", repr(op))
    if dtype not in DTYPES:
        raise bad_value("dtype", f"must be one of {', '.join(DTYPES)}", repr(dtype))
    made = []
    for block in sorted(blocks, key=lambda b: (b != 64, b)):
        check_block("blocks", block)
        for dim in sorted(dims, reverse=True):
            check_int("dims", dim, 1)
            made += [_target(op, dtype, dim, block, name, tiny) for name in ("medium", "sparse", "dense") for op in ops]
    return made


def small_target(situation: Situation) -> Target:
    """A problem of a few tokens for a situation; a kernel compiled for it serves all lengths."""
    return _target(situation.op, situation.dtype, situation.head_dim, situation.block, situation.density, True)


def _target(op: str, dtype: str, dim: int, block: int, density: str, tiny: bool) -> Target:
    scale = 64 // block if block < 64 else 1  # the same tokens in smaller blocks
    patterns: dict[str, Pattern] = {"dense": Dense()}
    if tiny:
        patterns |= {"medium": Local(1, block) | Stride(8, block=block), "sparse": Local(1, block)}
        blocks = {"dense": 3, "medium": 12, "sparse": 20}[density]
        return Target(Situation(op, dtype, dim, dim, block, density), patterns[density], blocks * block, 2, 1)
    patterns |= {"medium": Local(16 * scale, block) | Stride(8, block=block), "sparse": Local(8 * scale, block) | Stride(64, block=block)}
    # Sparse patterns are for long contexts, and there alone a key range can matter.
    return Target(Situation(op, dtype, dim, dim, block, density), patterns[density], 65536 if density == "sparse" else 16384, 16, 4)


def check_density(target: Target, layout: Layout) -> None:
    """The problem must lie in the class of density that it is measured for.

    Raises:
        ValueError: it does not.
    """
    density = layout.rows.entries * layout.block**2 / (layout.heads * dense_pairs(layout))
    if density_class(density) != target.situation.density:
        raise bad_value("pattern", f"must be {target.situation.density} at {target.seqlen} tokens", f"density {density:.3f}")


def fallback(situation: Situation, shared_limit: int) -> Tiles:
    """What a launch takes when nothing was measured."""
    itemsize = 4 if situation.dtype == "float32" else 2
    return choose_tiles(situation.op, situation.head_dim, situation.v_dim, itemsize, situation.block, shared_limit)


def candidates(situation: Situation, shared_limit: int, *, tiny: bool = False) -> list[Tiles]:
    """Tiles worth measuring, the fallback first: those that fit into shared memory, and that so many warps can share.

    The kernels in other forms are the last of them; what is not Hopper refuses them.
    """
    itemsize = 4 if situation.dtype == "float32" else 2
    first = fallback(situation, shared_limit)
    lines, listed, stages = ((32, 64), (32,), (1,)) if tiny else ((32, 64, 128), (16, 32, 64, 128), (2, 3, 4))
    made = [first]
    for line_tokens in lines:
        for listed_tokens in listed:
            for warps in (4, 8):
                # Eight warps on a small product would each hold less than a tensor core takes at once.
                if warps == 8 and line_tokens * listed_tokens < 2048:
                    continue
                made += [Tiles(line_tokens, listed_tokens, warps, count) for count in stages]
    fitting = [t for t in made if shared_bytes(situation.op, t, situation.head_dim, situation.v_dim, itemsize) <= shared_limit]
    if situation.block >= 64 and situation.head_dim in WIDTHS and situation.v_dim in WIDTHS and shared_limit >= HOPPER_MEMORY:
        fitting.append(replace(first, form="specialised"))
        if situation.op in HOPPER_OPS and situation.dtype != "float32":
            fitting.append(replace(first, form="hopper"))
    return list(dict.fromkeys(fitting))
