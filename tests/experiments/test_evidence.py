"""The page of evidence: what hand-made records say, sentence by sentence, and the committed page beside the committed records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments.ablate import Outcome
from experiments.ablate_record import record_of
from experiments.ablate_settings import AblateSettings, Scored
from experiments.cli.app import app
from experiments.evidence import committed_records, evidence_page, write_page
from experiments.evidence_ablation import telling
from experiments.evidence_found import Found
from experiments.evidence_targets import TARGETS, ablation_targets
from experiments.model import LanguageModel
from experiments.paired import Paired
from experiments.tasks import Curriculum
from experiments.train import TrainConfig

ROOT = Path(__file__).parents[2]
TINY = AblateSettings.of("tiny")
TASKS = Scored(("passkey", "recall"), TrainConfig(steps=4), Curriculum(64, 256, 256), (256, 512), (0.0, 1.0), samples=4)
RIGHT, HALF = ((1.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (0.5, 1.0))


def invented(losses: Mapping[str, Sequence[float]], exact: Mapping[str, Sequence[Any]] | None = None, **settings: Any) -> dict[str, Any]:
    """A record with invented numbers: losses of recipes by seed, and the grids of both tasks by seed, all of them right when left out."""
    seeds = tuple(range(max(map(len, losses.values()))))
    asked = replace(TINY, **{"size": "small", "recipes": tuple(losses), "seeds": seeds, "tasks": TASKS, **settings})
    recipes, runs = asked.matched(), {}
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            grid = (exact or {}).get(name, [RIGHT] * len(values))[seed]
            scores = [
                {"task": task, "lengths": [256, 512], "depths": [0.0, 1.0], "samples": 4, "exact": grid, "tokens": grid}
                for task in asked.tasks.names
            ]
            runs[name, seed] = {
                "name": name,
                "seed": seed,
                "text": {"parameters": 1234, "bytes_read": 1024, "validation_loss": loss, "validation": [[2, 3.0], [4, loss]]},
                "tasks": {"scores": scores, "tokens": 1024},
                "memory": {"step_bytes": None, "cache_bytes": 512, "dense_cache_bytes": 1024},
                "host": {"processor": "abacus", "cores": 1, "torch": "2", "s2attn": "0"},
                "seconds": 1.0,
            }
    return record_of(Outcome(asked, recipes, runs), "python -m experiments ablate --recipes " + ",".join(losses))


MET = invented(
    {"dense": [2.0, 3.0], "homogeneous": [2.2, 3.3], "s2": [2.1, 3.12], "s2+1": [2.01, 3.02], "window": [2.2, 3.2]},
    {"homogeneous": [HALF, HALF], "window": [HALF, RIGHT]},
)
MISSED = invented(
    {"dense": [2.0, 3.0], "homogeneous": [2.0, 3.3], "s2": [2.1, 3.12], "s2+1": [2.1, 3.02], "s2+2": [2.04, 3.09]},
    {"s2+1": [HALF, RIGHT]},
)


def section(page: str, heading: str) -> str:
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def reached(record: dict[str, Any]) -> list[list[str]]:
    """For every target, how its readings ended."""
    lines = ablation_targets({"small": record})
    return [[line[3] for line in lines if line[0] == target.goal] for target in TARGETS]


def test_the_committed_page_is_the_one_that_is_made() -> None:
    page = (ROOT / "docs/evidence.md").read_text()
    assert page == evidence_page(committed_records()), "run python -m experiments evidence"
    named = set(re.findall(r"\]\(evidence/([^)]+)\)", page))
    assert named == {path.name for path in (ROOT / "docs/evidence").glob("*")}, "pictures are those that the page shows"


def test_without_records_the_page_says_what_would_measure() -> None:
    page = evidence_page({})
    assert "Nothing was measured yet; `python -m experiments ablate` would do that." in section(page, "Results")
    assert "Nothing was measured yet; `python -m experiments ablate --recipes dense,homogeneous,s2` would do that." in section(
        page, "Heads that differ"
    )
    assert section(page, "Targets").count("| not measured |") == len(TARGETS) + 1
    assert "`python -m experiments reach` would do that" in section(page, "Reach and recall")


@pytest.mark.parametrize(("learned", "word"), [(0, "met"), (1, "**missed**")])
def test_a_study_of_reach_stands_on_the_page(learned: int, word: str, tmp_path: Path) -> None:
    within, outside = {"asked": 4, "learned": 3, "exact": 0.9}, {"asked": 2, "learned": learned, "exact": 0.1}
    totals = {"reachable": within, "unreachable": outside, "by_hops": {"1": within}}
    last = {"distance": [20, 10], "hops": [-1, 1], "exact": [0.1, 1.0]}
    one = {"pattern": "window", "layers": 1, "seed": 0, "reach": 10, "learned": 10, "seconds": 7.0, "last": last, **totals}
    record = {"kind": "reach", "command": "python -m experiments reach", "totals": totals, "summary": [one]}
    page = write_page({"far": record}, tmp_path / "evidence.md").read_text()
    assert "Of what can be reached, 75 % is learned." in section(page, "Reach and recall") and "seconds" not in page
    assert f"| {learned} of 2 | `far` | {word} |" in section(page, "Targets")
    assert {path.name for path in (tmp_path / "evidence").iterdir()} == set(re.findall(r"\]\(evidence/([^)]+)\)", page))


def test_what_was_run_is_told() -> None:
    said, weights = section(evidence_page({"small": MET}), "What was run"), LanguageModel(TINY.model).num_parameters
    assert "4 layers of width 32" in said and f"{weights:,} parameters" in said and "1,024 tokens (bytes of text)" in said
    assert "Machine: abacus, 1 cores" in said and "Seeds: 0, 1." in said and "| homogeneous |" in said
    assert "Not finished" not in said and "Tiny" not in said


def test_the_results_are_a_line_per_recipe() -> None:
    said = section(evidence_page({"small": MET}), "Results")
    assert "| s2+1 | " in said and "2.515±0.714 | +0.58±0.12 | 100±0 | 100±0 | 100 | 100 | - | 0.0 MiB |" in said
    line = next(line for line in said.splitlines() if line.startswith("| window |"))
    assert line.split("|")[6:10] == [" 94±9 ", " 94±9 ", " 88 ", " 88 "]
    assert "tokens/s" not in said


def test_how_steep_the_losses_still_are_is_told() -> None:
    said = section(evidence_page({"small": MET}), "Results")
    assert "Over the last 512 tokens the validation losses changed by -33.3 % to +10.0 %." in said and "below dense" not in said
    below = invented({"dense": [2.0, 2.4], "s2": [1.9, 2.3], "window": [2.1, 2.4]})
    said = section(evidence_page({"small": below}), "Results")
    assert "All of them still fall: that `s2` ends below dense says that a model learned faster from so few tokens" in said


def test_targets_that_are_met() -> None:
    assert reached(MET) == [["met"], ["met"], ["met", "met", "met"], ["not measured"]]
    page = evidence_page({"small": MET})
    assert "`s2+1` beside `dense`, 2 seeds: loss +0.58±0.12 % (+0.50 to +0.67), beyond" in section(page, "Dense layers")
    assert "That is within 1 % of the dense loss." in section(page, "Dense layers")
    assert "`s2` beside `homogeneous`, 2 seeds: loss -5.00±0.64 % (-5.45 to -4.55), beyond the seeds' spread" in page
    assert "passkey +12.5±0.0 points (+12.5 to +12.5), beyond the seeds' spread" in section(page, "Heads that differ")


def test_targets_that_are_missed_are_shown_as_missed() -> None:
    missed = "**missed**"
    assert reached(MISSED) == [[missed, missed], [missed, "met"], [missed, missed, missed], ["not measured"]]
    page = evidence_page({"small": MISSED})
    assert "`s2+1` at 512 tokens: 50 % at the worst depth and seed of 2 | `small` | **missed** |" in section(page, "Targets")
    said = section(page, "Heads that differ")
    assert "loss -0.23±7.39 % (-5.45 to +5.00), within the seeds' spread; passkey +0.0±0.0 points (+0.0 to +0.0), within" in said
    assert section(page, "Dense layers").count("That is not within 1 % of the dense loss.") == 2


def test_the_same_direction_is_not_enough_against_the_spread() -> None:
    record = invented({"homogeneous": [3.0, 3.0, 3.0], "s2": [2.999, 2.998, 2.5]})
    assert reached(record)[2] == ["**missed**"] * 3
    assert reached(invented({"homogeneous": [2.0, 3.0], "s2": [2.2, 3.3]}))[2][0] == "**missed**", "worse, whatever the spread"


def test_a_single_seed_has_no_spread() -> None:
    record = invented({"dense": [2.0], "homogeneous": [2.2], "s2": [2.1], "s2+1": [2.01]})
    assert reached(record) == [["met"], ["met"], ["not measured"], ["not measured"]]
    assert "1 seed: loss -4.55 %, of one seed, which has no spread" in section(evidence_page({"small": record}), "Heads that differ")


def test_without_dense_its_target_is_not_measured() -> None:
    record = invented({"s2": [2.0, 3.0], "s2+1": [2.0, 2.9]})
    assert reached(record) == [["not measured"], ["met"], ["not measured"], ["not measured"]]
    said = section(evidence_page({"small": record}), "Dense layers")
    assert "Not measured: `dense`, `s2+2`." in said and "`s2+1` beside `s2`" in said and "of the dense loss" not in said


def test_unequal_pairs_do_not_measure_heads() -> None:
    record = json.loads(json.dumps(MET))
    for one in record["recipes"]:
        one["pairs"] *= 2 if one["name"] == "homogeneous" else 1
    assert reached(record)[2] == ["not measured"]
    said = section(evidence_page({"small": record}), "Heads that differ")
    assert "`s2` beside `homogeneous` (their pairs are not equal), 2 seeds" in said


def test_the_length_that_is_far_must_have_been_asked() -> None:
    near = replace(TASKS, lengths=(128, 256))
    assert reached(invented({"dense": [2.0], "s2+1": [2.0]}, tasks=near))[1] == ["not measured"]
    assert reached(invented({"dense": [2.0], "s2+1": [2.0]}, tasks=replace(TASKS, names=())))[1] == ["not measured"]
    page = evidence_page({"small": invented({"dense": [2.0], "s2+1": [2.0]}, tasks=replace(TASKS, names=()))})
    assert "`python -m experiments ablate --tasks passkey` would do that" in section(page, "Passkey far out")


def test_the_passkey_far_out_names_who_is_perfect() -> None:
    said = section(evidence_page({"small": MISSED}), "Passkey far out")
    assert "512 tokens are 8 times the 64 that the curriculum starts with (it ends at 256, below this length)." in said
    assert "Perfect at all 2 depths in every seed: `dense`, `homogeneous`, `s2`, `s2+2`." in said
    assert "| s2+1 | 2 | 75 | 100 | 50 |" in said


def test_a_window_is_compared_length_by_length() -> None:
    said = section(evidence_page({"small": MET}), "Cover of the context")
    assert "| window | 100 | 88 |" in said
    assert "* recall at 256: `window` 100 %, 0 of the 3 other sparse recipes above it, the best `homogeneous` with 100 %." in said
    assert "* passkey at 512: `window` 88 %, 2 of the 3 other sparse recipes above it, the best `s2` with 100 %." in said
    assert "Not measured: `sink_window`." in said


def test_the_cache_that_stays_is_beside_the_loss() -> None:
    said = section(evidence_page({"small": MET}), "Blocks that stay dropped")
    assert "| 0.0 MiB | 50 % |  |" in said and "| 0.0 MiB | 50 % | +4.50±0.71 |" in said and "Not measured: `power`, `dilated`." in said


def test_windows_are_told_by_their_width() -> None:
    record = invented({"dense": [2.0, 3.0], "stripes": [2.3, 3.4], "s2": [2.1, 3.12], "window": [2.2, 3.2]})
    said = section(evidence_page({"small": record}), "A local window")
    widths = [int(width) for width in re.findall(r"is (\d+) tokens wide", said)]
    assert len(widths) == 3 and widths == sorted(widths) and "Not measured" not in said
    assert "`stripes` beside `s2`, 2 seeds: loss +9.25±0.39 %" in said


def test_a_large_model_on_a_card_is_what_the_last_target_asks_for() -> None:
    text = replace(TINY.text, context=131072, batch=8, steps=100)
    settings = {"text": text, "device": "cuda", "block": 256}
    wide = replace(TINY.model, width=1024, hidden=4096)
    assert reached(invented({"dense": [2.0], "s2+1": [2.01]}, model=wide, **settings))[3] == ["met"]
    assert reached(invented({"dense": [2.0], "s2+1": [2.01]}, **settings))[3] == ["not measured"]


def test_unfinished_and_tiny_records_say_so() -> None:
    record = invented({"dense": [2.0, 3.0], "s2": [2.1]}, size="tiny")
    said = section(evidence_page({"small": record}), "What was run")
    assert "Not finished: 1 of 4 runs are missing: `s2` (seed 1)" in said and "none of its numbers means anything" in said


def test_two_records_are_told_apart() -> None:
    page = evidence_page({"one": MET, "two": MISSED})
    assert section(page, "Results").index("**Record `one`.**") < section(page, "Results").index("**Record `two`.**")
    assert "| `two` | **missed** |" in page and "| `one` | met |" in page


def test_pictures_are_drawn_as_the_page_names_them(tmp_path: Path) -> None:
    assert telling(Found.of("small", MET)) == ["dense", "s2", "homogeneous"]
    page = write_page({"small": MET}, tmp_path / "docs" / "evidence.md").read_text()
    named = re.findall(r"\]\(evidence/([^)]+)\)", page)
    assert len(named) == 5 and set(named) == {path.name for path in (tmp_path / "docs/evidence").iterdir()}
    assert all((tmp_path / "docs/evidence" / name).read_bytes().startswith(b"\x89PNG") for name in named)


def test_the_command_writes_the_page_of_a_folder(tmp_path: Path) -> None:
    records, out = tmp_path / "records", tmp_path / "evidence.md"
    records.mkdir()
    (records / "small.json").write_text(json.dumps(invented({"dense": [2.0]}, tasks=replace(TASKS, names=()))))
    result = CliRunner().invoke(app, ["evidence", "--records", str(records), "--out", str(out)])
    assert result.exit_code == 0 and out.read_text() == evidence_page(committed_records(records))
    (records / "other.json").write_text('{"kind": "chess"}')
    result = CliRunner().invoke(app, ["evidence", "--records", str(records), "--out", str(out)])
    assert result.exit_code == 2 and "record must be of a kind among ablation, reach" in result.stderr and "'chess'" in result.stderr
    (records / "other.json").write_text("[]")
    result = CliRunner().invoke(app, ["evidence", "--records", str(records), "--out", str(out)])
    assert result.exit_code == 2 and "record must be a JSON object with a kind" in result.stderr
    result = CliRunner().invoke(app, ["evidence", "--records", str(tmp_path / "none"), "--out", str(out)])
    assert result.exit_code == 2 and "--records must be a folder" in result.stderr


def test_a_difference_of_nothing_is_within_the_spread() -> None:
    assert Paired((0.0, 0.0)).beyond is False
    assert Paired((-1.0, -1.0)).beyond is True
