"""`describe`: what a pattern is worth, in numbers, before a GPU is spent on it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2attn.analysis import density as _density
from s2attn.analysis.context import ContextReport, describe_context
from s2attn.analysis.cover import Cover, cover_of, last_row, least_group_row
from s2attn.analysis.density import BACKWARD, Listed
from s2attn.analysis.efficiency import CounterExample, cache_horizon, cached_tokens, counter_example
from s2attn.analysis.guidelines import Advice
from s2attn.analysis.reach import Reach, reach_of
from s2attn.analysis.stack import Key, Stack, stack_of
from s2attn.core import bad_value, check_int
from s2attn.layout import Layout
from s2attn.patterns import Pattern, Recipe


@dataclass(frozen=True)
class LayerReport:
    """The figures of one layer; those of `Report` with the same names, for this layer alone.

    Attributes:
        group_density: blocks that the query heads of a KV head read together over dense blocks, the mean over KV heads.
        cover: what all heads of the layer read together for the last query block.
        group_cover: what the KV head that reads the least reads for it, its query heads together.
    """

    layer: int
    density: float
    density_square: float
    block_density: float
    group_density: float
    listed: Listed
    flops_forward: int
    flops_backward: int
    kv_bytes: int
    layout_bytes: int
    tile_bytes: int
    cache_bytes: int | None
    counter_example: CounterExample | None
    cover: Cover
    group_cover: Cover

    @property
    def dense(self) -> bool:
        """Every pair that dense attention has is allowed."""
        return self.density == 1.0


@dataclass(frozen=True)
class Report:
    """What `describe` found; ``str(report)`` is readable text and ``report.to_dict()`` plain JSON values.

    Figures are for one sequence (batch 1) and all described layers together, unless said otherwise.

    Attributes:
        pattern: the pattern, recipe or layout as its repr.
        num_heads, num_kv_heads, seqlen, block, causal, layers, first_layer, head_dim, dtype_bytes: what was asked.
        density: allowed (query, key) pairs over those of dense attention under the same causality (the *causal triangle*), the mean
            over query heads and layers.
        density_square: allowed pairs over the full square ``seqlen * seqlen``; what some papers call density.
        block_density: listed blocks over those of dense attention; what a kernel's time follows.
        group_density: the same for the blocks that a KV head's query heads read together; what the K/V traffic of decoding follows.
        ideal_speedup: 1 / density: over dense attention under the same causality, were time proportional to pairs.
        listed: listed blocks per query head, over the heads of all layers.
        imbalance: the busiest head over the mean of its layer, in the layer where that is worst.
        flops_forward, flops_backward: matrix products of attention, ``4 * head_dim`` per pair, and 2.5 times that.
        dense_flops_forward: the same of dense attention under the same causality.
        kv_bytes: bytes of K and V that are read at least once.
        layout_bytes: bytes of the block lists with their mask tiles; ``tile_bytes`` the tiles alone, which stand in for a mask of
            ``mask_bytes`` (seqlen x seqlen bools, a layer).
        cache_bytes: bytes of K and V that a server keeps after eviction at ``seqlen``: blocks that the query at ``seqlen - 1`` or a later
            one reads; for heads that are not KV-efficient, one of the next ``cache_horizon`` tokens. None where there is no such
            thing (not causal) or it cannot be known (a layout ends at its last token). ``dense_cache_bytes``: all of K and V.
        kv_efficient: a block that is left out by a query block of a KV head is not read by a later one, in any layer; None when not causal.
        counter_example: the first one when it is not.
        cover: what all heads of all layers together read for the last query block.
        complete_after: so many layers cover every earlier block; None when all of them do not.
        reach: what the last block sees through 1, 2, ... layers.
        per_layer: the figures layer by layer.
        context: what context parallelism moves on ``ranks`` ranks; None where it was not asked for.
        warnings: what is likely to be a mistake.
        advice: S2-Attention's guidelines (arXiv:2407.17678, section 3) that are not followed, each with the experiment that puts it to
            the test. Each sentence stands only where it is true.
    """

    pattern: str
    num_heads: int
    num_kv_heads: int
    seqlen: int
    block: int
    causal: bool
    layers: int
    first_layer: int
    head_dim: int
    dtype_bytes: int
    density: float
    density_square: float
    block_density: float
    group_density: float
    ideal_speedup: float
    listed: Listed
    imbalance: float
    flops_forward: int
    flops_backward: int
    dense_flops_forward: int
    kv_bytes: int
    layout_bytes: int
    tile_bytes: int
    mask_bytes: int
    cache_bytes: int | None
    dense_cache_bytes: int
    cache_horizon: int
    kv_efficient: bool | None
    counter_example: CounterExample | None
    cover: Cover
    complete_after: int | None
    reach: Reach
    per_layer: tuple[LayerReport, ...]
    warnings: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()
    context: ContextReport | None = None

    @property
    def complete(self) -> bool:
        """Heads and layers together read everything."""
        return self.cover.complete

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON values; what is not finite is None."""
        values = _plain(dataclasses.asdict(self))
        values["complete"] = self.complete
        return values

    def __str__(self) -> str:
        from s2attn.analysis.text import report_text

        return report_text(self)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(
    pattern: Pattern | Recipe | Layout,
    num_heads: int,
    num_kv_heads: int | None = None,
    seqlen: int | None = None,
    *,
    layers: int = 1,
    block: int | None = None,
    causal: bool = True,
    head_dim: int = 128,
    dtype_bytes: int = 2,
    layer: int = 0,
    ranks: int | None = None,
) -> Report:
    """Judge a pattern: density, speed-up, work, memory, eviction, completeness and reach, with warnings and advice.

    Nothing of size ``seqlen * seqlen`` is made; equal heads and equal layers are worked out once.

    Args:
        pattern: a pattern, a recipe (then its layers differ), or a layout of one sequence with as many queries as keys.
        num_heads, num_kv_heads: query heads, and key/value heads (as many by default).
        seqlen: tokens; a layout brings its own.
        layers: how many layers, from number ``layer`` on, are described together.
        block: tokens per block of what is counted; by default the finest that a layer's layout would have.
        causal: whether keys after the query are cut.
        head_dim, dtype_bytes: for FLOPs and bytes.
        ranks: also count what context parallelism on so many ranks moves; see `describe_context`, which is for long sequences too.

    Raises:
        ValueError, TypeError: naming the argument, the rule and what came.

    >>> from s2attn.patterns import Local, Stride
    >>> report = describe(Local(1) | Stride(16), num_heads=32, num_kv_heads=8, seqlen=4096)
    >>> report.complete, str(report.cover), report.cover.missing
    (False, '31 of 63 earlier blocks', 'j % 16 in {1..8} among blocks 1..56')
    """
    head_dim, dtype_bytes = check_int("head_dim", head_dim, 1), check_int("dtype_bytes", dtype_bytes, 1)
    stack = stack_of(pattern, num_heads, num_kv_heads, seqlen, layers=layers, block=block, causal=causal, layer=layer)
    token_bytes = 2 * head_dim * dtype_bytes
    first = {}
    for number, keys in enumerate(stack.layers):
        if keys not in first:
            first[keys] = _layer_report(stack, number, head_dim, token_bytes)
    per_layer = tuple(_renumbered(first[keys], stack.first_layer + number) for number, keys in enumerate(stack.layers))
    report = _report(stack, repr(pattern), head_dim, dtype_bytes, per_layer)
    from s2attn.analysis.advice import advice_of, warnings_of

    context = None
    if ranks is not None:
        if isinstance(pattern, Layout):
            raise bad_value("ranks", "must be left out when a Layout is given: ranks make lists of their own from a pattern", ranks)
        sizes: Any = {"head_dim": head_dim, "dtype_bytes": dtype_bytes, "block": block, "causal": causal}
        context = describe_context(pattern, num_heads, num_kv_heads, seqlen, ranks=ranks, layers=layers, layer=layer, **sizes)
    words: Any = {"warnings": tuple(warnings_of(stack, report)), "advice": tuple(advice_of(stack, report))}
    return dataclasses.replace(report, **words, context=context)


