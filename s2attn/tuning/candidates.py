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
from s2attn.schedule import CUTS
from s2attn.tuning.paged import DecodeCase

OPS = ("forward", "dq", "dkv", "decode")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HOPPER_MEMORY = SHARED_MEMORY["sm_90"]
RANGES = (16384, 32768)
"""Key ranges, in tokens, that are tried for sparse lists."""
FINALISTS = 5
PAGES = (64, 16)
BATCHES = ((1, False), (16, False), (64, True))
"""Sequences of the batches on which decoding is measured, and whether their lengths differ."""


@dataclass(frozen=True)
class Target:
    """One situation, and the problem on which its tiles are measured.

    Attributes:
        cases: for "decode" there are several, of sequences with up to ``seqlen`` tokens; the tiles serve all of them.
    """

    situation: Situation
    pattern: Pattern
    seqlen: int
    heads: int
    kv_heads: int
    cases: tuple[DecodeCase, ...] = ()

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
    if situation.op != "decode":
        return _target(situation.op, situation.dtype, situation.head_dim, situation.block, situation.density, True)
    # These kernels are compiled for numbers of heads, and those that join only where rows are long enough to be cut.
    made = _target("decode", situation.dtype, situation.head_dim, situation.block, situation.density, False)
    return _paged(replace(made, seqlen=4096), [(size, 1, False) for size in PAGES])


def _target(op: str, dtype: str, dim: int, block: int, density: str, tiny: bool) -> Target:
    scale = 64 // block if block < 64 else 1  # the same tokens in smaller blocks
    patterns: dict[str, Pattern] = {"dense": Dense()}
    if tiny:
        patterns |= {"medium": Local(1, block) | Stride(8, block=block), "sparse": Local(1, block)}
        blocks = {"dense": 3, "medium": 12, "sparse": 20}[density]
        made = Target(Situation(op, dtype, dim, dim, block, density), patterns[density], blocks * block, 2, 1)
        return _paged(replace(made, heads=8, kv_heads=2), [(16, 1, False), (32, 2, True)]) if op == "decode" else made
    patterns |= {"medium": Local(16 * scale, block) | Stride(8, block=block), "sparse": Local(8 * scale, block) | Stride(64, block=block)}
    # Sparse patterns are for long contexts, and there alone a key range can matter.
    made = Target(Situation(op, dtype, dim, dim, block, density), patterns[density], 65536 if density == "sparse" else 16384, 16, 4)
    if op == "decode":
        kinds = [(size, batch, ragged) for size in PAGES for batch, ragged in BATCHES]
        return _paged(replace(made, seqlen=32768, heads=32, kv_heads=8), kinds)
    return made


def _paged(target: Target, kinds: Sequence[tuple[int, int, bool]]) -> Target:
    """The target with a case for each page size and batch."""
    s, cases = target.situation, []
    shape = {"heads": target.heads, "kv_heads": target.kv_heads, "head_dim": s.head_dim}
    for size, batch, ragged in kinds:
        name = f"{batch} sequence{'s' if batch > 1 else ''}{', ragged' if ragged else ''}, pages of {size}"
        cases.append(DecodeCase(name, target.pattern, batch, target.seqlen, page_size=size, ragged=ragged, dtype=s.dtype, **shape))
    return replace(target, cases=tuple(cases))


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
    made = [first, *(_decoding(first, tiny) if situation.op == "decode" else _attending(tiny))]
    fitting = [t for t in made if shared_bytes(situation.op, t, situation.head_dim, situation.v_dim, itemsize) <= shared_limit]
    if situation.block >= 64 and situation.head_dim in WIDTHS and situation.v_dim in WIDTHS and shared_limit >= HOPPER_MEMORY:
        fitting += [replace(first, form="specialised")] if situation.op != "decode" else []
        if situation.op in HOPPER_OPS and situation.dtype != "float32":
            fitting.append(replace(first, form="hopper"))
    return list(dict.fromkeys(fitting))


def _attending(tiny: bool) -> list[Tiles]:
    lines, listed, stages = ((32, 64), (32,), (1,)) if tiny else ((32, 64, 128), (16, 32, 64, 128), (2, 3, 4))
    made = []
    for line_tokens in lines:
        for listed_tokens in listed:
            for warps in (4, 8):
                # Eight warps on a small product would each hold less than a tensor core takes at once.
                if warps == 8 and line_tokens * listed_tokens < 2048:
                    continue
                made += [Tiles(line_tokens, listed_tokens, warps, count) for count in stages]
    return made


def _decoding(first: Tiles, tiny: bool) -> list[Tiles]:
    """One new token of a sequence fills no tile, so its height is left as it is, which is that of prompts."""
    if tiny:
        return [replace(first, listed_tokens=32, num_stages=1)]
    warps = {16: (2, 4), 32: (2, 4), 64: (4, 8), 128: (4, 8)}
    return [replace(first, listed_tokens=n, num_warps=w, num_stages=count) for n in warps for w in warps[n] for count in (2, 3, 4)]


def refined(target: Target, best: Sequence[Tiles], *, tiny: bool = False) -> list[Tiles]:
    """What is tried after all candidates were timed: the best of them with key ranges, or with every way of cutting lists."""
    s = target.situation
    if s.op == "decode":
        return [replace(tiles, cut=cut) for tiles in best[: 1 if tiny else FINALISTS] for cut in CUTS]
    if s.density == "sparse" and s.op != "dkv" and not tiny:
        return [replace(best[0], key_range=tokens, form="plain") for tokens in RANGES if tokens < target.seqlen]
    return []


def compiled_ahead(situation: Situation, shared_limit: int) -> list[tuple[Situation, Tiles]]:
    """What is compiled before anything is measured: of decoding every kernel that may cut the lists; medium and sparse ones share it."""
    found = candidates(situation, shared_limit)
    if situation.op != "decode":
        return [(situation, tiles) for tiles in found]
    shared = replace(situation, density="dense" if situation.density == "dense" else "medium")
    return [(shared, replace(tiles, cut=cut)) for tiles in found for cut in ("split", "stream")]
