"""Triton that is missing, older, newer or broken: reasons in words, never an ImportError."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

import s2attn
from s2attn import Unsupported, Window
from s2attn.backends.triton import installed

CACHED = (installed.triton_objections, installed.gluon_objections, installed.allocator_objections)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module that is found as ``triton``, with nothing in it."""
    for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    fake = ModuleType("triton")
    fake.__spec__ = ModuleSpec("triton", None)
    vars(fake)["__path__"] = []
    monkeypatch.setitem(sys.modules, "triton", fake)
    for cached in CACHED:
        cached.cache_clear()
    yield fake
    monkeypatch.undo()
    for cached in CACHED:
        cached.cache_clear()


def refusals() -> list[str]:
    """What the Triton backend says to every op that it serves."""
    x, pages = torch.randn(1, 8, 2, 16), torch.randn(1, 16, 2, 16)
    where = {"block_table": torch.zeros(1, 1, dtype=torch.int32), "seq_lens": torch.tensor([8])}
    calls = [
        lambda: s2attn.attention(x, x, x, Window(4), backend="triton"),
        lambda: s2attn.decode(x, pages, pages, Window(4), **where, backend="triton"),
        lambda: s2attn.store_kv(x[0], x[0], pages, pages, torch.arange(8), backend="triton"),
    ]
    said = []
    for call in calls:
        with pytest.raises(Unsupported) as refusal:
            call()
        said.append(next(line for line in str(refusal.value).splitlines() if "triton:" in line))
    return said


@pytest.mark.parametrize("version", ["2.3.1", "3.2.0", "3.5.0+git", "unknown"])
def test_another_release_is_refused_with_its_version(stand_in: ModuleType, version: str) -> None:
    vars(stand_in)["__version__"] = version
    assert all(f"needs Triton 3.6 or newer, not {version}" in said for said in refusals())


def test_a_module_without_the_names_that_launches_need(stand_in: ModuleType) -> None:
    vars(stand_in)["__version__"] = "9.0.0"
    assert all("Triton 9.0.0 is not known to these kernels" in said for said in refusals())
    assert "does not tell which allocator is set" in installed.allocator_objections()[0]


def test_an_import_that_fails(stand_in: ModuleType) -> None:
    assert all("triton cannot be imported: AttributeError" in said for said in refusals())


def test_no_triton(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert all("triton is not installed; the extra named triton brings it" in said for said in refusals())


def test_the_gluon_kernels_are_left_out_where_a_name_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain kernels serve instead: a form is a matter of speed, and nobody asks for it by name."""
    pytest.importorskip("triton", reason="triton is not installed")
    from s2attn import build_layout
    from s2attn.backends import Scoring
    from s2attn.backends.triton import ways

    q = torch.zeros(1, 128, 2, 64, dtype=torch.float16)
    given = "forward", "hopper", q, q, q, build_layout(Window(64), 2, 2, 128), Scoring(0.125)
    assert not ways.objections(*given)
    for name in [name for name in sys.modules if name.startswith("s2attn.kernels.hopper")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", None)
    installed.gluon_objections.cache_clear()
    try:
        assert "lacks a name of Gluon" in ways.objections(*given)[0]
    finally:
        installed.gluon_objections.cache_clear()
