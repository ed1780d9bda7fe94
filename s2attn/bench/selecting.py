"""The suite `select`: choosing blocks by looking at q and k, its scoring, selection and attention apart, against dense attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2attn.bench.cases import DTYPES, AttentionCase, tokens
from s2attn.bench.clock import Call, Meter
from s2attn.bench.compare import Error, Group, bound_of, eager, errors, exact, worst_of
from s2attn.bench.journal import Journal, Row
from s2attn.bench.peers import make_peers
from s2attn.bench.rows import Effort, Skip, compared, refuse_wrong
from s2attn.bench.turns import Ready, Turns, error_facts
from s2attn.core import bad_value, check_int
from s2attn.layout import Layout
from s2attn.ops import attention
from s2attn.patterns import Dense
from s2attn.selectors import Call as Looked
from s2attn.selectors import MassSelector, MeanPool, XAttention
from s2attn.selectors.planted import STRUCTURES, Sample, planted

OURS, PARTS = "s2attn", ("score", "select", "attention")
PRODUCT = "a product of q and k"
FULL_LENGTHS = (131072, 32768, 8192, 65536, 16384)
SCORE_TOLERANCE = 1e-3  # of a row's mass: the estimate is made in float32
AT_ONCE = 1024  # queries whose products with all their keys are in memory together


@dataclass(frozen=True)
class SelectCase:
    """Causal self-attention on q and k with a planted structure: on plain noise there is nothing to choose.

    Attributes:
        structure: as in `s2attn.selectors.planted.planted`, and ``lines``.
    """

    name: str
    selector: MassSelector
    structure: str
    seqlen: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    lines: int = 8
    op: str = "select"

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise bad_value("structure", f"must be one of {', '.join(STRUCTURES)}", repr(self.structure))
        if self.dtype not in DTYPES:
            raise bad_value("dtype", f"must be one of {', '.join(DTYPES)}", repr(self.dtype))
        if check_int("seqlen", self.seqlen, 1) % self.selector.block:
            raise bad_value("seqlen", f"must be a multiple of the selector's block ({self.selector.block})", self.seqlen)

    @property
    def stride(self) -> int | None:
        """Tokens per group of the reduced grid, where the selector has one."""
        return self.selector.stride if isinstance(self.selector, XAttention) else None

    def roofline(self, density: float) -> float:
        """The most that the whole can gain over dense attention: scoring is a product of q and k, half of attention, over the stride."""
        return 1 / (density + (1 / (2 * self.stride) if self.stride else 0.0))

    def sample(self, seed: int, device: str) -> Sample:
        shape = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "lines": self.lines}
        made, dtype = planted(self.structure, seqlen=self.seqlen, seed=seed, device=device, **shape), getattr(torch, self.dtype)
        return Sample(*(x.to(dtype) for x in (made.q, made.k, made.v)))

    def facts(self) -> dict[str, Any]:
        """The case as plain values for a record."""
        names = ("structure", "seqlen", "heads", "kv_heads", "head_dim", "dtype", "lines")
        shape = {"batch": 1, "block": self.selector.block, "stride": self.stride}
        return {"case": self.name, "op": self.op, "pattern": repr(self.selector), **shape, **{name: getattr(self, name) for name in names}}


def select_suite(op: str = "select", size: str = "full") -> list[SelectCase]:
    """The cases of the suite, the most valuable first.

    Args:
        size: ``"full"`` for a graphics card; ``"small"`` for a CPU; ``"tiny"``, whose numbers mean nothing.
    """
    shapes: dict[str, dict[str, Any]] = {
        "full": {},
        "small": {"heads": 4, "kv_heads": 1, "head_dim": 64, "dtype": "float32"},
        "tiny": {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float32", "lines": 2},
    }
    shape, methods = shapes[size], dict[str, MassSelector]()
    if size == "tiny":
        methods |= {"XAttention 8": XAttention(8, block=32), "mean pool": MeanPool(top_k=4, block=32)}
        return [SelectCase(f"tiny {n}, {name}", one, "slashes", n, **shape) for name, one in methods.items() for n in (256, 512)]
    methods |= {f"XAttention {stride}": XAttention(stride) for stride in (16, 8)} | {"mean pool": MeanPool(top_k=16)}
    lengths = (16384, 32768, 8192, 4096) if size == "small" else FULL_LENGTHS
    wanted = [(structure, name, n) for structure in ("slashes", "verticals") for name in methods for n in lengths]
    # All methods on slashes; the other structure for the first of them, at two lengths.
    kept = [(s, name, n) for s, name, n in wanted if s == "slashes" or (name == "XAttention 16" and n in lengths[:2])]
    return [SelectCase(f"{tokens(n)} {s}, {name}", methods[name], s, n, **shape) for s, name, n in kept]


class SelectOracle:
    """Truth in float64 for some rows of blocks of some heads: estimate, selection, output, and the mass that was kept."""

    def __init__(self, case: SelectCase, sample: Sample, seed: int = 0):
        self.case, self.sample, block = case, sample, case.selector.block
        blocks = case.seqlen // block
        drawn = torch.randint(blocks, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        self.rows, self.heads = sorted({blocks - 1, blocks // 2, *drawn}), sorted({0, case.heads // 2, case.heads - 1})
        self._bounds: dict[tuple[int, int, bool], float] = {}

    def _group(self, head: int, row: int, chosen: Tensor | None) -> Group:
        """A row of blocks of one head; its mask is causality and the chosen blocks, or all of them. Only keys up to its last query."""
        case, block, x = self.case, self.case.selector.block, self.sample
        first, end, kv_head = row * block, (row + 1) * block, head * case.kv_heads // case.heads
        seen = torch.arange(end, device=x.q.device) <= torch.arange(first, end, device=x.q.device)[:, None]
        if chosen is not None:
            seen &= chosen[: row + 1].repeat_interleave(block)
        q, k, v = x.q[:, first:end, head : head + 1], x.k[:, :end, kv_head], x.v[:, :end, kv_head]
        return Group(q, k, v, q, seen[None], case.head_dim**-0.5, False)

    def check_output(self, out: Tensor, chosen: Tensor | None) -> Error:
        """``out (1, S, H, D)`` against attention over the chosen blocks ``(H, query blocks, key blocks)``, or over all."""
        found, block = [], self.case.selector.block
        for head in self.heads:
            for row in self.rows:
                group = self._group(head, row, None if chosen is None else chosen[head, row])
                truth, key = exact(group), (head, row, chosen is None)
                if key not in self._bounds:
                    self._bounds[key] = bound_of(errors(eager(group), truth)[0], out.dtype)
                own = out[:, row * block : (row + 1) * block, head : head + 1]
                found.append(Error(errors([own], truth)[0], self._bounds[key]))
        return worst_of(found)

    def check_choice(self, mass: Tensor, chosen: Tensor) -> Row:
        """The estimate ``(H, query blocks, key blocks)`` against a brute-force one, the choice against its rule, and what it is worth.

        Raises:
            ArithmeticError: a wrong estimate, or a choice that its rule does not make.
        """
        worst, kept, most = 0.0, [], []
        for head in self.heads:
            for row in self.rows:
                logits = self._logits(head, row)
                brute = brute_mass(self.case.selector, logits)
                own, picked = mass[head, row, : row + 1].double(), chosen[head, row, : row + 1]
                worst = max(worst, float((own - brute).abs().max() / brute.sum()))
                check_rule(self.case.selector, own, picked)
                true = self._true_mass(logits)
                kept.append(float(true[picked].sum() / true.sum()))
                most.append(float(true.sort(descending=True).values[: int(picked.sum())].sum() / true.sum()))
        if not worst <= SCORE_TOLERANCE:
            raise ArithmeticError(f"wrong estimate: {worst:.2e} of a row's mass from a brute-force one, where {SCORE_TOLERANCE} is allowed")
        return {"kept": sum(kept) / len(kept), "kept_worst": min(kept), "kept_most": sum(most) / len(most), "score_error": worst}

    def _logits(self, head: int, row: int) -> Tensor:
        group = self._group(head, row, None)
        return group.q[0, :, 0].double() @ group.k[0].double().T * group.scale

    def _true_mass(self, logits: Tensor) -> Tensor:
        """Attention mass of each block of keys, summed over a row's queries."""
        block, end = logits.shape
        future = torch.arange(end, device=logits.device) > torch.arange(end - block, end, device=logits.device)[:, None]
        return logits.masked_fill(future, -torch.inf).softmax(-1).unflatten(1, (-1, block)).sum((0, 2))


