"""Patterns are values: equal, hashed, printed as code, carried as JSON, parsed from a line of text."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings

import s2attn
from s2attn.patterns import *  # noqa: F403  so that a repr can be evaluated
from s2attn.patterns import (
    PRESETS,
    Blocks,
    ByRange,
    Dense,
    Dilated,
    Head,
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
    preset,
)
from s2attn.testing.strategies import patterns


@settings(max_examples=150)
@given(patterns())
def test_repr_is_code_and_json_is_faithful(pattern):
    again = eval(repr(pattern))
    assert again == pattern and hash(again) == hash(pattern)
    read = Pattern.from_json(pattern.to_json())
    assert read == pattern and read.digest == pattern.digest
    assert json.loads(pattern.to_json())["version"] == 1


@settings(max_examples=100)
@given(patterns(), patterns())
def test_different_patterns_have_different_text(one, two):
    assert (one == two) == (one.to_json() == two.to_json())


def test_digest_is_the_same_in_another_process():
    code = "import s2attn; print((s2attn.Local(16) | s2attn.Stride(8)).digest)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == (Local(16) | Stride(8)).digest


def test_joining_flattens_and_drops_repetitions():
    a, b, c = Local(1), Sink(4), Window(9)
    assert (a | b) | c == a | (b | c)
    assert a | a == a
    assert repr((a | b) & c) == "(Local(n=1, block=64) | Sink(n=4)) & Window(n=9)"
    with pytest.raises(TypeError):
        a | 3


def test_patterns_are_immutable():
    with pytest.raises(AttributeError):
        Window(3).n = 4


@pytest.mark.parametrize("name", PRESETS)
def test_presets_travel(name):
    made = preset(name)
    assert type(made).from_json(made.to_json()) == made
    assert eval(repr(made)) == made


def test_preset_settings():
    assert preset("s2", local=4, stride=2) == Local(4) | Stride(2, offset="spread")
    assert preset("power_attention") == Sink(256) | Local(5, 256) | Power(2, 256)
    phi = preset("phi3_small")
    assert [phi.pattern(i) == Dense() for i in range(4)] == [False, True, False, True]
    assert phi.default == Local(16) | Stride(8, offset="spread", shift=1, heads="query")
    with pytest.raises(ValueError, match=r"preset must be one of s2, phi3_small, .*; got 's3'"):
        preset("s3")
    with pytest.raises(ValueError, match="preset settings must be those of s2; got windw"):
        preset("s2", windw=3)


def test_recipe():
    recipe = Recipe(Local(2), dense_layers=[0, 7], layers={7: Window(5), 3: Sink(2)}, dense_every=4)
    kinds = [recipe.pattern(i) for i in range(9)]
    assert [kind == Dense() for kind in kinds] == [True, False, False, False, False, False, False, False, False]
    assert kinds[7] == Window(5) and kinds[3] == Sink(2) and kinds[1] == Local(2)
    assert Recipe(Local(2), dense_every=4).pattern(3) == Dense()
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert hash(recipe) == hash(Recipe.from_json(recipe.to_json()))
    with pytest.raises(TypeError, match="Recipe default must be a Pattern; got int"):
        Recipe(3)
    with pytest.raises(ValueError, match="layer must be an integer >= 0; got -1"):
        recipe.pattern(-1)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("local:16|stride:8", Local(16) | Stride(8)),
        (" Sink:64 | window:512 ", Sink(64) | Window(512)),
        ("(local:4,block=32 | stride:8,block=32) & window:4096", (Local(4, 32) | Stride(8, block=32)) & Window(4096)),
        ("dense", Dense()),
        ("power", Power()),
        ("dilated:2,20,256", Dilated(2, 20, 256)),
        ("dilated:2,none", Dilated(2)),
        ("stride:8,head,1,heads=query", Stride(8, shift=1, heads="query")),
        ("longnet:8,levels=3|random:2,seed=7", LongNet(8, 3) | Random(2, 7)),
    ],
)
def test_expressions(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("locl:16|stride:8", "pattern name must be one of .*local.*; got 'locl'"),
        ("local:16|", "must have a pattern on both sides"),
        ("local:16||stride:8", "must have a pattern on both sides"),
        ("local:16 stride:8", "must join its parts with . or &"),
        ("(local:16", "must close every parenthesis"),
        ("local:16)", "must join its parts"),
        ("local:x7", "local n must be a number of at most 20 digits or a word; got 'x7'"),
        ("local:16,wide=3", "local argument must be one of n, block, once each; got 'wide=3'"),
        ("local:1,2,3", "local argument must be one of n, block"),
        ("local", "local must have its n, as in local:8; got 'local'"),
        ("local:0", "Local n must be an integer >= 1; got 0"),
        ("local:3,block=48", "Local block must be one of 16, 32, 64, 128, 256; got 48"),
        ("", "must be an expression such as"),
        ("local:16 + sink:3", "must be made of names"),
    ],
)
def test_expressions_with_a_typo(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Window(0), ValueError, "Window n must be an integer >= 1; got 0"),
        (lambda: Window(2.5), TypeError, "Window n must be an integer >= 1; got float"),
        (lambda: Window(True), TypeError, "Window n must be an integer"),
        (lambda: Sink(-1), ValueError, "Sink n must be an integer >= 1; got -1"),
        (lambda: Local(3, block=50), ValueError, "Local block must be one of 16, 32, 64, 128, 256; got 50"),
        (lambda: Stride(0), ValueError, "Stride stride must be an integer >= 1; got 0"),
        (lambda: Stride(3, offset="heads"), TypeError, "Stride offset"),
        (lambda: Stride(3, heads="all"), ValueError, "heads must be 'kv' or 'query'; got 'all'"),
        (lambda: Power(1), ValueError, "Power base must be an integer >= 2; got 1"),
        (lambda: LongNet(3), ValueError, "LongNet segment must be a power of two; got 3"),
        (lambda: ByRange([]), ValueError, "ByRange ranges must be a non-empty list"),
        (lambda: ByRange([(0, 8, Dense()), (4, 9, Dense())]), ValueError, "ByRange ranges must ascend without overlap"),
        (lambda: ByRange([(8, 8, Dense())]), ValueError, "ByRange end must be an integer >= 9; got 8"),
        (lambda: ByRange([(0, None, Dense()), (4, 9, Dense())]), ValueError, "must ascend without overlap"),
        (lambda: ByRange([(0, 8, "dense")]), TypeError, "ByRange pattern must be a Pattern; got str"),
        (lambda: PerHead([Dense()]), TypeError, "PerHead patterns must map head numbers to patterns; got list"),
        (lambda: PerHead({0: 1}), TypeError, "PerHead pattern must be a Pattern; got int"),
        (lambda: PerHead({-1: Dense()}), ValueError, "PerHead head must be an integer >= 0; got -1"),
        (lambda: PerHead({9: Dense()}).at(Head(0, 4, 4)), ValueError, "PerHead patterns must name kv heads below 4; got 9"),
        (lambda: Blocks(["12"]), ValueError, "Blocks mask as text must hold only 0 and 1; got '12'"),
    ],
)
def test_bad_patterns(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "pattern must be JSON"),
        ("[]", "pattern must be a JSON object"),
        ('{"version": 1}', "pattern must be a JSON object"),
        ('{"version": 9, "pattern": {"type": "Dense"}}', "pattern must have version 1; got 9"),
        ('{"version": 1, "pattern": {"type": "Dens"}}', "pattern type must be one of .*; got 'Dens'"),
        ('{"version": 1, "pattern": {"type": "Grid"}}', "pattern type must be one of"),
        ('{"version": 1, "pattern": {"type": "Window"}}', "Window in JSON must be complete"),
        ('{"version": 1, "pattern": {"type": "Window", "n": 3, "m": 4}}', "Window in JSON must have only the fields n; got 'm'"),
        ('{"version": 1, "pattern": {"type": "Window", "n": -3}}', "Window n must be an integer >= 1; got -3"),
        ('{"version": 1, "pattern": {"type": "Or", "of_parts": []}}', "Or in JSON must list of_parts"),
        ('{"version": 1, "pattern": {"type": "ByRange", "ranges": 3}}', "ByRange in JSON must list"),
        ('{"version": 1, "pattern": {"type": "PerHead", "patterns": [], "default": {"type": "Dense"}}}', "PerHead in JSON must map"),
    ],
)
def test_malformed_json(text, message):
    with pytest.raises(ValueError, match=message):
        Pattern.from_json(text)


def test_malformed_recipe_json():
    with pytest.raises(ValueError, match="recipe must be a JSON object"):
        Recipe.from_json('{"version": 1, "pattern": {"type": "Dense"}}')
    with pytest.raises(ValueError, match="recipe must be an object with default"):
        Recipe.from_json('{"version": 1, "recipe": {"dense": []}}')


def test_public_names_are_there():
    for name in s2attn.__all__:
        assert getattr(s2attn, name).__doc__, name
