"""Every advice names the experiment that puts it to the test, and every experiment that is named can be run as it stands."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import command_parser
from benchmarks.session import SUITES
from experiments.ablate_settings import AblateSettings
from experiments.cli.app import app as experiments_app
from experiments.evidence import evidence_page
from s2attn import Local, PerHead, Power, Recipe, Stride, Window
from s2attn.analysis.describe import describe
from s2attn.analysis.guidelines import GUIDELINES, Guideline, anchor
from s2attn.analysis.report import Report
from s2attn.cli.app import app
from s2attn.patterns import Dense

ROOT = Path(__file__).parents[2]
TRAINED = {key: one for key, one in GUIDELINES.items() if one.recipes}
TIMED = {key: one for key, one in GUIDELINES.items() if not one.recipes}
UNRULY = {
    "alike": describe(Stride(8, offset=0) | Power(), 8, 4, 8192, layers=4),
    "groups": describe(Local(16) | Stride(8, heads="query"), 32, 8, 16384, layers=4),
    "uneven": describe(PerHead({0: Dense()}, default=Window(64)), 4, seqlen=8192),
    "bare": describe(Recipe(Local(4) | Stride(8), layers={1: Stride(8)}, dense_layers=[0]), 8, 8, 8192, layers=4),
}
BEGINNINGS = {
    "heads": "Heads do not differ",
    "union": "Let the union of the heads cover",
    "dropped": "Not KV-efficient",
    "dense": "No layer is dense",
    "window": "No local window",
    "groups": "The query heads of a group",
    "even": "Heads are uneven",
}


def test_every_advice_has_the_guideline_that_it_is_about() -> None:
    seen = set()
    for report in UNRULY.values():
        for one in report.advice:
            (key,) = [key for key, beginning in BEGINNINGS.items() if str(one).startswith(beginning)]
            assert one.guideline is GUIDELINES[key]
            seen.add(key)
    assert seen == set(BEGINNINGS) == set(GUIDELINES) - {"far"}, "of all guidelines, distance alone is left to taste"


@pytest.mark.parametrize("report", UNRULY.values(), ids=UNRULY)
def test_the_experiment_stands_in_the_text_and_in_the_data(report: Report) -> None:
    text = " ".join(str(report).split())
    for one, plain in zip(report.advice, json.loads(json.dumps(report.to_dict()))["advice"], strict=True):
        assert f"{one} Put to the test by {one.guideline.experiment}: docs/evidence.md#{anchor(one.guideline.section)}" in text
        guideline = {"says": one.guideline.says, "experiment": one.guideline.experiment, "section": one.guideline.section}
        assert plain == {"text": str(one), "guideline": guideline}


def test_the_command_line_shows_the_experiment() -> None:
    words = ["show", "local:4|stride:8", "--layers", "2"]
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, words)
    assert "- No layer is dense." in result.stdout
    assert "Put to the test by python -m experiments ablate --recipes dense,s2,s2+1,s2+2: docs/evidence.md#dense-layers" in result.stdout


@pytest.mark.parametrize("guideline", TRAINED.values(), ids=TRAINED)
def test_every_ablation_that_is_named_compares_equal_pairs(guideline: Guideline) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(experiments_app, [*shlex.split(guideline.experiment)[3:], "--plan"])
    assert result.exit_code == 0, result.output
    settings = replace(AblateSettings.of("small"), recipes=guideline.recipes)
    assert all(one.within(settings.tolerance) for one in settings.matched()) and "dense" in guideline.recipes


@pytest.mark.parametrize("guideline", TIMED.values(), ids=TIMED)
def test_every_benchmark_that_is_named_has_cases(guideline: Guideline) -> None:
    words = shlex.split(guideline.experiment)
    assert words[:3] == ["python", "-m", "benchmarks"]
    asked = command_parser().parse_args(words[3:])
    assert asked.suites
    for suite in asked.suites:
        cases = [case for case in SUITES[suite](suite, asked.size) if asked.cases in case.name]
        assert len(cases) > 1, "something to compare"


def test_every_guideline_has_its_section_on_the_page() -> None:
    headings = re.findall(r"^## (.+)$", evidence_page({}), re.MULTILINE)
    assert [one.section for one in GUIDELINES.values() if headings.count(one.section) != 1] == []
    assert len({anchor(heading) for heading in headings}) == len(headings)


def test_the_table_of_the_how_to_page_is_that_of_the_guidelines() -> None:
    page = (ROOT / "docs/how-to/ablate.md").read_text().split("## The experiment behind an advice")[1].split("\n## ")[0]
    lines = [line for line in page.splitlines() if line.startswith("| ")][1:]
    made = [f"| {one.says} | `{one.experiment}` | [{one.section}](../evidence.md#{anchor(one.section)}) |" for one in GUIDELINES.values()]
    assert lines == made