def _renumbered(report: LayerReport, layer: int) -> LayerReport:
    example = report.counter_example and dataclasses.replace(report.counter_example, layer=layer)
    return dataclasses.replace(report, layer=layer, counter_example=example)


def _layer_report(stack: Stack, layer: int, head_dim: int, token_bytes: int) -> LayerReport:
    pairs, counts = _density.pairs_per_head(stack, layer), _density.listed_per_head(stack, layer)
    flops = _density.forward_flops(sum(pairs), head_dim)
    kept = cached_tokens(stack, layer)
    layout_bytes, tile_bytes = _density.layout_bytes(stack, layer)
    listed = Listed.of(counts)
    return LayerReport(
        layer=stack.first_layer + layer,
        density=sum(pairs) / len(pairs) / _density.dense_pairs(stack),
        density_square=sum(pairs) / len(pairs) / stack.seqlen**2,
        block_density=listed.mean / _density.dense_blocks(stack),
        group_density=_density.group_density(stack, layer),
        listed=listed,
        flops_forward=flops,
        flops_backward=int(BACKWARD * flops),
        kv_bytes=_density.kv_tokens_read(stack, layer) * token_bytes,
        layout_bytes=layout_bytes,
        tile_bytes=tile_bytes,
        cache_bytes=None if kept is None else sum(kept) * token_bytes,
        counter_example=counter_example(stack, layer) if stack.causal else None,
        cover=cover_of(last_row(stack, layer)),
        group_cover=cover_of(least_group_row(stack, layer)),
    )


