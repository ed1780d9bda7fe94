"""What we want to reach, and what the records say about it: a figure where there is one, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import duration

Row = Mapping[str, Any]
Reading = tuple[str, bool]
"""A figure from the records, and whether it reaches its target."""


class Found:
    """The rows that have numbers, with what they ran on."""

    def __init__(self, records: Mapping[str, Mapping[str, Any]]):
        self.rows = [
            {**row, "gpu": record["host"].get("gpu")} for record in records.values() for row in record["rows"] if row["status"] == "ok"
        ]

    def ours(self, op: str, gpu: str = "", **equal: Any) -> list[Row]:
        """Our rows of one op, on a graphics card whose name holds ``gpu`` (on a CPU when that is empty), with fields equal to others."""
        right = [row for row in self.rows if row["peer"] == "s2attn" and row["op"] == op]
        here = [row for row in right if (gpu in row["gpu"] if row["gpu"] else False) == bool(gpu)]
        return [row for row in here if all(row.get(key) == value for key, value in equal.items())]

    def milestone(self, op: str) -> list[Row]:
        """Our rows on an H200 of width 128 in blocks of 64, from 32k on, with 30 listed blocks per row or more."""
        rows = self.ours(op, "H200", head_dim=128, block=64, dtype="bfloat16")
        return [row for row in rows if row["seqlen"] >= 32768 and row["density"] * row["seqlen"] / 2 / row["block"] >= 30]


@dataclass(frozen=True)
class Target:
    """One line of what we want.

    Attributes:
        read: the figures that the records hold; none when nothing was measured.
    """

    work: str
    goal: str
    read: Callable[[Found], Sequence[Reading]]


def _least(values: Sequence[float], goal: float, form: str) -> list[Reading]:
    """The least of some values, which must be ``goal`` at least."""
    if not values:
        return []
    reached = sum(value >= goal for value in values)
    return [
        (f"{form.format(min(values))} to {form.format(max(values))}; reached in {reached} of {len(values)} cases", reached == len(values))
    ]


def _most(values: Sequence[float], goal: float, form: Callable[[float], str]) -> list[Reading]:
    """The largest of some values, which must be ``goal`` at most."""
    if not values:
        return []
    return [_range(values, form, sum(value <= goal for value in values))]


def _range(values: Sequence[float], form: Callable[[float], str], reached: int) -> Reading:
    if len(values) == 1:
        return form(values[0]), bool(reached)
    return f"{form(min(values))} to {form(max(values))}; reached in {reached} of {len(values)} cases", reached == len(values)


def _speed(op: str, goal: float) -> Callable[[Found], list[Reading]]:
    return lambda found: _least([row["effective_gflops"] / 1e3 for row in found.milestone(op)], goal, "{:.0f} TFLOP/s")


def _efficiency(low: float, high: float, goal: float) -> Callable[[Found], list[Reading]]:
    def read(found: Found) -> list[Reading]:
        rows = [row for row in found.milestone("forward") if low <= row["density"] < high and "efficiency" in row]
        return _least([row["efficiency"] for row in rows], goal, "{:.2f}")

    return read


def _over(op: str, peers: Sequence[str], goal: float, text: str = "", pattern: str = "") -> Callable[[Found], list[Reading]]:
    """Our speed-up over the fastest of some peers, in cases whose name holds ``text``, or whose pattern is ``pattern``."""

    def read(found: Found) -> list[Reading]:
        rows = [row for row in found.ours(op, "H200") if text in row["case"] and pattern in ("", row["pattern"])]
        best = [min(ratios) for row in rows if (ratios := [row["speedup"][peer] for peer in peers if peer in row["speedup"]])]
        return _least(best, goal, "{:.2f}x")

    return read


def _power(found: Found) -> list[Reading]:
    rows = [row for row in found.ours("forward", "H200") if "128k power" in row["case"] and "efficiency" in row]
    return _least([row["efficiency"] for row in rows], 0.92, "{:.2f} of ideal")


def _mixed(found: Found) -> list[Reading]:
    values = []
    for op in ("forward", "backward"):
        rows = {row["case"]: row for row in found.ours(op, "H200")}
        for row in rows.values():
            halves = [rows[name]["median_s"] for name in row.get("halves", ()) if name in rows]
            if len(halves) == 2:
                values.append(row["median_s"] / sum(halves))
    return _most(values, 1.1, "{:.2f}x the sum".format)


def _launch(found: Found) -> list[Reading]:
    rows = [row for op in ("forward", "backward") for row in found.ours(op, "H200")]
    return _most([row["host_s"] for row in rows if row.get("host_s") is not None], 20e-6, duration)


def _first(found: Found) -> list[Reading]:
    rows = [row for op in ("forward", "backward") for row in found.ours(op, "H200")]
    return _most([row["first_s"] for row in rows if row.get("first_s") is not None], 5.0, duration)


def _layout(found: Found) -> list[Reading]:
    rows = [row for row in found.rows if row["op"] == "layout" and row["seqlen"] >= 1 << 20 and row["heads"] >= 32]
    return _most([row["median_s"] for row in rows], 1.0, duration)


def _cpu(found: Found) -> list[Reading]:
    rows = [row for row in found.ours("forward", dtype="float32", seqlen=16384) if 0.1 < row["density"] < 0.13]
    return _least([row["speedup"]["flex"] for row in rows if "flex" in row["speedup"]], 1.0, "{:.2f}x")


def _share_of_copy(found: Found) -> list[Reading]:
    """Of all cases of decoding that list 64 MB or more."""
    rows = [row for row in found.ours("decode", "H200") if row["listed_bytes"] >= 64e6 and "share_of_copy" in row]
    return _least([100 * row["share_of_copy"] for row in rows], 80, "{:.0f} %")


def _ragged(found: Found) -> list[Reading]:
    rows = [row for row in found.ours("decode", "H200") if row["listed_bytes"] >= 64e6 and "over_uniform" in row]
    return _most([row["over_uniform"] for row in rows], 1.1, "{:.2f}x".format)


def _captured(found: Found) -> list[Reading]:
    rows = [row for row in found.ours("decode", "H200") if "timed_by" in row]
    count = sum(row["timed_by"] == "graph" for row in rows)
    return [(f"{count} of {len(rows)} cases", count == len(rows))] if rows else []


def _roofline(gpu: str) -> Callable[[Found], list[Reading]]:
    """Of the speed-up that choosing blocks from q and k could reach."""
    return lambda found: _least([100 * row["of_roofline"] for row in found.ours("select", gpu) if "of_roofline" in row], 80, "{:.0f} %")


def _choosing(gpu: str) -> Callable[[Found], list[Reading]]:
    """Scoring and selection over a product of q and k, divided by the stride."""
    key = "choosing_over_product"
    return lambda found: _most([row[key] for row in found.ours("select", gpu) if key in row], 1.1, "{:.2f}x".format)


def _hyper(gpu: str, peer: str, goal: float, **equal: Any) -> Callable[[Found], list[Reading]]:
    """HyperAttention over a dense peer, in cases of some length and kind."""
    return lambda found: _least(
        [row["speedup"][peer] for row in found.ours("hyper", gpu, **equal) if peer in row["speedup"]], goal, "{:.2f}x"
    )


def _cache(found: Found) -> list[Reading]:
    """On any device, since it is counted: the most that the cache of a stack held, over density times that of a dense one."""
    rows = [row for row in found.rows if row["op"] == "inference" and row["peer"] == "s2attn" and row["seqlen"] >= 131072]
    return _most([row["cache_bytes"] / (row["density"] * row["cache_dense_bytes"]) for row in rows], 1.05, "{:.2f}x".format)


MILESTONE = "H200, bf16, D = 128, block 64, S >= 32k, >= 30 tiles per row"
FLASH, FLEX, ORIGINAL = ("flash",), ("flex", "flex-tuned"), ("s2-original",)
TARGETS = (
    Target(f"{MILESTONE}, forward", ">= 550 effective TFLOP/s", _speed("forward", 550)),
    Target("same, density >= 10 %", "efficiency >= 0.85", _efficiency(0.095, 1.01, 0.85)),
    Target("same, density 5 %", "efficiency >= 0.75", _efficiency(0.04, 0.06, 0.75)),
    Target("same, backward", ">= 420 effective TFLOP/s", _speed("backward", 420)),
    Target("H200, dense pattern, forward, over cuDNN", ">= 0.87x (15 %)", _over("forward", ("cudnn",), 1 / 1.15, pattern="Dense()")),
    Target("H200, dense pattern, backward, over cuDNN", ">= 0.80x (25 %)", _over("backward", ("cudnn",), 1 / 1.25, pattern="Dense()")),
    Target("H200, S2 at 128k over FlashAttention-2, 1.3B shape", ">= 8.79x", _over("forward", FLASH, 8.79, "128k S2 1.3B")),
    Target("same, 7B shape", ">= 15.87x", _over("forward", FLASH, 15.87, "128k S2 7B")),
    Target("same, 70B shape", ">= 25.3x", _over("forward", FLASH, 25.3, "128k S2 70B")),
    Target("H200, training at 128k over dense FlashAttention-2, 1.3B shape", ">= 2.8x", _over("train", FLASH, 2.8, "1.3B, 128k")),
    Target("same, 7B shape", ">= 2.5x", _over("train", FLASH, 2.5, "7B, 128k")),
    Target("H200, prefill at 128k over dense FlashAttention-2, 7B shape", ">= 4.5x", _over("prefill", FLASH, 4.5, "7B, 128k")),
    Target(
        "H200, prefill and 32 tokens at 128k over dense FlashAttention-2, 7B shape", ">= 4.5x", _over("inference", FLASH, 4.5, "7B, 128k")
    ),
    Target("H200, Power at 128k", ">= 92 % of ideal", _power),
    Target("H200, forward over FlexAttention", ">= 1.3x", _over("forward", FLEX, 1.3)),
    Target("H200, backward over FlexAttention", ">= 1.3x", _over("backward", FLEX, 1.3)),
    Target("H200, forward over the original S2 kernels", ">= 1.5x", _over("forward", ORIGINAL, 1.5)),
    Target("H200, backward over the original S2 kernels", ">= 1.5x", _over("backward", ORIGINAL, 1.5)),
    Target("H200, heads half dense, half 5 %", "<= 1.1x the sum of the halves alone", _mixed),
    Target("H200, paged decode, >= 64 MB of listed K/V", ">= 80 % of the copy bandwidth", _share_of_copy),
    Target("same, a ragged batch over a uniform one of equal bytes", "<= 1.1x", _ragged),
    Target("H200, paged decode under a CUDA graph", "every case", _captured),
    Target("H200, blocks chosen from q and k, over dense", ">= 80 % of 1 / (density + 1 / (2 stride))", _roofline("H200")),
    Target("same on a CPU", ">= 80 % of 1 / (density + 1 / (2 stride))", _roofline("")),
    Target("H200, scoring and selection over 1 / stride of a product of q and k", "<= 1.1x", _choosing("H200")),
    Target("same on a CPU", "<= 1.1x", _choosing("")),
    Target(
        "H200, HyperAttention at 128k, causal, over FlashAttention-2",
        ">= 2.5x",
        _hyper("H200", "flash", 2.5, seqlen=131072, causal=True, backward=False),
    ),
    Target(
        "CPU, HyperAttention at 32k, causal, forward and backward, over dense",
        ">= 1x",
        _hyper("", "sdpa", 1.0, seqlen=32768, causal=True, backward=True),
    ),
    Target("H200, launch", "<= 20 us of host time per call", _launch),
    Target("H200, first call", "<= 5 s", _first),
    Target("layout of 1M tokens, 32 heads, on a CPU", "< 1 s", _layout),
    Target("CPU, 16k, float32, S2 at 12 %, over a compiled FlexAttention", ">= 1x", _cpu),
    Target("KV memory at 128k, patterns per KV head", "<= 1.05 x density x dense", _cache),
)
