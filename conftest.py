"""What every test shares, doctests and Markdown included: seeds, hypothesis profiles, code blocks of the documentation as tests."""

from __future__ import annotations

import os
import random
import tempfile
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser

# The suite draws the same cases on every run; HYPOTHESIS_PROFILE=search looks for new ones.
_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=_SLOW_IS_FINE, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=_SLOW_IS_FINE, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries below may draw from the old global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    _seed()


def _open_page(namespace: dict[str, Any]) -> None:
    """A Markdown page runs from top to bottom in an empty folder, so that what a block writes lands nowhere else."""
    folder = tempfile.TemporaryDirectory(prefix="s2attn-page-")
    namespace["_page"] = (folder, os.getcwd())
    os.chdir(folder.name)
    _seed()


def _close_page(namespace: dict[str, Any]) -> None:
    folder, home = namespace.pop("_page")
    os.chdir(home)
    folder.cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=_open_page,
    teardown=_close_page,
).pytest()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the blocks of a page on one worker, in order; leave GPU tests out where there is no GPU."""
    for item in items:
        if isinstance(item, SybilItem):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    if not torch.cuda.is_available():
        absent = [item for item in items if item.get_closest_marker("gpu")]
        if absent:
            config.hook.pytest_deselected(items=absent)
            items[:] = [item for item in items if item not in absent]
