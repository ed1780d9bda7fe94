"""A report as plain text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from s2attn.analysis.guidelines import Advice

if TYPE_CHECKING:
    from s2attn.analysis.describe import LayerReport, Report

_WIDTH = 118
_LABEL = 16
_MOST_KINDS = 8


def amount(value: float, unit: str = "", base: int = 1000) -> str:
    """A number with three digits and a prefix.

    >>> amount(5_438_000, "FLOP"), amount(3 << 30, "B", 1024), amount(999), amount(0.5)
    ('5.44 MFLOP', '3.00 GiB', '999', '0.5')
    """
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    step = 0
    while abs(value) >= base and step + 1 < len(prefixes):
        value, step = value / base, step + 1
    if step == 0:
        return f"{value:g} {unit}".strip()
    digits = f"{value:.3g}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return f"{digits} {prefixes[step].upper() if base == 1024 else prefixes[step]}{'i' if base == 1024 else ''}{unit}"


def _bytes(value: int) -> str:
    return amount(value, "B", 1024)


def percent(share: float) -> str:
    """A share with three digits.

    >>> percent(0.1316), percent(1.0), percent(0.00123)
    ('13.2 %', '100 %', '0.123 %')
    """
    return f"{100 * share:.3g} %"


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
