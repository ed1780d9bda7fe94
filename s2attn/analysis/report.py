"""What `describe` found, as figures, as text and as plain values."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from typing import Any

from s2attn.analysis.context import ContextReport
from s2attn.analysis.cover import Cover
from s2attn.analysis.density import Listed
from s2attn.analysis.efficiency import CounterExample
from s2attn.analysis.guidelines import Advice
from s2attn.analysis.reach import Reach
from s2attn.analysis.text import amount, percent

_WIDTH = 118
_LABEL = 16
_MOST_KINDS = 8


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
        return report_text(self)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bytes(value: int) -> str:
    return amount(value, "B", 1024)


def report_text(report: Report) -> str:
    """The text of ``str(report)``."""
    lines = [report.pattern if len(report.pattern) <= _WIDTH else report.pattern[: _WIDTH - 4] + " ...", _asked(report), ""]
    for label, text in (*_figures(report), *_structure(report)):
        lines += textwrap.wrap(text, _WIDTH, initial_indent=label.ljust(_LABEL), subsequent_indent=" " * _LABEL)
    kinds = _kinds(report)
    if len(kinds) > 1:
        lines += ["", *_table(kinds)]
    if report.context is not None:
        lines += ["", str(report.context)]
    for title, sentences in (("warnings", report.warnings), ("advice", report.advice)):
        for number, sentence in enumerate(sentences):
            label = title if number == 0 else ""
            lines += ["", *textwrap.wrap(str(sentence), _WIDTH, initial_indent=label.ljust(_LABEL), subsequent_indent=" " * _LABEL)]
            if isinstance(sentence, Advice):
                # A command is copied, so it is not broken at its hyphens.
                indent = " " * _LABEL
                lines += textwrap.wrap(
                    sentence.test, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
                )
    return "\n".join(lines)


def _asked(report: Report) -> str:
    heads = f"{report.num_heads} query heads on {report.num_kv_heads} KV heads" if report.num_heads > 1 else "1 head"
    layers = "1 layer" if report.layers == 1 else f"{report.layers} layers"
    causal = "causal" if report.causal else "not causal"
    return f"{heads}, {report.seqlen:,} tokens, blocks of {report.block}, {layers}, {causal}, head_dim {report.head_dim}"


def _figures(report: Report) -> list[tuple[str, str]]:
    triangle, dense = ("the causal triangle", "dense causal attention") if report.causal else ("all pairs", "dense attention")
    layer = "" if report.layers == 1 else f" in all layers ({amount(report.flops_forward / report.layers, 'FLOP')} forward a layer)"
    listed = report.listed
    heads = f"{listed.min:,} .. {listed.max:,} a head, mean {listed.mean:,.0f}, in all {listed.total:,}"
    if report.num_heads > 1:
        heads += f"; the busiest head lists {report.imbalance:.2f} times the mean of its layer"
    blocks = f"{percent(report.block_density)} of the blocks of {triangle}"
    if report.group_density > report.block_density:
        blocks += f", {percent(report.group_density)} for the query heads of a group together"
    return [
        ("density", f"{percent(report.density)} of {triangle}, {percent(report.density_square)} of the full square (pairs of tokens)"),
        ("", blocks),
        ("ideal speed-up", f"{report.ideal_speedup:.3g} times {dense}" if report.density else "no pair is allowed"),
        ("listed blocks", heads),
        ("work", f"forward {amount(report.flops_forward, 'FLOP')}, backward {amount(report.flops_backward, 'FLOP')}{layer}"),
        ("", f"{dense} forward {amount(report.dense_flops_forward, 'FLOP')}"),
        ("bytes", f"K and V read {_bytes(report.kv_bytes)} of {_bytes(report.dense_cache_bytes)}, layouts {_bytes(report.layout_bytes)}"),
        ("", f"mask tiles {_bytes(report.tile_bytes)} instead of a mask of {_bytes(report.mask_bytes)} a layer"),
    ]


def _structure(report: Report) -> list[tuple[str, str]]:
    lines = []
    if report.cache_bytes is not None:
        kept, whole = report.cache_bytes, report.dense_cache_bytes
        text = f"{_bytes(kept)} of {_bytes(whole)} stay after eviction, {percent(kept / whole)}"
        if report.layers > 1:
            text += f" ({_bytes(kept // report.layers)} of {_bytes(whole // report.layers)} a layer)"
        lines.append(("KV cache", text if report.kv_efficient else f"{text}, to serve the next {report.cache_horizon:,} tokens"))
    if report.kv_efficient is not None:
        yes = "yes, per KV head: a block that is left out never comes back"
        lines.append(("KV-efficient", yes if report.kv_efficient else f"no: {report.counter_example}"))
    lines.append(("complete", _complete(report)))
    lines.append(("reach", _reach(report)))
    return lines


def _complete(report: Report) -> str:
    one = report.per_layer[0]
    if report.complete_after is None:
        return f"no: heads and layers together read {report.cover} for the last query block"
    if report.complete_after == 1:
        text = f"yes, the heads of one layer together read all {report.cover.earlier} earlier blocks"
    else:
        text = f"yes, after {report.complete_after} layers; the first alone reads {one.cover}"
    least = min((layer.group_cover for layer in report.per_layer), key=lambda cover: cover.covered)
    return text if least.complete or report.num_kv_heads == 1 else f"{text}; a KV head alone at least {least.covered}"


def _reach(report: Report) -> str:
    blocks = list(report.reach.blocks)
    whole = report.reach.layers_to_all
    shown = blocks[: whole or len(blocks)]
    numbers = " ".join(str(one) for one in shown) if len(shown) <= 12 else " ".join(map(str, [*shown[:11], "...", shown[-1]]))
    end = f"all, after {whole} layer{'s' if whole > 1 else ''}" if whole else f"of {report.reach.total}"
    if whole:
        return f"{numbers} blocks: {end}"
    return f"{numbers} {end} blocks, layer after layer" if len(blocks) > 1 else f"{numbers} {end} blocks through one layer"


def _kinds(report: Report) -> list[tuple[list[int], LayerReport]]:
    """Layers with the same figures, together."""
    kinds: dict[tuple, tuple[list[int], LayerReport]] = {}
    for one in report.per_layer:
        key = (one.density, one.listed, one.cache_bytes, one.cover, one.layout_bytes)
        kinds.setdefault(key, ([], one))[0].append(one.layer)
    return list(kinds.values())


def _table(kinds: list[tuple[list[int], LayerReport]]) -> list[str]:
    rows = [("layers", "density", "of square", "blocks", "cache", "covers")]
    for numbers, one in kinds[:_MOST_KINDS]:
        cache = "-" if one.cache_bytes is None else _bytes(one.cache_bytes)
        cover = f"{one.cover.covered} of {one.cover.earlier}"
        rows.append((_numbers(numbers), percent(one.density), percent(one.density_square), f"{one.listed.total:,}", cache, cover))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))] for row in rows]
    lines = ["  ".join(row) for row in padded]
    return lines if len(kinds) <= _MOST_KINDS else [*lines, f"... and {len(kinds) - _MOST_KINDS} more kinds of layers"]


def _numbers(numbers: list[int]) -> str:
    """Layer numbers, short.

    >>> _numbers([0, 1, 2]), _numbers([1, 3, 5, 7, 9, 11]), _numbers([4])
    ('0..2', '1, 3, 5 ... 11 (6)', '4')
    """
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}..{numbers[-1]}"
    if len(numbers) <= 4:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:3]))} ... {numbers[-1]} ({len(numbers)})"
