"""Bombs: a pattern, expression or JSON text of any size costs bounded work and ends in one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from s2attn.lab.words import read_what
from s2attn.patterns import (
    ByRange,
    Dense,
    Dilated,
    Global,
    Local,
    LongNet,
    Pattern,
    PerHead,
    Power,
    Random,
    Recipe,
    Sink,
    Stride,
    Window,
    parse_pattern,
)

BIG = 10**20


def nested(depth: int, name: str) -> str:
    """JSON of a `PerHead` in a `PerHead` in a ..."""
    inner = '{"type":"Dense"}'
    for _ in range(depth):
        inner = '{"type":"PerHead","patterns":{},"default":' + inner + "}"
    document = {"pattern": inner, "recipe": f'{{"default":{inner}}}'}[name]
    return f'{{"version":1,"{name}":{document}}}'


def joined(depth: int) -> Pattern:
    pattern: Pattern = Window(1)
    for i in range(depth):
        pattern = (pattern | Sink(i + 1)) if i % 2 else (pattern & Local(i + 1))
    return pattern


def doubled() -> Pattern:
    """Every step holds the one before it twice: 2 ** 40 parts from 40 lines."""
    pattern: Pattern = Window(1)
    for i in range(40):
        pattern = (pattern | Sink(i + 1)) & (pattern | Sink(i + 2))
    return pattern


BOMBS: dict[str, tuple[Callable[[], object], str]] = {
    "parentheses": (
        lambda: parse_pattern("(" * 1000 + "dense" + ")" * 1000),
        "pattern must nest at most 64 deep; got '",
    ),
    "open parentheses": (lambda: parse_pattern("(" * 9000), "pattern must nest at most 64 deep"),
    "a megabyte": (
        lambda: parse_pattern("dense|" * 170_000 + "dense"),
        "at most 10000 characters; got 1020005 characters",
    ),
    "a long wrong word": (
        lambda: parse_pattern("x" * 9000),
        "pattern name must be one of .*; got 'x{40}' ... 'x{30}'",
    ),
    "digits": (
        lambda: parse_pattern("window:" + "9" * 5000),
        "window n must be a number of at most 20 digits or a word",
    ),
    "a wide window": (
        lambda: parse_pattern("window:99999999999999999999"),
        "Window n must be at most 2147483647; got 9{20}",
    ),
    "many draws": (
        lambda: parse_pattern("random:1000000"),
        "Random n must be at most 256; got 1000000",
    ),
    "nested expression": (
        lambda: parse_pattern("(" * 70 + "dense" + "|sink:1)&dense" * 70),
        "must nest at most 64 deep",
    ),
    "JSON brackets": (
        lambda: Pattern.from_json("[" * 100_000),
        "pattern must nest at most 64 deep",
    ),
    "JSON brackets of a recipe": (
        lambda: Recipe.from_json("[" * 100_000),
        "recipe must nest at most 64 deep",
    ),
    "JSON digits": (
        lambda: Pattern.from_json('{"version":' + "1" * 5000 + "}"),
        "pattern must be JSON",
    ),
    "JSON of objects": (
        lambda: Pattern.from_json(nested(300, "pattern")),
        "pattern must nest at most 64 deep",
    ),
    "JSON of a recipe": (
        lambda: Recipe.from_json(nested(300, "recipe")),
        "pattern must nest at most 64 deep",
    ),
    "JSON of lists": (
        lambda: Pattern.from_json('{"version":1,"pattern":{"type":"Or","of_parts":[' + "[" * 900 + "]" * 900 + "]}}"),
        "must be an object with a .type.",
    ),
    "JSON of many heads": (
        lambda: Pattern.from_json('{"version":1,"pattern":{"type":"PerHead","patterns":{"' + "1" * 5000 + '":{"type":"Dense"}}}}'),
        "PerHead in JSON must map numbers to patterns; got the key '1{40}'",
    ),
    "JSON of a layer twice": (
        lambda: Recipe.from_dict({"default": {"type": "Dense"}, "layers": {"01": {"type": "Dense"}}}),
        "recipe layers must map numbers to patterns; got the key '01'",
    ),
    "deep values": (lambda: joined(200), "pattern must nest at most 64 deep"),
    "many parts": (
        lambda: ByRange([(i, i + 1, Dense()) for i in range(5000)]),
        "must be made of at most 4096 patterns; got 5001",
    ),
    "many heads": (
        lambda: PerHead({i: Dense() for i in range(5000)}),
        "must be made of at most 4096 patterns",
    ),
    "shared parts": (doubled, "must be made of at most 4096 patterns"),
    "dense layers": (
        lambda: Recipe(Dense(), dense_layers=range(10**12)),
        "Recipe must name at most 4096 layers",
    ),
    "a layer": (
        lambda: Recipe(Dense(), dense_layers=[BIG]),
        "Recipe dense_layers must be at most 2147483647",
    ),
    "Window": (
        lambda: Window(10**5000),
        "Window n must be at most 2147483647; got a number of 16610 bits",
    ),
    "Sink": (lambda: Sink(BIG), "Sink n must be at most"),
    "Global": (lambda: Global(BIG), "Global n must be at most"),
    "Global last": (lambda: Global(1, BIG), "Global last must be at most"),
    "Local": (lambda: Local(BIG), "Local n must be at most"),
    "Stride": (lambda: Stride(BIG), "Stride stride must be at most"),
    "Stride offset": (lambda: Stride(4, offset=BIG), "Stride offset, .* must be at most"),
    "Stride shift": (lambda: Stride(4, shift=BIG), "Stride shift must be at most"),
    "Power": (lambda: Power(BIG), "Power base must be at most"),
    "Dilated": (lambda: Dilated(BIG), "Dilated dilation must be at most"),
    "Dilated n": (lambda: Dilated(2, BIG), "Dilated n must be at most"),
    "LongNet": (lambda: LongNet(BIG), "LongNet segment must be at most"),
    "LongNet levels": (
        lambda: LongNet(8, 70),
        "LongNet levels must be so few that segment .* at most 2147483647 blocks; got 70",
    ),
    "LongNet in all": (lambda: LongNet(2**20, 12), "LongNet levels must be so few"),
    "Random seed": (lambda: Random(3, seed=BIG), "Random seed must be at most"),
    "ByRange": (lambda: ByRange([(0, BIG, Dense())]), "ByRange end must be at most"),
    "PerHead": (lambda: PerHead({BIG: Dense()}), "PerHead head must be at most"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_clear_error(name: str) -> None:
    make, message = BOMBS[name]
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert len(str(caught.value)) < 1000
    assert time.process_time() - started < 5  # hours without the bounds, milliseconds with them


def test_what_is_large_but_sane_is_taken() -> None:
    assert len(parse_pattern("|".join(f"sink:{i}" for i in range(1, 900))).parts) == 899
    assert parse_pattern("(" * 60 + "dense" + ")" * 60) == Dense()
    assert Pattern.from_json(joined(60).to_json()) == joined(60)
    assert LongNet(8, 28).levels == 28 and Random(256).n == 256 and Window(2**31 - 1).n == 2**31 - 1
    assert Pattern.from_json(nested(60, "pattern")) is not None


def test_files_of_brackets_are_one_clear_error(tmp_path) -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 5000):
        (tmp_path / "bomb.json").write_text(text)
        with pytest.raises(ValueError, match="pattern must "):
            read_what(str(tmp_path / "bomb.json"))


def test_a_call_from_deep_in_the_stack_is_an_error_too() -> None:
    """Whatever is left of the stack: RecursionError is never what a caller sees of a text of brackets."""
    code = (
        "from s2attn.patterns import Pattern\n"
        "def deep(n):\n    return Pattern.from_json('[' * 100000) if n == 0 else deep(n - 1)\n"
        "try:\n    deep(800)\nexcept ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "must nest at most 64 deep" in done.stdout


def test_texts_of_older_releases_are_read() -> None:
    old = {"version": 1, "pattern": {"type": "Global", "n": 64}}
    assert Pattern.from_json(json.dumps(old)) == Global(64)
    assert Global(64).to_json() == '{"pattern":{"n":64,"type":"Global"},"version":1}'
    assert Pattern.from_json(Global(64, last=8).to_json()) == Global(64, last=8)
