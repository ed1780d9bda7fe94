"""Every Python block of the documentation runs: a page from top to bottom, in one namespace and an empty folder."""

from __future__ import annotations

from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
READER = Sybil(parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole page is one test, because its blocks build on each other."""
    monkeypatch.chdir(tmp_path)
    for example in READER.parse(page).examples():
        example.evaluate()


def test_blocks_are_found_and_their_failures_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\n>>> x + 1\n3\n\n```\n")
    first, second = READER.parse(page).examples()
    first.evaluate()
    with pytest.raises(AssertionError, match="Expected"):
        second.evaluate()
