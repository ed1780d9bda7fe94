"""The record of an ablation: all that was found, in one file, which reads back as the outcome that it was."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from experiments.ablate import Outcome, run_ablation
from experiments.ablate_record import outcome_of, record_of
from experiments.ablate_report import summary
from experiments.ablate_settings import AblateSettings
from experiments.progress import Silent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    settings = replace(AblateSettings.of("tiny").with_steps(1, 1), recipes=("dense", "s2"), seeds=(0, 1))
    return run_ablation(settings, tmp_path_factory.mktemp("whole"), Silent())


def test_a_record_is_the_outcome_without_single_steps(whole: Outcome) -> None:
    outcome = whole
    record = record_of(outcome, "python -m experiments ablate")
    again = outcome_of(json.loads(json.dumps(record)))
    assert (again.settings, list(again.recipes), list(again.runs)) == (outcome.settings, list(outcome.recipes), list(outcome.runs))
    assert [{**one, "tokens_per_second": None} for one in summary(outcome)] == summary(again)
    assert record_of(again, "python -m experiments ablate") == record
    run = again.runs["s2", 1]
    assert run["text"]["validation"] == outcome.runs["s2", 1]["text"]["validation"] and run["tasks"]["tokens"] == 256
    assert not {"losses", "bytes_per_second", "step_seconds"} & {*run["text"], *run["tasks"]} and "made_with" not in run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "reach"}, r"record must be of kind 'ablation' and schema 1; got \('reach', 1\)"),
        ({"schema": 0}, r"record must be of kind 'ablation' and schema 1; got \('ablation', 0\)"),
        ({"runs": [{}]}, r"record must be readable; got"),
        ({"settings": {"budget": 1}}, r"record must be readable; got"),
    ],
)
def test_records_that_are_none_are_refused(whole: Outcome, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outcome_of({**record_of(whole, "python -m experiments ablate"), **change})
