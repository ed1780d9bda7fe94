"""A pattern in the words of a person: a preset's name, the path of a JSON file, or an expression."""

from __future__ import annotations

import json
import os
from pathlib import Path

from s2attn.core import bad_value
from s2attn.patterns import PRESETS, Pattern, Recipe, parse_pattern, preset
from s2attn.patterns.parse import shown


def read_what(what: str, name: str = "WHAT") -> Pattern | Recipe:
    """A preset's name, the path of a JSON file, or an expression.

    Args:
        name: what an error calls it.

    Raises:
        ValueError: it is none of them, or the file or the expression cannot be read.

    >>> read_what("sink:4|window:512")
    Sink(n=4) | Window(n=512)
    """
    if what in PRESETS:
        return preset(what)
    if what.endswith(".json") or os.path.isfile(what):  # False for a text that is too long for a path
        return read_file(Path(what), name)
    if what.isidentifier() and what.lower() not in ("dense", "power", "longnet"):
        choices = f"a preset ({', '.join(PRESETS)}), a JSON file, or an expression such as local:16|stride:8"
        raise bad_value(name, f"must be {choices}", shown(what))
    return parse_pattern(what)


def read_file(path: Path, name: str = "WHAT") -> Pattern | Recipe:
    """The pattern or recipe in a JSON file."""
    if not os.path.isfile(path):
        raise bad_value(name, "must name a JSON file that exists", shown(str(path)))
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        is_recipe = "recipe" in json.loads(text)
    except (ValueError, TypeError, RecursionError):
        is_recipe = False  # the pattern's reader says what is wrong
    return Recipe.from_json(text) if is_recipe else Pattern.from_json(text)
