"""The pages keep up with the code: every command, option, pattern and preset is written down, and every link leads somewhere."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.__main__ import command_parser
from experiments.cli.app import app as experiments_app
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


def benchmark_options() -> Iterator[tuple[str, list[str]]]:
    """Every command of the benchmarks with its options; those of workers have no help."""
    group = next(action for action in command_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for choice in group._choices_actions:
        actions = group.choices[choice.dest]._actions
        yield f"python -m benchmarks {choice.dest}", [option for action in actions for option in action.option_strings]


def options_of(command: Any) -> list[str]:
    return [option for parameter in command.params for option in parameter.opts + parameter.secondary_opts]


APPS = {"s2attn": app, "python -m experiments": experiments_app}
COMMANDS = [(name, options_of(one)) for start, a in APPS.items() for name, one in commands(typer.main.get_command(a), start)]
COMMANDS += benchmark_options()


@pytest.mark.parametrize(("name", "options"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_command_and_option_is_on_its_page(name: str, options: list[str]) -> None:
    page = (ROOT / "docs/reference/cli.md").read_text()
    sections = {part.splitlines()[0]: part for part in page.split("\n## ")}
    heading = next((heading for heading in sections if heading.strip("`").startswith(name)), None)
    assert heading, f"docs/reference/cli.md has no section `{name}`"
    long = [option for option in options if option.startswith("--")]
    assert [option for option in long if option != "--help" and f"`{option}`" not in sections[heading]] == []


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


def headings_of(page: Path) -> set[str]:
    """The headings of a page as a site links to them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_into_pages_lead_to_headings(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+\.md#[^)\s]+|#[^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("http") and anchor not in {re.sub("-+", "-", one) for one in headings_of(target)} | headings_of(target):
            wrong.append(link)
    assert wrong == []
