"""The plug-in in a vLLM that it does not fit: it is logged, and vLLM starts; with a stand-in for vLLM."""

from __future__ import annotations

import logging
import sys
from enum import Enum
from types import ModuleType

import pytest

from s2attn.integrations.vllm import NAME, plugin, register

REGISTRY = "vllm.v1.attention.backends.registry"


class Backends(Enum):
    CPU_ATTN = "cpu"


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str | None, **registry: object) -> None:
    """A package ``vllm`` with nothing but a version and the registry of backends."""
    parts = REGISTRY.split(".")
    for end in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if version is not None:
        sys.modules["vllm"].__version__ = version  # pyrefly: ignore
    for name, value in registry.items():
        setattr(sys.modules[REGISTRY], name, value)


def fails(*_: object) -> None:
    raise RuntimeError("the registry is closed")


BROKEN = {
    "no registry of backends": ("0.32.0", {}, ImportError),
    "no register_backend": ("0.32.0", {"AttentionBackendEnum": Backends}, ImportError),
    "no enumeration": ("0.33.0", {"AttentionBackendEnum": None, "register_backend": fails}, AttributeError),
    "a registry that raises": ("0.32.1", {"AttentionBackendEnum": Backends, "register_backend": fails}, RuntimeError),
    "no version": (None, {}, AttributeError),
    "a version that is no text": (32, {}, TypeError),
}


@pytest.mark.parametrize("case", BROKEN)
def test_whatever_fails_inside_the_plug_in_is_logged_and_vllm_starts(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version, registry, error = BROKEN[case]
    stand_in(monkeypatch, version, **registry)  # pyrefly: ignore
    with pytest.raises(error):
        register()
    with caplog.at_level(logging.WARNING, "vllm.s2attn"):
        plugin()
    assert f"{NAME} is not available: {error.__name__}: " in caplog.text
    assert "Traceback" in caplog.text


def test_an_untested_version_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stand_in(monkeypatch, "0.40.1")
    with caplog.at_level(logging.WARNING, "vllm.s2attn"):
        plugin()
    assert "the versions that were tested; got 0.40.1" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_stop_from_the_keyboard_is_no_error_of_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    stand_in(monkeypatch, "0.32.0", AttentionBackendEnum=Backends, register_backend=stop)
    with pytest.raises(KeyboardInterrupt):
        plugin()


def test_the_plug_in_leaves_the_registry_of_caches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be filled without a configuration, for every vLLM on the machine."""
    made: dict[str, object] = {}

    class Members(dict):
        __members__ = made

    def register_backend(name: str, path: str) -> None:
        made[name] = members[name] = type("Member", (), {})()

    members = Members()
    stand_in(monkeypatch, "0.33.0", AttentionBackendEnum=members, register_backend=register_backend)
    plugin()
    assert list(made) == [NAME]
    assert "s2attn.integrations.vllm.cache" not in sys.modules
