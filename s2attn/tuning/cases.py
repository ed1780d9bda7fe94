"""What is measured: a case is a value, a suite is a list of cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2attn.core import bad_value, check_block, check_int
from s2attn.patterns import Dense, Local, Pattern, Power, Sink, Stride, Window

OPS = {"forward": 1.0, "forward_backward": 3.5, "backward": 2.5}
"""What can be timed, and its floating-point operations in those of a forward pass."""
SHORT = {"forward": "fwd", "forward_backward": "fwd+bwd", "backward": "bwd"}
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class AttentionCase:
    """Causal self-attention of one shape with one pattern, random normal inputs; nothing in it depends on a device.

    Attributes:
        op: ``"forward"``; ``"backward"`` for the gradients of q, k and v alone, behind a forward pass that is not timed; or
            ``"forward_backward"`` for both together.
        block: tokens per block, for us and for every block-sparse peer that can have it.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        all_peers: peers that take long to prepare take part, too.
        halves: names of the cases that hold this one's heads in two parts, so that the times can be compared.
    """

    name: str
    op: str
    pattern: Pattern
    seqlen: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    batch: int = 1
    block: int = 64
    dtype: str = "float32"
    all_peers: bool = False
    halves: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise bad_value("op", f"must be one of {', '.join(OPS)}", repr(self.op))
        if self.dtype not in DTYPES:
            raise bad_value("dtype", f"must be one of {', '.join(DTYPES)}", repr(self.dtype))
        for field in ("seqlen", "heads", "kv_heads", "head_dim", "batch"):
            check_int(field, getattr(self, field), 1)
        if self.heads % self.kv_heads:
            raise bad_value("heads", f"must be a multiple of kv_heads ({self.kv_heads})", self.heads)
        check_block("block", self.block)

    @property
    def backward(self) -> bool:
        return self.op != "forward"

    @property
    def pairs_dense(self) -> int:
        """(query, key) pairs of dense causal attention, all heads and batch entries."""
        return self.batch * self.heads * self.seqlen * (self.seqlen + 1) // 2

    def flops(self, pairs: int) -> int:
        """Floating-point operations for so many listed pairs: 4 D each forward, 2.5 times as many backward."""
        return round(4 * self.head_dim * pairs * OPS[self.op])

    def facts(self) -> dict[str, Any]:
        """The case as plain values for a record."""
        shape = {field: getattr(self, field) for field in ("seqlen", "heads", "kv_heads", "head_dim", "batch", "block")}
        more = {"halves": list(self.halves)} if self.halves else {}
        return {"case": self.name, "op": self.op, "pattern": repr(self.pattern), "dtype": self.dtype, **shape, **more}


@dataclass(frozen=True)
class LayoutCase:
    """Building the block index of a long sequence, nothing else."""

    name: str
    pattern: Pattern
    seqlen: int
    heads: int = 32
    block: int = 64

    def facts(self) -> dict[str, Any]:
        """The case as plain values for a record."""
        shape = {"seqlen": self.seqlen, "heads": self.heads, "block": self.block}
        return {"case": self.name, "op": "layout", "pattern": repr(self.pattern), **shape}


Case = AttentionCase | LayoutCase
CPU_OPS = ("forward", "forward_backward")
S2 = Local(16) | Stride(8)
SPARSER = Local(8) | Stride(16)


def tokens(n: int) -> str:
    """A number of tokens, short.

    >>> tokens(16384), tokens(1000)
    ('16k', '1000')
    """
    return f"{n >> 10}k" if n and n % 1024 == 0 else str(n)


def length_cases(lengths: Sequence[int], *, backward: bool = True, pattern: Pattern = S2) -> list[Case]:
    """One pattern (S2 when left out), 8 heads of width 64, at every length, forward and perhaps backward."""
    ops = CPU_OPS if backward else CPU_OPS[:1]
    return [AttentionCase(f"{tokens(seqlen)} {SHORT[op]}", op, pattern, seqlen) for op in ops for seqlen in lengths]


def cpu_suite(lengths: Sequence[int]) -> list[Case]:
    """The suite ``cpu``.

    S2 at every length; a sparser S2 (12 % at 16k) at the last; GQA, other patterns and dense at the middle one; a layout of 1M tokens.
    """
    middle = sorted(lengths)[len(lengths) // 2]
    shapes = [(8, 2), (16, 4)]
    patterns = {"power": Sink(64) | Local(5) | Power(), "sink-window": Sink(64) | Window(1024), "dense": Dense()}
    cases: list[Case] = length_cases(lengths)
    for op in CPU_OPS:
        cases.append(AttentionCase(f"{tokens(max(lengths))} {SHORT[op]}, sparser", op, SPARSER, max(lengths)))
        cases += [AttentionCase(f"{tokens(middle)} {SHORT[op]}, {h}/{g} heads", op, S2, middle, heads=h, kv_heads=g) for h, g in shapes]
        cases += [AttentionCase(f"{tokens(middle)} {SHORT[op]}, {name}", op, pattern, middle) for name, pattern in patterns.items()]
    return [*cases, LayoutCase("layout of 1M tokens", Window(1024) | Stride(64), 1 << 20)]


def quick_suite(lengths: Sequence[int]) -> list[Case]:
    """A few seconds of the same kinds of cases, for tests and for a first look; its numbers mean nothing."""
    pattern, shape = Local(2, 32) | Stride(4, block=32), {"heads": 4, "kv_heads": 2, "head_dim": 16, "block": 32}
    cases: list[Case] = [AttentionCase(f"{tokens(n)} {SHORT[op]}", op, pattern, n, **shape) for n in lengths for op in CPU_OPS]
    return [*cases, LayoutCase("layout", Window(64) | Stride(8), 4096, heads=4)]
