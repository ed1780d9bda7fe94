"""Patterns as one line of text for the command line: ``"local:16|stride:8"``."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from s2attn.core import bad_value
from s2attn.patterns.base import KINDS, MOST_DEPTH, And, Or, Pattern, public_kinds

MOST_TEXT = 10_000
"""Characters of an expression."""
_TOKEN = re.compile(r"\s*(?:(?P<sign>[|&()])|(?P<atom>[A-Za-z_]\w*(?::[^|&()\s]*)?))")
_WRITABLE = ("Dense", "Local", "Window", "Sink", "Global", "Stride", "Power", "Dilated", "LongNet", "Random")


def parse_pattern(text: str) -> Pattern:
    """Read a pattern expression: names with arguments after a colon, joined with ``|`` and ``&`` (stronger), and parentheses.

    Args:
        text: for example ``"local:16|stride:8"``, ``"sink:64 | window:512"``, ``"(local:4,block=32|stride:8,block=32) & window:4096"``.
            Arguments stand in the order of the pattern's fields or carry their name.

    Raises:
        ValueError: naming the word that is not understood; an expression that is too long or nests too deep.

    >>> parse_pattern("local:16|stride:8,offset=2")
    Local(n=16, block=64) | Stride(stride=8, offset=2, shift=0, block=64, heads='kv')
    """
    if not isinstance(text, str) or not text.strip():
        raise bad_value("pattern", "must be an expression such as 'local:16|stride:8'", repr(text)[:80])
    if len(text) > MOST_TEXT:
        raise bad_value("pattern", f"must be an expression of at most {MOST_TEXT} characters", f"{len(text)} characters")
    return _Reader(_tokens(text), text).whole()


def _tokens(text: str) -> list[str]:
    tokens, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            came = f"{shown(text[at:].strip())} in {shown(text)}"
            raise bad_value("pattern", "must be made of names, numbers, | & and parentheses", came)
        tokens.append(match["sign"] or match["atom"])
        at = match.end()
    return tokens


@dataclass(eq=False)
class _Reader:
    """Reads tokens from left to right: a pattern is parts joined with ``|``, such a part parts joined with ``&``."""

    tokens: list[str]
    text: str
    at: int = 0

    def whole(self) -> Pattern:
        pattern = self.either(1)
        if self.at < len(self.tokens):
            came = f"{self.tokens[self.at]!r} in {shown(self.text)}"
            raise bad_value("pattern", "must join its parts with | or &", came)
        return pattern

    def takes(self, sign: str) -> bool:
        """Whether the next token is ``sign``, which is then read."""
        found = self.tokens[self.at : self.at + 1] == [sign]
        self.at += found
        return found

    def either(self, depth: int) -> Pattern:
        parts = [self.both(depth)]
        while self.takes("|"):
            parts.append(self.both(depth))
        return Or.of(*parts)

    def both(self, depth: int) -> Pattern:
        parts = [self.single(depth)]
        while self.takes("&"):
            parts.append(self.single(depth))
        return And.of(*parts)

    def single(self, depth: int) -> Pattern:
        if depth > MOST_DEPTH:
            raise bad_value("pattern", f"must nest at most {MOST_DEPTH} deep", shown(self.text))
        if self.takes("("):
            inner = self.either(depth + 1)
            if not self.takes(")"):
                raise bad_value("pattern", "must close every parenthesis", shown(self.text))
            return inner
        if self.at == len(self.tokens) or self.tokens[self.at] in "|&)":
            raise bad_value("pattern", "must have a pattern on both sides of | and &", shown(self.text))
        self.at += 1
        return _atom(self.tokens[self.at - 1])


def shown(text: str) -> str:
    """A text in quotation marks, its middle left out where it is long."""
    return repr(text) if len(text) <= 80 else f"{text[:40]!r} ... {text[-30:]!r}"


def _atom(word: str) -> Pattern:
    name, _, arguments = word.partition(":")
    kinds = {kind.lower(): KINDS[kind] for kind in public_kinds() if kind in _WRITABLE}
    if name.lower() not in kinds:
        raise bad_value("pattern name", f"must be one of {', '.join(kinds)}", shown(name))
    kind = kinds[name.lower()]
    fields = [field.name for field in dataclasses.fields(kind)]
    given: dict[str, Any] = {}
    for i, argument in enumerate(arguments.split(",") if arguments else []):
        key, equals, value = argument.rpartition("=")
        field = key if equals else (fields[i] if i < len(fields) else "")
        if field not in fields or field in given:
            raise bad_value(f"{name} argument", f"must be one of {', '.join(fields)}, once each", shown(argument))
        given[field] = _value(value, f"{name} {field}")
    try:
        return kind(**given)
    except TypeError as error:
        if "required positional" not in str(error):
            raise
        raise bad_value(name, f"must have its {fields[0]}, as in {name}:8", shown(word)) from None


def _value(text: str, argument: str) -> Any:
    if re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    if text.lower() == "none":
        return None
    if re.fullmatch(r"[a-z]+", text):
        return text
    raise bad_value(argument, "must be a number of at most 20 digits or a word", shown(text))
