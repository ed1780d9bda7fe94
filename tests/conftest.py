"""Fixtures for the tests of all rooms."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is loaded: without a GPU the kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() or tensor.is_complex() else tensor


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Floating-point memory from ``torch.empty`` and its relatives is full of NaN: code that reads what it never wrote fails loudly."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _plain=plain, **kwargs: _poison(_plain(*args, **kwargs)))
