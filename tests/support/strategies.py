"""Random patterns and call shapes for hypothesis; import this module only where hypothesis is installed."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from s2attn.patterns import (
    Blocks,
    ByRange,
    Dense,
    Dilated,
    Global,
    Local,
    LongNet,
    Pattern,
    PerHead,
    Power,
    Random,
    Sink,
    Stride,
    Window,
)

grids = st.sampled_from([16, 32, 64, 128])
heads_by = st.sampled_from(["kv", "query"])


def single_patterns() -> st.SearchStrategy[Pattern]:
    """One pattern of any simple kind, with small settings."""
    small = st.integers(1, 6)
    tokens = st.integers(1, 200)
    offsets = st.one_of(st.just("head"), st.integers(0, 5))
    bits = st.lists(st.lists(st.booleans(), min_size=20, max_size=20), min_size=20, max_size=20)
    return st.one_of(
        st.just(Dense()),
        st.builds(Window, tokens),
        st.builds(Sink, tokens),
        st.builds(Global, tokens),
        st.builds(Local, small, grids),
        st.builds(Stride, small, offsets, shift=st.just(0), block=grids, heads=heads_by),
        st.builds(Power, st.integers(2, 3), grids),
        st.builds(Dilated, small, st.one_of(st.none(), st.integers(1, 12)), grids),
        st.builds(LongNet, st.sampled_from([1, 2, 4]), st.integers(1, 3), grids),
        st.builds(Random, st.integers(1, 3), st.integers(0, 9), grids, heads_by),
        st.builds(Blocks, bits, grids),
    )


def ranged(children: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    """`ByRange` of three ranges, some of which may be left out, around ``children``."""

    def make(cuts: tuple[int, int, int], parts: list[Pattern], open_end: bool) -> Pattern:
        a, b, c = sorted(cuts)
        ends = [(0, a + 1, parts[0]), (a + 1, b + 2, parts[1]), (b + 2 + c % 2, None if open_end else b + c + 4, parts[2])]
        return ByRange(tuple(ends))

    cuts = st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
    return st.builds(make, cuts, st.lists(children, min_size=3, max_size=3), st.booleans())


def patterns() -> st.SearchStrategy[Pattern]:
    """Any pattern: simple ones, joined, by range and per head, to a small depth."""

    def grow(children: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
        return st.one_of(
            st.builds(lambda a, b: a | b, children, children),
            st.builds(lambda a, b: a & b, children, children),
            ranged(children),
            st.builds(lambda a, b, heads: PerHead({0: a}, default=b, heads=heads), children, children, heads_by),
        )

    return st.recursive(single_patterns(), grow, max_leaves=4)


@dataclass(frozen=True)
class CallShape:
    """Head counts and lengths of a call."""

    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    block: int
    causal: bool
    layer: int


def call_shapes(longest: int = 300) -> st.SearchStrategy[CallShape]:
    """Small calls: lengths that are no multiples of anything, more queries than keys, groups of heads."""
    groups = st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (6, 3)])
    lengths = st.tuples(st.integers(1, longest), st.integers(1, longest))
    square = lengths.map(lambda pair: (pair[0], pair[0]))
    return st.builds(
        lambda group, pair, block, causal, layer: CallShape(group[0], group[1], pair[0], pair[1], block, causal, layer),
        groups,
        st.one_of(square, lengths),
        st.sampled_from([16, 32, 64, 128, 256]),
        st.booleans(),
        st.integers(0, 2),
    )