def _report(stack: Stack, pattern: str, head_dim: int, dtype_bytes: int, layers: tuple[LayerReport, ...]) -> Report:
    mean_density = _mean([one.density for one in layers])
    flops = sum(one.flops_forward for one in layers)
    kv_bytes = stack.num_kv_heads * stack.seqlen * 2 * head_dim * dtype_bytes * len(layers)
    kept = [one.cache_bytes for one in layers if one.cache_bytes is not None]
    examples = [one.counter_example for one in layers if one.counter_example is not None]
    seen, complete_after = _cover_by_layers(stack)
    return Report(
        pattern=pattern,
        num_heads=stack.num_heads,
        num_kv_heads=stack.num_kv_heads,
        seqlen=stack.seqlen,
        block=stack.block,
        causal=stack.causal,
        layers=len(layers),
        first_layer=stack.first_layer,
        head_dim=head_dim,
        dtype_bytes=dtype_bytes,
        density=mean_density,
        density_square=_mean([one.density_square for one in layers]),
        block_density=_mean([one.block_density for one in layers]),
        group_density=_mean([one.group_density for one in layers]),
        ideal_speedup=1 / mean_density if mean_density else math.inf,
        listed=Listed.of([count for number in range(len(layers)) for count in _density.listed_per_head(stack, number)]),
        imbalance=max(one.listed.imbalance for one in layers),
        flops_forward=flops,
        flops_backward=int(BACKWARD * flops),
        dense_flops_forward=_density.forward_flops(_density.dense_pairs(stack), head_dim) * stack.num_heads * len(layers),
        kv_bytes=sum(one.kv_bytes for one in layers),
        layout_bytes=sum(layers[number].layout_bytes for number in _distinct_layers(stack)),
        tile_bytes=sum(layers[number].tile_bytes for number in _distinct_layers(stack)),
        mask_bytes=stack.seqlen**2,
        cache_bytes=sum(kept) if len(kept) == len(layers) else None,
        dense_cache_bytes=kv_bytes,
        cache_horizon=cache_horizon(stack),
        kv_efficient=not examples if stack.causal else None,
        counter_example=examples[0] if examples else None,
        cover=cover_of(seen),
        complete_after=complete_after,
        reach=reach_of(stack),
        per_layer=layers,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _distinct_layers(stack: Stack) -> list[int]:
    """The first of every kind of layer: layers of one kind share a layout."""
    first: dict[tuple[Key, ...], int] = {}
    for number, keys in enumerate(stack.layers):
        first.setdefault(keys, number)
    return list(first.values())


def _cover_by_layers(stack: Stack) -> tuple[np.ndarray, int | None]:
    """What the layers together read for the last query block, and how many of them it took to read all of it."""
    seen, complete_after = np.zeros(stack.num_blocks, dtype=bool), None
    for number in range(len(stack.layers)):
        seen |= last_row(stack, number)
        if complete_after is None and seen[:-1].all():
            complete_after = number + 1
    return seen, complete_after