def brute_mass(selector: MassSelector, logits: Tensor) -> Tensor:
    """The estimate of a row of blocks from all of its scaled products ``(block, keys up to the last query)``, straight from the papers.

    Raises:
        Skip: no brute-force estimate is written for this selector.
    """
    block = logits.shape[0]
    if isinstance(selector, XAttention):
        stride = selector.stride
        tiles = logits.unflatten(0, (-1, stride)).unflatten(2, (-1, stride)).transpose(1, 2)  # (rows, columns, stride, stride)
        reduced = torch.stack([tiles[..., stride - 1 - s, s] for s in range(stride)]).mean(0)
        rows, columns = reduced.shape
        unseen = torch.arange(columns, device=logits.device) > torch.arange(columns - rows, columns, device=logits.device)[:, None]
        return reduced.masked_fill(unseen, -torch.inf).softmax(-1).unflatten(1, (-1, block // stride)).sum((0, 2))
    if isinstance(selector, MeanPool):
        return logits.mean(0).unflatten(0, (-1, block)).mean(1).softmax(-1)
    raise Skip(f"no brute-force estimate is written for {type(selector).__name__}")


def check_rule(selector: MassSelector, mass: Tensor, chosen: Tensor) -> None:
    """Raise `ArithmeticError` unless ``chosen`` is what the selector's rule keeps of one row, whose last block is the diagonal."""
    forced = torch.zeros_like(chosen)
    forced[0] = forced[-1] = True
    free, rule = chosen & ~forced, selector.rule(Looked(), 1)
    if "top_k" in rule:
        there = int((forced | (mass > 0)).sum())  # a block without mass is kept only when forced
        wanted = min(there, max(int(rule["top_k"]), int(forced.sum())))
        right = int(chosen.sum()) == wanted and bool((mass[free].amin() if free.any() else torch.inf) >= _largest(mass, ~chosen))
    else:
        share, total = rule["coverage"], float(mass.sum())
        enough = float(mass[chosen].sum()) >= (share - SCORE_TOLERANCE) * total
        least = float(mass[free].min()) if free.any() else 0.0
        few = not free.any() or float(mass[chosen].sum()) - least <= (share + SCORE_TOLERANCE) * total
        right = enough and few and bool(least >= _largest(mass, ~chosen) or not free.any())
    if not (right and bool(chosen[forced].all())):
        raise ArithmeticError(f"wrong choice: {int(chosen.sum())} of {len(mass)} blocks, which {rule} does not make")


def _largest(mass: Tensor, where: Tensor) -> float:
    return float(mass[where].max()) if where.any() else -torch.inf


class Selecting:
    """One case on one device: q, k, v, and the three parts of a sparse call."""

    def __init__(self, case: SelectCase, meter: Meter, seed: int, backend: str | None):
        self.case, self.meter, self.sample = case, meter, case.sample(seed, meter.device)
        self.backend = backend or ("triton" if meter.device == "cuda" else "torch")
        self.oracle = SelectOracle(case, self.sample, seed)

    def parts(self) -> tuple[dict[str, Call], Tensor, Layout]:
        """Scoring, selection and attention as calls, the estimate ``(1, H, query blocks, key blocks)``, and the layout."""
        x, selector = self.sample, self.case.selector
        looked = Looked(scale=self.case.head_dim**-0.5, backend=self.backend)
        mass = selector.mass(x.q, x.k, looked)
        known = copy.copy(selector)
        # Selection is all that `layout` does besides scoring, so it is timed as `layout` with the scores at hand.
        object.__setattr__(known, "mass", lambda q, k, call: mass)
        layout = known.layout(x.q, x.k, backend=self.backend)
        calls = {
            "score": lambda: selector.mass(x.q, x.k, looked),
            "select": lambda: known.layout(x.q, x.k, backend=self.backend),
            "attention": lambda: attention(x.q, x.k, x.v, layout, backend=self.backend),
        }
        return calls, mass, layout

    def ours(self) -> Ready:
        """The whole call, checked in all its parts."""
        x, case, results = self.sample, self.case, list[Tensor]()
        whole = lambda: attention(x.q, x.k, x.v, case.selector, backend=self.backend)  # noqa: E731
        first_s = self.meter.first_seconds(lambda: results.append(whole()))
        _, mass, layout = self.parts()
        chosen = case.selector.choose(x.q, x.k, Looked(scale=case.head_dim**-0.5, backend=self.backend))[0]
        found = self.oracle.check_choice(mass[0], chosen)
        error = self.oracle.check_output(results.pop(), chosen)
        refuse_wrong(error)
        pairs, dense = int(layout.pairs.sum()) * case.heads // layout.heads, case.heads * case.seqlen * (case.seqlen + 1) // 2
        facts: Row = {"dense": False, "density": pairs / dense, "pairs": pairs, "roofline": case.roofline(pairs / dense), **found}
        measured = {"peak_bytes": self.meter.peak_bytes(whole), "first_s": first_s, "backend": self.backend}
        return Ready(whole, {**facts, **measured, **error_facts(error)}, graph=False)

    def dense(self, name: str) -> Ready:
        """torch's dense attention of one kind."""
        case, x = self.case, self.sample
        shape = AttentionCase(case.name, "forward", Dense(), case.seqlen, case.heads, case.kv_heads, case.head_dim, dtype=case.dtype)
        (peer,) = make_peers([name], self.meter.device)
        absence = peer.absence()
        if absence is not None:
            raise Skip(absence)
        prepared = peer.prepare(shape)
        q, k, v = (part.transpose(1, 2).contiguous() for part in (x.q, x.k, x.v))
        call = lambda: prepared.attend(q, k, v)  # noqa: E731
        error = self.oracle.check_output(call().transpose(1, 2), None)
        refuse_wrong(error)
        facts = {"dense": True, "density": 1.0, "pairs": shape.pairs_dense, "peak_bytes": self.meter.peak_bytes(call), **prepared.facts}
        return Ready(call, {**facts, **error_facts(error)})

    def product(self) -> Call:
        """All products of queries and the keys up to them, tile by tile: what scoring is measured by."""
        case, x = self.case, self.sample
        group = case.heads // case.kv_heads
        q, k = x.q[0].transpose(0, 1).unflatten(0, (-1, group)).contiguous(), x.k[0].transpose(0, 1).contiguous()

        def multiply() -> None:
            for kv_head in range(case.kv_heads):
                for start in range(0, case.seqlen, AT_ONCE):
                    end = min(start + AT_ONCE, case.seqlen)
                    _ = q[kv_head, :, start:end].flatten(0, 1) @ k[kv_head, :end].T

        return multiply


def beside_dense(case: object, device: str) -> list[str]:
    """Who has a row in a case: dense attention in all its kinds on a graphics card, and as torch chooses it elsewhere."""
    return [OURS, "cudnn", "flash"] if device == "cuda" else [OURS, "sdpa"]


def run_select_case(
    case: SelectCase,
    effort: Effort,
    seed: int = 0,
    *,
    backend: str | None = None,
    meter: Meter | None = None,
    journal: Journal | None = None,
    deadline: float = float("inf"),
) -> list[Row]:
    """Our row with its three parts, beside dense attention: time behind a passed check, density, and the attention mass that is kept."""
    meter = meter or Meter()
    turns, run = Turns(case.name, meter, journal or Journal(), deadline), Selecting(case, meter, seed, backend)
    names = beside_dense(case, meter.device)
    makers: dict[str, Callable[[], Ready]] = {name: (lambda name=name: run.dense(name)) for name in names if name != OURS}
    for name, make in {OURS: run.ours, **makers, PRODUCT: lambda: Ready(run.product(), {}, graph=False)}.items():
        turns.enter(name, make)
    for part, call in run.parts()[0].items() if OURS in turns.ready else ():
        turns.enter(part, lambda call=call: Ready(call, {}, graph=False))
    timings = turns.time(effort)
    rows = compared(turns.rows(names, case.facts(), timings))
    ours = rows[0]
    if ours["status"] == "ok":
        ours |= {f"{part}_s": timings[part].median_s for part in PARTS if part in timings}
        if "dense_peer" in ours:
            ours["of_roofline"] = ours["speedup"][ours["dense_peer"]] / ours["roofline"]
        if case.stride and PRODUCT in timings and {"score_s", "select_s"} <= set(ours):
            ours["product_s"] = timings[PRODUCT].median_s
            ours["choosing_over_product"] = (ours["score_s"] + ours["select_s"]) * case.stride / ours["product_s"]
    return rows
