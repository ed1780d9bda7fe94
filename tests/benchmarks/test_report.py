"""What is made of records: tables, a picture, and the page of all measurements, which stands in the documentation as it is made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compared import compare_text, speedup_chart, speedups
from benchmarks.record_tables import record_text
from benchmarks.report import committed_records, losing, report_page, targets_table
from benchmarks.targets import TARGETS
from s2attn.tuning.journal import write_record

ROOT = Path(__file__).parents[2]


def synthetic_row(case: str, peer: str, median: float, density: float = 1.0, **more: Any) -> dict[str, Any]:
    """A row with invented numbers, for tests only."""
    shape = {"seqlen": 32768, "heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1, "block": 64, "dtype": "bfloat16"}
    times = {"median_s": median, "p20_s": median, "p80_s": median, "runs": 5, "first_s": 1.0, "metadata_s": 0.1, "host_s": 1e-5}
    facts = {"case": case, "op": "forward", "pattern": "Local(n=16, block=64)", "peer": peer, "status": "ok", "dense": peer != "s2attn"}
    errors = {"error": 1e-3, "error_bound": 1e-2, "peak_bytes": 1 << 20}
    return {**facts, **shape, **times, **errors, "density": density, "pairs": 100, "effective_gflops": 6e5, **more}


def synthetic_record() -> dict[str, Any]:
    """Invented: a graphics card on which s2attn wins one case, loses another, and has no number in a third."""
    host = {
        "gpu": "NVIDIA H200",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "abc",
        "made": "never",
        "matmul_tflops": 1.0,
        "copy_gbps": 2.0,
    }
    rows = [
        synthetic_row("fast", "s2attn", 0.010, 0.2, speedup={"cudnn": 4.0, "flash": 6.0}, dense_peer="cudnn", efficiency=0.8),
        synthetic_row("fast", "cudnn", 0.040, speedup={"s2attn": 0.25, "flash": 1.5}),
        synthetic_row("fast", "flash", 0.060, speedup={"s2attn": 1 / 6, "cudnn": 2 / 3}, dense_peer="cudnn"),
        synthetic_row("slow", "s2attn", 0.050, 0.9, speedup={"cudnn": 0.8}, dense_peer="cudnn", efficiency=0.72, note="no CUDA graph"),
        synthetic_row("slow", "cudnn", 0.040, speedup={"s2attn": 1.25}),
        {**synthetic_row("third", "s2attn", 1.0), "status": "failed", "why": "no compiler"},
    ]
    return {"schema": 2, "suite": "forward", "host": host, "seed": 0, "complete": True, "seconds": 1.0, "rows": rows}


def test_the_committed_page_is_the_one_that_is_made() -> None:
    assert (ROOT / "docs/performance.md").read_text() == report_page(committed_records()), "run python -m benchmarks report"


def test_the_page_says_where_we_lose_and_what_failed() -> None:
    page = losing({"card": synthetic_record()})
    assert "| slow | 90.0 % | cudnn | 50 ms | 40 ms | 1.25x | `card` |" in page
    assert "| fast |" not in page and "* `card`, third: no compiler" in page
    assert losing({}) == "In no case that was measured."


def test_losses_are_sorted_by_how_much() -> None:
    record = synthetic_record()
    record["rows"].append(synthetic_row("worst", "s2attn", 0.09, 0.5, speedup={"cudnn": 0.4}))
    record["rows"].append(synthetic_row("worst", "cudnn", 0.036, speedup={}))
    page = losing({"card": record})
    assert page.index("| worst |") < page.index("| slow |")


def test_targets_are_read_from_records_or_not_measured() -> None:
    nothing = targets_table({})
    assert nothing.count("not measured") == len(TARGETS) and "yes" not in nothing
    found = targets_table({"card": synthetic_record()})
    assert "| 600 TFLOP/s; reached in 2 of 2 cases" in found.replace("600 TFLOP/s to 600 TFLOP/s", "600 TFLOP/s")
    assert "| efficiency >= 0.85 | 0.72 to 0.80; reached in 0 of 2 cases | no |" in found
    elsewhere = synthetic_record()
    elsewhere["host"]["gpu"] = "Another card"
    assert targets_table({"card": elsewhere}) == nothing


@pytest.mark.parametrize(("whole", "reached"), [(0.032, "yes"), (0.040, "no")])
def test_mixed_heads_are_compared_with_their_halves(whole: float, reached: str) -> None:
    record = synthetic_record()
    record["rows"] = [
        synthetic_row("both", "s2attn", whole, 0.5, halves=["a", "b"], speedup={}),
        synthetic_row("a", "s2attn", 0.020, speedup={}),
        synthetic_row("b", "s2attn", 0.010, speedup={}),
    ]
    assert f"| <= 1.1x the sum of the halves alone | {whole / 0.03:.2f}x the sum | {reached} |" in targets_table({"card": record})


def test_records_are_compared_as_tables() -> None:
    first, second = synthetic_record(), synthetic_record()
    second["rows"][0]["median_s"] = 0.008
    text = compare_text({"one": first, "two": second})
    assert "one: forward on NVIDIA H200" in text and "without a number: s2attn failed in 1 case: no compiler" in text
    line = next(line for line in text.splitlines() if line.startswith("fast") and line.endswith("0.80"))
    assert "10 ms" in line and "8 ms" in line


def test_speed_up_over_density_is_drawn(tmp_path: Path) -> None:
    points = speedups(synthetic_record()["rows"])
    assert points == {("forward", "s2attn"): [(0.9, 0.8), (0.2, 4.0)]}
    path = speedup_chart({"card": synthetic_record()}, tmp_path / "new" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="records must hold a row with a speed-up"):
        speedup_chart({}, tmp_path / "none.png")


def test_the_short_table_has_a_line_per_case_and_all_reasons() -> None:
    text = record_text(synthetic_record())
    lines = text.splitlines()
    assert lines[1].split()[:6] == ["case", "density", "cudnn", "flash", "s2attn", "TFLOP/s"]
    assert lines[2].split() == [
        "fast",
        "20.0",
        "%",
        "40",
        "ms",
        "60",
        "ms",
        "10",
        "ms",
        "600",
        "4.00",
        "0.80",
        "100",
        "ms",
        "10",
        "us",
        "1",
        "MiB",
    ]
    assert "without a number: s2attn failed in 1 case: no compiler" in lines and "note: s2attn: no CUDA graph" in lines


def test_a_page_of_every_kind_of_record_can_be_made(tmp_path: Path) -> None:
    stack = synthetic_record()
    more = {"op": "train", "measured": "on 6 layers", "tokens_per_s": 1000.0}
    stack["rows"] = [
        {**synthetic_row("train", "s2attn", 1.0, 0.2, speedup={"flash": 3.0}), **more},
        {**synthetic_row("train", "flash", 3.0, speedup={"s2attn": 1 / 3}), **more},
    ]
    for record in (synthetic_record(), stack):
        write_record(record, tmp_path / f"{len(list(tmp_path.iterdir()))}.json")
    page = report_page(committed_records(tmp_path))
    assert "### Training step" in page and "| 3.00x |" in page and "no compiler" in page
    assert json.loads((tmp_path / "0.json").read_text())["rows"][0]["case"] == "fast"
