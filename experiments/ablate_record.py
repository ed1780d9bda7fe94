"""The record of an ablation: everything that it found, in one file that can be kept, and read again as the outcome that it was."""

from __future__ import annotations

import json

from experiments.ablate import Outcome
from experiments.ablate_match import Matched
from experiments.ablate_settings import AblateSettings, Record
from s2attn.core import bad_value
from s2attn.patterns import Recipe

KIND = "ablation"
SCHEMA = 1
# The times of single runs hold only where nothing else ran, which nobody can see in a record; they stay with the runs.
_TIMES = ("step_seconds", "bytes_per_second", "train_seconds")


def record_of(outcome: Outcome, command: str) -> Record:
    """What ``record.json`` holds: settings, recipes with their pairs, and every run but the losses of its single steps, as JSON values.

    Args:
        command: how the ablation was started.
    """
    settings = outcome.settings
    made = {
        "schema": SCHEMA,
        "kind": KIND,
        "command": command,
        "size": settings.size,
        "settings": settings.facts(),
        "seeds": list(settings.seeds),
        "recipes": [_recipe(one, settings.tolerance) for one in outcome.recipes],
        "open": [list(one) for one in outcome.open],
        "runs": [_run(run) for run in outcome.runs.values()],
    }
    return json.loads(json.dumps(made))


def _recipe(one: Matched, tolerance: float) -> Record:
    pairs = {"pairs": one.pairs, "wanted_pairs": one.wanted, "dense_pairs": one.dense_pairs, "equal_pairs": one.equal(tolerance)}
    return {"name": one.name, "meaning": one.meaning, "recipe": json.loads(one.recipe.to_json()), **pairs}


def _run(run: Record) -> Record:
    tasks = run["tasks"]
    return {
        "name": run["name"],
        "seed": run["seed"],
        "text": None if run["text"] is None else {key: value for key, value in run["text"].items() if key not in _TIMES},
        "tasks": None if tasks is None else {key: value for key, value in tasks.items() if key != "losses"},
        "memory": run["memory"],
        "host": run["host"],
        "seconds": run["seconds"],
    }


def outcome_of(record: Record) -> Outcome:
    """The outcome that :func:`record_of` was given, less what it left out.

    Raises:
        ValueError: the record is of another kind or schema, or cannot be read.
    """
    found = (record.get("kind"), record.get("schema"))
    if found != (KIND, SCHEMA):
        raise bad_value("record", f"must be of kind {KIND!r} and schema {SCHEMA}", found)
    try:
        recipes = [_matched(one) for one in record["recipes"]]
        settings = AblateSettings.from_facts(record["settings"], record["size"], [one.name for one in recipes], record["seeds"])
        runs = {(run["name"], run["seed"]): run for run in record["runs"]}
    except (KeyError, TypeError) as error:
        raise bad_value("record", "must be readable", repr(error)) from None
    return Outcome(settings, recipes, runs)


def _matched(one: Record) -> Matched:
    recipe = Recipe.from_json(json.dumps(one["recipe"]))
    return Matched(one["name"], one["meaning"], recipe, one["pairs"], one["wanted_pairs"], one["dense_pairs"])
