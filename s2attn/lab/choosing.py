"""What the commands `recall` and `calibrate` work on: methods at several budgets, and q, k, v of a model that reads text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from s2attn.core import bad_value, check_block, check_int
from s2attn.lab.data import validation_batches
from s2attn.lab.model import LanguageModel
from s2attn.lab.recall import captured, recall
from s2attn.selectors import FlexPrefill, MeanPool, Selector, VerticalSlash, XAttention, calibrate
from s2attn.selectors.planted import STRUCTURES, Sample, planted

STRIDES = (8, 16)
THRESHOLDS = (0.5, 0.8, 0.9, 0.95)


def methods(block: int, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, list[Selector]]:
    """The selectors that are compared, each at several budgets; `VerticalSlash`, which has no threshold, at numbers of lines.

    >>> [len(budgets) for budgets in methods(64, [0.5, 0.9]).values()]
    [2, 2, 2, 2, 3]
    """
    check_block("block", block)
    found: dict[str, list[Selector]] = {
        f"XAttention, stride {stride}": [XAttention(stride, threshold, block=block) for threshold in thresholds] for stride in STRIDES
    }
    found["mean pool"] = [MeanPool(threshold=threshold, block=block) for threshold in thresholds]
    found["FlexPrefill"] = [FlexPrefill(threshold, block=block) for threshold in thresholds]
    found["vertical-slash"] = [VerticalSlash(4 * lines, lines, block=block) for lines in (4, 16, 64)]
    return found


def budget_of(selector: Selector) -> str:
    """What bounds a selector's choice, in words.

    >>> [budget_of(budgets[0]) for budgets in methods(64).values()][-2:]
    ['50 % of the estimate', '16 keys, 4 distances']
    """
    if isinstance(selector, VerticalSlash):
        return f"{selector.verticals} keys, {selector.slashes} distances"
    threshold = getattr(selector, "threshold", None)
    return f"{100 * threshold:g} % of the estimate" if isinstance(threshold, float) else repr(selector)


def planted_data(seqlen: int, seed: int = 0) -> dict[str, Sample]:
    """Every planted structure at one length."""
    return {structure: planted(structure, seqlen=seqlen, seed=seed) for structure in STRUCTURES}


def read_by(model: LanguageModel, text: Tensor, *, windows: int, seqlen: int) -> list[list[Sample]]:
    """q, k, v of every layer for some evenly spaced pieces of ``text``: ``[layer][piece]``.

    Args:
        text: bytes or tokens, integers ``(total,)``.
        windows, seqlen: pieces, and tokens of each.

    Raises:
        ValueError: a text that is not longer than a piece.
    """
    check_int("windows", windows, 1)
    check_int("seqlen", seqlen, 1)
    model.eval()
    pieces = [captured(model, tokens) for tokens, _ in validation_batches(text, windows=windows, context=seqlen)]
    return [list(layer) for layer in zip(*pieces, strict=True)]


def model_data(model: LanguageModel, text: Tensor, seqlen: int) -> dict[str, Sample]:
    """Every layer of a model on one piece of text."""
    return {f"layer {number}": samples[0] for number, samples in enumerate(read_by(model, text, windows=1, seqlen=seqlen))}


def calibrated(selector: XAttention, layers: Sequence[Sequence[Sample]], target: float) -> tuple[XAttention, list[dict[str, float]]]:
    """The selector with a table of threshold, and for each layer what it then keeps of a piece that was not used for the table.

    Args:
        layers: ``[layer][piece]``, two pieces at least; the last one is kept back.
    """
    if any(len(samples) < 2 for samples in layers):
        raise bad_value("windows", "must be 2 at least: the last one is kept back to judge the table", min(map(len, layers)))
    table = calibrate(selector, [[(x.q, x.k) for x in samples[:-1]] for samples in layers], target=target)
    judged = []
    for number, samples in enumerate(layers):
        x, threshold = samples[-1], table.threshold
        assert isinstance(threshold, tuple)
        found = recall(table, x.q, x.k, x.v, layer=number)
        judged.append({"least": min(threshold[number]), "most": max(threshold[number]), "density": found.density, "kept": found.kept})
    return table, judged


def write_thresholds(selector: XAttention, target: float, path: Path) -> Path:
    """Write ``{"selector": the arguments of XAttention, "target": ...}`` as JSON."""
    fields: dict[str, Any] = {"stride": selector.stride, "block": selector.block, "threshold": selector.threshold}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"selector": fields, "target": target}, indent=1) + "\n", encoding="utf-8")
    return path
