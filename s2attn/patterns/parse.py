"""Patterns as one line of text for the command line: ``"local:16|stride:8"``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from s2attn.core import bad_value
from s2attn.patterns.base import KINDS, And, Or, Pattern, public_kinds

_TOKEN = re.compile(r"\s*(?:(?P<sign>[|&()])|(?P<atom>[A-Za-z_]\w*(?::[^|&()\s]*)?))")
_WRITABLE = ("Dense", "Local", "Window", "Sink", "Global", "Stride", "Power", "Dilated", "LongNet", "Random")


def parse_pattern(text: str) -> Pattern:
    """Read a pattern expression: names with arguments after a colon, joined with ``|`` and ``&`` (stronger), and parentheses.

    Args:
        text: for example ``"local:16|stride:8"``, ``"sink:64 | window:512"``, ``"(local:4,block=32|stride:8,block=32) & window:4096"``.
            Arguments stand in the order of the pattern's fields or carry their name.

    Raises:
        ValueError: naming the word that is not understood.

    >>> parse_pattern("local:16|stride:8,offset=2")
    Local(n=16, block=64) | Stride(stride=8, offset=2, shift=0, block=64, heads='kv')
    """
    if not isinstance(text, str) or not text.strip():
        raise bad_value("pattern", "must be an expression such as 'local:16|stride:8'", repr(text))
    tokens = _tokens(text)
    pattern, rest = _either(tokens, text)
    if rest:
        raise bad_value("pattern", "must join its parts with | or &", f"{rest[0]!r} in {text!r}")
    return pattern


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise bad_value("pattern", "must be made of names, numbers, | & and parentheses", f"{text[at:].strip()!r} in {text!r}")
        tokens.append(match["sign"] or match["atom"])
        at = match.end()
    return tokens


def _either(tokens: list[str], text: str) -> tuple[Pattern, list[str]]:
    part, rest = _both(tokens, text)
    parts = [part]
    while rest and rest[0] == "|":
        part, rest = _both(rest[1:], text)
        parts.append(part)
    return Or.of(*parts), rest


def _both(tokens: list[str], text: str) -> tuple[Pattern, list[str]]:
    part, rest = _single(tokens, text)
    parts = [part]
    while rest and rest[0] == "&":
        part, rest = _single(rest[1:], text)
        parts.append(part)
    return And.of(*parts), rest


def _single(tokens: list[str], text: str) -> tuple[Pattern, list[str]]:
    if not tokens or tokens[0] in "|&)":
        raise bad_value("pattern", "must have a pattern on both sides of | and &", repr(text))
    if tokens[0] != "(":
        return _atom(tokens[0]), tokens[1:]
    inner, rest = _either(tokens[1:], text)
    if not rest or rest[0] != ")":
        raise bad_value("pattern", "must close every parenthesis", repr(text))
    return inner, rest[1:]


def _atom(word: str) -> Pattern:
    name, _, arguments = word.partition(":")
    kinds = {kind.lower(): KINDS[kind] for kind in public_kinds() if kind in _WRITABLE}
    if name.lower() not in kinds:
        raise bad_value("pattern name", f"must be one of {', '.join(kinds)}", repr(name))
    kind = kinds[name.lower()]
    fields = [field.name for field in dataclasses.fields(kind)]
    given: dict[str, Any] = {}
    for i, argument in enumerate(arguments.split(",") if arguments else []):
        key, equals, value = argument.rpartition("=")
        field = key if equals else (fields[i] if i < len(fields) else "")
        if field not in fields or field in given:
            raise bad_value(f"{name} argument", f"must be one of {', '.join(fields)}, once each", repr(argument))
        given[field] = _value(value, f"{name} {field}")
    try:
        return kind(**given)
    except TypeError as error:
        if "required positional" not in str(error):
            raise
        raise bad_value(name, f"must have its {fields[0]}, as in {name}:8", repr(word)) from None


def _value(text: str, argument: str) -> Any:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if text.lower() == "none":
        return None
    if re.fullmatch(r"[a-z]+", text):
        return text
    raise bad_value(argument, "must be a number or a word", repr(text))
