"""What every test shares, doctests included: seeds, hypothesis profiles, and which tests a machine can run."""

from __future__ import annotations

import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# The suite draws the same cases on every run; HYPOTHESIS_PROFILE=search looks for new ones.
_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=_SLOW_IS_FINE, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=_SLOW_IS_FINE, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries below may draw from the old global generator
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave GPU tests out where there is no GPU."""
    if torch.cuda.is_available():
        return
    absent = [item for item in items if item.get_closest_marker("gpu")]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the files that take the longest, over all workers: where a suite that grew slow has to be mended."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    slowest = [(name, total) for name, total in seconds.most_common(10) if total >= 5.0]
    if slowest:
        terminalreporter.section("slowest files", sep="-")
        for name, total in slowest:
            terminalreporter.write_line(f"{total:7.1f} s  {name}")
