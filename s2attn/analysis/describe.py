"""`describe`: what a pattern is worth, in numbers, before a GPU is spent on it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from s2attn.analysis import density as _density
from s2attn.analysis.advice import advice_of, warnings_of
from s2attn.analysis.context import describe_context
from s2attn.analysis.cover import cover_of, last_row, least_group_row
from s2attn.analysis.density import BACKWARD, Listed
from s2attn.analysis.efficiency import cache_horizon, cached_tokens, counter_example
from s2attn.analysis.reach import reach_of
from s2attn.analysis.report import LayerReport, Report
from s2attn.analysis.stack import Key, Stack, stack_of
from s2attn.core import bad_value, check_int
from s2attn.layout import Layout
from s2attn.patterns import Pattern, Recipe


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
