"""The shape of the source: readable files and functions, captions on every room, documented names, true signposts."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import s2attn

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "s2attn"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """A long contract does not make a function hard to read, so it does not count."""
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1 if ast.get_docstring(node) is not None else 0


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    long = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
            if lines > MAX_FUNCTION_LINES:
                long.append(f"{node.name}: {lines} lines")
    assert long == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_have_a_caption(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "the module needs a docstring that says what it is for"


CPP_FILES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in {".cpp", ".h"})


@pytest.mark.parametrize("path", CPP_FILES, ids=name_of)
def test_cpp_files_stay_readable_and_have_a_caption(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES and max(map(len, lines)) <= 100
    assert lines[0].startswith("// ") and len(lines[0]) > 20


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in FILES}
    assert sorted(name_of(folder) for folder in folders if not (folder / "__init__.py").exists()) == []


@pytest.mark.parametrize("name", sorted(s2attn.__all__))
def test_public_names_are_documented(name: str) -> None:
    value = getattr(s2attn, name)
    if isinstance(value, str):
        return
    doc = value.__doc__
    assert doc and doc.strip(), f"s2attn.{name} has no docstring"
    written_by_dataclass = isinstance(value, type) and doc.startswith(f"{value.__name__}(")
    assert not written_by_dataclass, f"s2attn.{name} has only the signature that dataclass writes"


def signposts() -> list[tuple[str, str]]:
    """(row, path) for every path in the table that heads CONTRIBUTING.md."""
    head = (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[0]
    rows = [line for line in head.splitlines() if line.startswith("| ") and not line.startswith("| where")]
    return [(row.split("|")[1].strip(), path) for row in rows for path in re.findall(r"`([\w.-]+/[\w./-]*)`", row)]


def test_the_table_of_signposts_is_there() -> None:
    assert {row for row, _ in signposts()} >= {"a pattern", "a preset", "a backend", "an op", "a command", "a docs page", "a decision"}


@pytest.mark.parametrize(("row", "path"), signposts())
def test_signposts_are_true(row: str, path: str) -> None:
    assert (ROOT / path).exists(), f"CONTRIBUTING.md sends whoever adds {row} to {path}, which does not exist"


UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError|pytest\.skip|pytest\.xfail|type: ignore)\b")


@pytest.mark.parametrize("folder", ["s2attn", "examples", "docs"])
def test_nothing_unfinished_is_left(folder: str) -> None:
    found = []
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in {".py", ".md"}:
            found += [f"{name_of(path)}: {word}" for word in UNFINISHED.findall(path.read_text())]
    assert found == []


LEAVES_OUT = re.compile(r"pytest\.(skip|xfail|mark\.skip|mark\.skipif|mark\.xfail)\b")
MAY_LEAVE_OUT = {"tests/kernels/conftest.py", "tests/gpu/conftest.py"}


def test_tests_are_left_out_in_two_places_only() -> None:
    """Where a machine has no GPU, or has one: nowhere else does a test decide not to run."""
    found = {name_of(path) for path in (ROOT / "tests").rglob("*.py") if LEAVES_OUT.search(path.read_text())}
    assert found == MAY_LEAVE_OUT
