"""Is a selector any good? The attention mass that it keeps against the most that as many blocks could keep, and what it costs in output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from s2attn.core import bad_kind, bad_value
from s2attn.nn import SparseAttention
from s2attn.ops.attention import attention
from s2attn.ops.checks import check_scale, check_tensors
from s2attn.ops.score import antidiagonal
from s2attn.ops.selector import Call, Selector
from s2attn.patterns import Dense
from s2attn.selectors.planted import Sample


@dataclass(frozen=True)
class Recall:
    """How a selector did on one q, k, v; all numbers but ``error`` are shares between 0 and 1.

    Attributes:
        density: chosen blocks over all blocks that hold a pair.
        kept: mean over rows of blocks of the true attention mass in the chosen blocks.
        worst: the least of these.
        oracle: mean over rows of the most mass that as many blocks as the row chose could hold.
        error: ``||out - dense|| / ||dense||``.
    """

    density: float
    kept: float
    worst: float
    oracle: float
    error: float


def recall(
    selector: Selector, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, layer: int = 0
) -> Recall:
    """Compare what a selector chooses with the true attention mass, which takes the time of dense attention but not its memory.

    Args:
        selector: the selector.
        q, k, v, causal, scale, layer: as in `attention`; batched tensors.

    Raises:
        TypeError: not a selector, or tensors of a wrong kind.
        ValueError: shapes that do not fit, or no query that sees a key.

    >>> from s2attn.selectors import XAttention
    >>> from s2attn.selectors.planted import planted
    >>> x = planted("verticals", seqlen=512)
    >>> result = recall(XAttention(stride=8, threshold=0.9, block=32), x.q, x.k, x.v)
    >>> result.kept > 0.9 * result.oracle
    True
    """
    if not isinstance(selector, Selector):
        raise bad_kind("selector", "must be a Selector", selector)
    check_tensors(q, k, v, packed=False)
    mass = antidiagonal(q, k, stride=1, block=selector.block, causal=causal, scale=scale)
    total = mass.sum(dim=-1, keepdim=True)
    sees = (total > 0).squeeze(-1)
    if not bool(sees.any()):
        raise bad_value("q and k", "must hold a query that sees a key", (tuple(q.shape), tuple(k.shape)))
    call = Call(causal, check_scale(scale, q.shape[-1]), None, layer)
    chosen = selector.choose(q.detach(), k.detach(), call)
    chosen = chosen.repeat_interleave(q.shape[2] // chosen.shape[1], dim=1)
    exists = _exists(q.shape[1], k.shape[1], selector.block, causal, q.device).expand_as(mass)
    chosen = chosen & exists
    share = mass / total.clamp(min=torch.finfo(torch.float32).tiny)
    kept = (share * chosen).sum(dim=-1)[sees]
    best = share.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    count = chosen.sum(dim=-1, keepdim=True)
    most = torch.where(count > 0, best.gather(-1, (count - 1).clamp(min=0)), 0.0).squeeze(-1)[sees]
    with torch.no_grad():
        shared = {"causal": causal, "scale": scale}
        out, dense = attention(q, k, v, selector, layer=layer, **shared).double(), attention(q, k, v, Dense(), **shared).double()
    error = float((out - dense).norm() / dense.norm().clamp(min=torch.finfo(torch.float64).tiny))
    density = float(chosen.sum() / exists.sum())
    return Recall(density, float(kept.mean()), float(kept.min()), float(most.mean()), error)


def _exists(seqlen_q: int, seqlen_k: int, block: int, causal: bool, device: torch.device) -> Tensor:
    """bool ``(query blocks, key blocks)``: whether a pair of the blocks is allowed at all."""
    rows, columns = -(-seqlen_q // block), -(-seqlen_k // block)
    last = (torch.arange(1, rows + 1, device=device) * block).clamp(max=seqlen_q) - 1 + seqlen_k - seqlen_q
    first = torch.arange(columns, device=device) * block
    return (first <= last[:, None]) if causal else torch.ones(rows, columns, dtype=torch.bool, device=device)


def captured(model: nn.Module, *inputs: object) -> list[Sample]:
    """What goes into each `SparseAttention` of a model, in the order in which it runs them, when it is called with ``inputs``.

    The demo's model with a checkpoint and a long text gives data to judge selectors on, and to calibrate them.

    Raises:
        ValueError: the model holds no `SparseAttention`, or does not run it.
    """
    samples: list[Sample] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        samples.append(Sample(*(x.detach().clone() for x in args[:3])))

    hooks = [module.register_forward_pre_hook(keep) for module in model.modules() if isinstance(module, SparseAttention)]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not samples:
        raise bad_value("model", "must run a SparseAttention", type(model).__name__)
    return samples


Judged = Mapping[tuple[str, str], Sequence[Recall]]
"""By (data, method) the results over its budgets."""


def judge(
    methods: Mapping[str, Sequence[Selector]], data: Mapping[str, Sample], *, causal: bool = True
) -> dict[tuple[str, str], list[Recall]]:
    """Every method at each of its budgets on all data.

    Args:
        methods: for each name the same selector with several budgets.
        data: for each name q, k and v.
        causal: as in `attention`.
    """
    return {
        (kind, name): [recall(selector, x.q, x.k, x.v, causal=causal) for selector in selectors]
        for kind, x in data.items()
        for name, selectors in methods.items()
    }


def recall_table(judged: Judged, budgets: Mapping[str, Sequence[str]] | None = None) -> str:
    """The results as a Markdown table.

    Args:
        budgets: for each method what its budgets are called; a column of its own, when given.

    >>> print(recall_table({("bands", "XAttention"): [Recall(0.25, 0.93, 0.8, 0.95, 0.125)]}))
    | data | method | density | mass kept | least of a row | most possible | output error |
    |---|---|---|---|---|---|---|
    | bands | XAttention | 25.0 % | 93.0 % | 80.0 % | 95.0 % | 0.125 |
    """
    head = ["data", "method", *(["budget"] if budgets else []), "density", "mass kept", "least of a row", "most possible", "output error"]
    lines = [head, ["---"] * len(head)]
    for (kind, name), results in judged.items():
        for i, r in enumerate(results):
            shares = [f"{share:.1%}".replace("%", " %") for share in (r.density, r.kept, r.worst, r.oracle)]
            lines.append([kind, name, *([budgets[name][i]] if budgets else []), *shares, f"{r.error:.3f}"])
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |" for line in lines)


def recall_chart(judged: Judged, path: Path) -> Path:
    """Mass kept over density, a line for each method, beside the most that was possible; one picture for each kind of data."""
    from s2attn.lab.charts import new_figure

    kinds, names = list(dict.fromkeys(kind for kind, _ in judged)), list(dict.fromkeys(name for _, name in judged))
    figure, axes = new_figure(len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        for (of_kind, name), results in judged.items():
            if of_kind != kind:
                continue
            i = names.index(name)  # a method has one colour in all pictures
            points = sorted(results, key=lambda r: r.density)
            densities = [r.density for r in points]
            axis.plot(densities, [r.kept for r in points], "o-", color=f"C{i % 10}", label=name)
            axis.plot(densities, [r.oracle for r in points], ":", color=f"C{i % 10}", linewidth=1)
        axis.set(xlabel="density (blocks)", ylabel="attention mass kept", title=f"{kind} (dotted: most possible)", ylim=(0, 1.02))
        axis.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path)
    return path
