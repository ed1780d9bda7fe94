"""The pages keep up with the code: every command, option, pattern and preset is written down, and every link leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from s2attn.cli.app import app
from s2attn.patterns import PRESETS
from s2attn.patterns.base import public_kinds

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
JOINED = {"And", "Or"}


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command below a typer app's command, with its full name; groups are not commands themselves."""
    if hasattr(command, "commands"):
        for part, inner in command.commands.items():
            yield from commands(inner, f"{name} {part}")
    else:
        yield name, command


COMMANDS = list(commands(typer.main.get_command(app), "s2attn"))


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_command_and_option_is_on_its_page(name: str, command: Any) -> None:
    page = (ROOT / "docs/reference/cli.md").read_text()
    sections = {part.splitlines()[0]: part for part in page.split("\n## ")}
    heading = next((heading for heading in sections if heading.strip("`").startswith(name)), None)
    assert heading, f"docs/reference/cli.md has no section `{name}`"
    options = [option for parameter in command.params for option in parameter.opts + parameter.secondary_opts if option.startswith("--")]
    assert [option for option in options if option != "--help" and f"`{option}`" not in sections[heading]] == []


def test_every_pattern_and_preset_is_on_its_page() -> None:
    page = (ROOT / "docs/reference/patterns.md").read_text()
    assert [kind for kind in public_kinds() if kind not in JOINED and f"| `{kind}(" not in page] == []
    assert [name for name in PRESETS if f"| `{name}` |" not in page] == []


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    missing = [page.relative_to(ROOT / "docs") for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [str(page) for page in missing if f": {page.as_posix()}\n" not in menu] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.split("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert [link for link in local if not (page.parent / link).exists()] == []
