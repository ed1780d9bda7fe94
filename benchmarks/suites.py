"""The suites `forward` and `backward`: what is timed on a graphics card, the most valuable cases first, and the same in tiny for a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from s2attn.patterns import Dense, Local, Pattern, PerHead, Power, Random, Sink, Stride, Window
from s2attn.tuning.cases import SHORT, AttentionCase, tokens

FULL: dict[str, Any] = {"dtype": "bfloat16", "head_dim": 128, "heads": 32, "kv_heads": 8, "block": 64}
TINY: dict[str, Any] = {"dtype": "float32", "head_dim": 16, "heads": 4, "kv_heads": 2, "block": 16}
S2 = Local(16) | Stride(8)
POWER = Sink(256) | Local(5, 256) | Power(2, 256)
DENSITIES = ((16, 2), (16, 4), (16, 16), (8, 16), (8, 32), (4, 32), (4, 64), (2, 64))
"""Local blocks and strides of the sweep over density, from about one half to about 2 % at 32k."""


def attention_suite(op: str, size: str = "full") -> list[AttentionCase]:
    """The cases of suite ``op`` (``"forward"`` or ``"backward"``), in the order in which they are worth having.

    Args:
        size: ``"full"`` for a graphics card; ``"tiny"`` for a CPU, the same kinds of cases, whose numbers mean nothing.
    """
    cases = _tiny() if size == "tiny" else [*_headline(), *_sweep(), *mixed(32, 8, 32768, FULL), *_shapes(), *_lengths()]
    return [_for(case, op) for case in cases]


def _for(case: AttentionCase, op: str) -> AttentionCase:
    return replace(case, op=op, name=f"{case.name} {SHORT[op]}", halves=tuple(f"{name} {SHORT[op]}" for name in case.halves))


def _case(name: str, pattern: Pattern, seqlen: int, **shape: Any) -> AttentionCase:
    return AttentionCase(name, "forward", pattern, seqlen, **{**FULL, **shape})


def _headline() -> list[AttentionCase]:
    """The milestone shape at 32k, our kernels on a dense pattern, and the shapes of the S2 paper at 128k."""
    shared = Local(16) | Stride(64)
    return [
        _case("32k S2", S2, 32768, all_peers=True),
        _case("32k dense", Dense(), 32768),
        _case("128k S2 7B", Local(16) | Stride(32), 131072, kv_heads=32),
        _case("128k S2 1.3B", Local(16) | Stride(16), 131072, heads=16, kv_heads=16),
        _case("128k S2 70B, stripes per KV head", shared, 131072, heads=64),
        _case("128k power", POWER, 131072, kv_heads=32, block=128),
        _case("128k S2 70B, stripes per query head", Local(16) | Stride(64, heads="query"), 131072, heads=64),
    ]


def _sweep() -> list[AttentionCase]:
    """From dense to 2 % at 32k; 12 % again at 128k, where a row has more tiles."""
    cases = [_case(f"32k S2 {local}/{stride}", Local(local) | Stride(stride), 32768) for local, stride in DENSITIES]
    return [*cases, _case("128k S2 16/8", S2, 131072)]


def mixed(heads: int, kv_heads: int, seqlen: int, shape: dict[str, Any]) -> list[AttentionCase]:
    """Half of the heads dense and half of them at 5 %, together and each half alone."""
    sparse = Local(4, shape["block"]) | Stride(32, block=shape["block"])
    names = [f"{tokens(seqlen)} mixed heads, the {half} half" for half in ("dense", "sparse")]
    both = PerHead({head: Dense() for head in range(kv_heads // 2)}, default=sparse)
    whole: dict[str, Any] = {**shape, "heads": heads, "kv_heads": kv_heads}
    half: dict[str, Any] = {**shape, "heads": heads // 2, "kv_heads": kv_heads // 2}
    return [
        AttentionCase(f"{tokens(seqlen)} mixed heads", "forward", both, seqlen, **whole, halves=tuple(names)),
        AttentionCase(names[0], "forward", Dense(), seqlen, **half),
        AttentionCase(names[1], "forward", sparse, seqlen, **half),
    ]


def _shapes() -> list[AttentionCase]:
    """Other patterns, heads, widths and blocks at 32k."""
    patterns = {"sink+window": Sink(64) | Window(4096), "power": Sink(64) | Local(5) | Power(), "random": Local(4) | Random(16)}
    cases = [_case(f"32k {name}", pattern, 32768, all_peers=name == "sink+window") for name, pattern in patterns.items()]
    cases += [_case(f"32k S2, {h}/{g} heads", S2, 32768, heads=h, kv_heads=g) for h, g in ((32, 32), (16, 16), (64, 8))]
    cases.append(_case("32k S2, width 64", S2, 32768, head_dim=64))
    grids = {32: Local(32, 32) | Stride(8, block=32), 128: Local(8, 128) | Stride(8, block=128)}
    return [*cases, *(_case(f"32k S2, block {block}", pattern, 32768, block=block) for block, pattern in grids.items())]


def _lengths() -> list[AttentionCase]:
    return [_case(f"{tokens(n)} S2", S2, n) for n in (8192, 65536, 4096, 16384)]


def _tiny() -> list[AttentionCase]:
    """A case of every kind, at a few hundred tokens."""
    s2 = Local(2, 16) | Stride(4, block=16)
    patterns = {"S2": s2, "dense": Dense(), "power": Sink(16) | Local(2, 16) | Power(2, 16), "sink+window": Sink(5) | Window(33)}
    cases = [AttentionCase(f"tiny {name}", "forward", pattern, 192, **TINY) for name, pattern in patterns.items()]
    half: dict[str, Any] = {**TINY, "dtype": "bfloat16"}
    cases.append(AttentionCase("tiny random", "forward", Local(1, 16) | Random(2, block=16), 150, **half))
    return [*cases, *mixed(4, 2, 192, TINY)]
