"""Named patterns and recipes from the literature, with their published settings as defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from s2attn.core import bad_value
from s2attn.patterns.base import Pattern, check_number
from s2attn.patterns.chosen import Random
from s2attn.patterns.compose import PerHead
from s2attn.patterns.grid import Local, LongNet, Power, Stride
from s2attn.patterns.recipe import Recipe
from s2attn.patterns.token import Dense, Global, Sink, Window


def s2(local: int = 16, stride: int = 8, block: int = 64) -> Pattern:
    """S2-Attention (arXiv:2407.17678): ``local`` whole blocks, and every ``stride``-th block, shifted by KV head.

    Of n heads, head h is shifted by ``h * max(1, stride // n)`` blocks, in every layer, as in the original code.
    """
    return Local(local, block) | Stride(stride, offset="spread", block=block)


def phi3_small(local: int = 16, stride: int = 8, block: int = 64, dense_every: int = 2) -> Recipe:
    """Phi-3-small's attention (arXiv:2404.14219): stripes per query head, offset +1, every 2nd layer dense."""
    stripes = Stride(stride, offset="spread", shift=1, block=block, heads="query")
    return Recipe(Local(local, block) | stripes, dense_every=dense_every)


def power_attention(sink: int = 256, local: int = 5, base: int = 2, block: int = 256) -> Pattern:
    """PowerAttention (arXiv:2503.03588): a sink block, ``local`` blocks, and blocks at distances that are powers of two."""
    return Sink(sink) | Local(local, block) | Power(base, block)


def streaming_llm(sink: int = 4, window: int = 1024) -> Pattern:
    """StreamingLLM (arXiv:2309.17453): sink tokens and a sliding window that counts the query itself.

    The released code keeps ``recent_size`` tokens of the past next to the query: its ``recent_size`` is ``window - 1``.
    """
    return Sink(sink) | Window(window)


def duo_attention(retrieval_heads: Iterable[int] = (0,), sink: int = 64, window: int = 256) -> Pattern:
    """DuoAttention (arXiv:2410.10819): retrieval KV heads stay dense, the others keep sinks and a recent window."""
    return PerHead({head: Dense() for head in retrieval_heads}, default=Sink(sink) | Window(window))


def longnet(segment: int = 8, levels: int = 5, block: int = 64) -> Pattern:
    """LongNet (arXiv:2307.02486) on block numbers, as PowerAttention's baseline has it (arXiv:2503.03588)."""
    return LongNet(segment, levels, block)


def longformer(window: int = 512, global_tokens: int = 1) -> Pattern:
    """Longformer (arXiv:2004.05150, section 3.1): a sliding window, and first tokens that see all and are seen by all.

    Args:
        window: even; ``window / 2`` tokens on each side of the query, as published and in Transformers'
            ``attention_window``. A causal call keeps the side before it.
        global_tokens: 1 is the [CLS] token of the published classifiers.
    """
    half = halved("window", window, 0)
    return Global(global_tokens) | Window(half + 1)


def bigbird(window: int = 3, random: int = 3, global_blocks: int = 2, block: int = 64, seed: int = 0) -> Pattern:
    """BigBird (arXiv:2007.14062, section 2): global blocks at both ends, a window of blocks, and random blocks.

    Args:
        window: odd; the query's own block and ``(window - 1) / 2`` blocks on each side. A causal call keeps those before it.
        random: blocks drawn for each query block, 0 for none; unlike in Transformers a draw may hit a block that is seen anyway.
        global_blocks: even; half of them are the first ones and half the last. The last ones have no effect in a causal call.
        block, seed: tokens per block; which blocks are drawn.
    """
    ends, side = halved("global_blocks", global_blocks, 0) * block, halved("window", window, 1)
    pattern = Global(ends, last=ends) | Local(side + 1, block)
    return pattern if random == 0 else pattern | Random(random, seed, block)


def halved(name: str, number: object, odd: int) -> int:
    """Half of an even number of at least 2, or of an odd one (``odd=1``) of at least 1, rounded down."""
    value = check_number(name, number, 2 - odd)
    if value % 2 != odd:
        raise bad_value(name, f"must be {'odd' if odd else 'even'}: it counts both sides", value)
    return value // 2


PRESETS: Mapping[str, Callable[..., Pattern | Recipe]] = {
    make.__name__: make for make in (s2, phi3_small, power_attention, streaming_llm, duo_attention, longnet, longformer, bigbird)
}


def preset(name: str, **settings: Any) -> Pattern | Recipe:
    """A named pattern (or a recipe, where the method is about layers), with its settings changed at will.

    Args:
        name: one of ``s2, phi3_small, power_attention, streaming_llm, duo_attention, longnet, longformer, bigbird``.
        **settings: arguments of the function of that name in ``s2attn.patterns.presets``.

    >>> preset("streaming_llm", window=512)
    Sink(n=4) | Window(n=512)
    """
    if name not in PRESETS:
        raise bad_value("preset", f"must be one of {', '.join(PRESETS)}", repr(name))
    try:
        return PRESETS[name](**settings)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise bad_value("preset settings", f"must be those of {name}", ", ".join(sorted(settings))) from None
