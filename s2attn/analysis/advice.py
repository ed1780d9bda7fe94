"""Warnings and advice: sentences about a report, each given only where it is true."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from s2attn.analysis.cover import cover_of, last_row
from s2attn.analysis.guidelines import GUIDELINES, Advice
from s2attn.analysis.report import Report
from s2attn.analysis.stack import Key, Lists, Stack

_UNEVEN = 1.5
_GROUP_READS_MORE = 1.5


def warnings_of(stack: Stack, report: Report) -> Iterator[str]:
    """What is likely to be a mistake: context that nobody reads, and rows that read nothing."""
    if not report.complete:
        reached = f" (through {whole} layers it still learns of all)" if (whole := report.reach.layers_to_all) else ""
        yield (
            f"Incomplete: {_all_heads(stack)} of {_layers(stack)} together read {report.cover} for the last query block{reached}; "
            f"never read: {report.cover.missing}."
        )
    else:
        yield from _only_dense_layers_are_complete(stack, report)
    if report.reach.stalled:
        seen = f"{report.reach.blocks[-1]} of {report.reach.total} blocks"
        yield f"Reach stalls: the last block sees {seen} through {report.layers} layers, and the last layer brought nothing new."
    empty = max(stack.once(_empty_rows, key) for keys in stack.layers for key in keys)
    if empty:
        yield f"Empty rows: in some head {empty} of {stack.num_blocks} query blocks read no block at all; their output is 0."


def _empty_rows(stack: Stack, key: Key) -> int:
    return int((np.diff(stack.lists(key).ptr) == 0).sum())


def _only_dense_layers_are_complete(stack: Stack, report: Report) -> Iterator[str]:
    sparse = [number for number, one in enumerate(report.per_layer) if not one.dense]
    if not sparse or len(sparse) == len(report.per_layer):
        return
    seen = np.zeros(stack.num_blocks, dtype=bool)
    for number in sparse:
        seen |= last_row(stack, number)
    cover = cover_of(seen)
    if not cover.complete:
        yield (
            f"Complete through its dense layers only: {_all_heads(stack)} of the other layers together read {cover}; "
            f"never read there: {cover.missing}."
        )


def _all_heads(stack: Stack) -> str:
    heads = f"{stack.num_heads} query heads" if len(stack.layers[0]) > stack.num_kv_heads else f"{stack.num_kv_heads} KV heads"
    return "all heads" if stack.num_kv_heads == 1 else f"all {heads}"


def _layers(stack: Stack) -> str:
    first, last = stack.first_layer, stack.first_layer + len(stack.layers) - 1
    return f"layer {first}" if first == last else f"layers {first}..{last}"


def advice_of(stack: Stack, report: Report) -> Iterator[Advice]:
    """S2-Attention's guidelines (arXiv:2407.17678, section 3) that the pattern does not follow, each with its experiment."""
    yield from (Advice(text, GUIDELINES[key]) for key, text in _not_followed(stack, report))


def _not_followed(stack: Stack, report: Report) -> Iterator[tuple[str, str]]:
    """A key of `GUIDELINES`, and the sentence."""
    sparse = [number for number, one in enumerate(report.per_layer) if not one.dense]
    if not sparse:
        return
    alike = [number for number in sparse if len(set(stack.groups(number))) == 1]
    if alike and stack.num_kv_heads > 1:
        yield (
            "heads",
            f"Heads do not differ: {_some(alike, stack)} all KV heads read the same blocks. "
            "Stride shifts its blocks by head, PerHead names them.",
        )
    if not report.complete:
        yield (
            "union",
            "Let the union of the heads cover the context: Stride does when it is no wider than the number of KV heads times layers.",
        )
    if report.counter_example is not None:
        yield (
            "dropped",
            f"Not KV-efficient ({report.counter_example}), so its cache cannot be freed safely. "
            "Blocks at absolute positions (Stride, Sink) and windows never come back.",
        )
    if len(sparse) == len(report.per_layer) > 1:
        yield "dense", "No layer is dense. S2-Attention keeps a few layers dense: Recipe(pattern, dense_layers=[...])."
    bare = [number for number in sparse if not all(stack.once(_has_local, key) for key in dict.fromkeys(stack.layers[number]))]
    if bare:
        yield (
            "window",
            f"No local window: {_some(bare, stack)} some head does not read its own block and the one before it in every row. "
            "Add Local or Window.",
        )
    if report.group_density > _GROUP_READS_MORE * report.block_density:
        yield (
            "groups",
            f"The query heads of a group read different blocks: one reads {report.block_density:.1%} of them, a group together "
            f'{report.group_density:.1%}, and that is what its cache keeps. heads="kv" lets a group share its blocks.',
        )
    if report.imbalance > _UNEVEN:
        yield (
            "even",
            f"Heads are uneven: the busiest lists {report.imbalance:.1f} times the mean of its layer, "
            "and a kernel with a head per unit waits for it.",
        )


def _some(numbers: list[int], stack: Stack) -> str:
    """In which layers, as the beginning of a sentence's second half."""
    first = stack.first_layer + numbers[0]
    if len(numbers) == len(stack.layers):
        return "in every layer" if len(numbers) > 1 else "in this layer"
    return f"in layer {first}" if len(numbers) == 1 else f"in {len(numbers)} of {len(stack.layers)} layers (the first is layer {first})"


def _has_local(stack: Stack, key: Key) -> bool:
    lists: Lists = stack.lists(key)
    distance = lists.row - lists.idx
    return int((distance == 0).sum()) == lists.rows and int((distance == 1).sum()) == lists.rows - 1
