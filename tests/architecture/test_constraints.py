"""A fresh machine installs the versions that were run together: constraints/ pins every direct requirement."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# torch and Triton are chosen in the Makefile, because a CUDA build of torch brings its own Triton.
CHOSEN_IN_MAKEFILE = {"torch", "triton", "s2attn"}


def requirements(extra: str) -> dict[str, Requirement]:
    """Direct requirements of an extra and of the extras that it includes, by name."""
    found: dict[str, Requirement] = {}
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]:
        requirement = Requirement(line)
        if requirement.name == "s2attn":
            for included in requirement.extras:
                found |= requirements(included)
        elif requirement.marker is None or requirement.marker.evaluate():
            found[requirement.name] = requirement
    return {name: requirement for name, requirement in found.items() if name not in CHOSEN_IN_MAKEFILE}


def pinned(file: str, python: str) -> dict[str, str]:
    """The version that a constraints file gives to each package under one version of Python."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    lines = [Requirement(line) for line in (ROOT / "constraints" / file).read_text().splitlines()]
    return {r.name: str(r.specifier)[2:] for r in lines if r.marker is None or r.marker.evaluate(environment)}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("file", "extra"), [("test.txt", "dev"), ("transformers-oldest.txt", "test")])
def test_every_direct_requirement_is_pinned_within_its_range(file: str, extra: str, python: str) -> None:
    versions = pinned(file, python)
    for name, requirement in requirements(extra).items():
        assert name in versions, f"constraints/{file} does not pin {name}; run `make constraints`"
        assert requirement.specifier.contains(versions[name]), f"{name} {versions[name]} is outside {requirement}"


def test_every_installation_of_the_makefile_is_pinned_but_the_newest() -> None:
    """Only the newest releases, the resolver, and what is pinned in the line itself are installed without constraints."""
    loose = []
    for line in (ROOT / "Makefile").read_text().splitlines():
        if not re.search(r"\$\((PIP|VLLM_PIP)\)|-m pip install", line) or line.startswith(("PIP :=", "VLLM_PIP :=")):
            continue
        if "$(call PINNED," not in line and not re.search(r"NEWEST|RESOLVER|TRITON|--no-deps", line):
            loose.append(line.strip())
    assert loose == []
